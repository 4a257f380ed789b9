"""Keeps secrets out of what a run writes: by the name of the value, by known shapes of tokens, by known values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MASK = "********"

_NAME = re.compile(
    r"(?:^|[._-])(?:token|secret|password|passwd|credentials?|(?:api|access|secret|private)[_-]?key)$", re.IGNORECASE
)
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}|AKIA[A-Z0-9]{16})"
)
_USERINFO = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@:\"']+:[^\s/@\"']+@")
_LINE = re.compile(
    r"^(?P<name>[ \t]*(?:-[ \t]+)?[\"']?[\w.-]+[\"']?[ \t]*[:=][ \t]*)(?P<value>[^\s#].*)$", re.MULTILINE
)


def is_secret_name(name: str) -> bool:
    """`api_key`, `HF_TOKEN`, `db.password`; not `model_key`, not `tokens_to_generate`."""
    return bool(_NAME.search(name))


class Redactor:
    """Masks secrets in text and data. Values shorter than 6 characters are never masked by value."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        self._values = sorted({v for v in values if len(v) >= 6}, key=len, reverse=True)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Redactor:
        """Knows the values of the variables whose names say that they are secret."""
        return cls(value for name, value in environ.items() if is_secret_name(name))

    def knowing(self, data: Any) -> Redactor:
        """One that also knows the secret-named text values in `data`."""
        return Redactor([*self._values, *_secret_values(data)])

    def text(self, text: str) -> str:
        """Mask known values, known shapes of tokens, and passwords in URLs."""
        for value in self._values:
            text = text.replace(value, MASK)
        return _USERINFO.sub(rf"\g<1>{MASK}@", _SHAPES.sub(MASK, text))

    def data(self, data: Any) -> Any:
        """The same for plain data; values under secret names too."""
        if isinstance(data, dict):
            return {k: MASK if _is_secret_entry(k, v) else self.data(v) for k, v in data.items()}
        if isinstance(data, list | tuple):
            return [self.data(item) for item in data]
        return self.text(data) if isinstance(data, str) else data

    def argv(self, argv: Sequence[str]) -> list[str]:
        """The same for a command line: what follows `--api-key`, and what `--set api_key=` gives."""
        shown: list[str] = []
        mask_next = False
        for word in argv:
            name, equals, value = word.partition("=")
            flag = name.lstrip("-")
            if mask_next:
                shown.append(MASK)
            elif equals and value and is_secret_name(flag):
                shown.append(f"{name}={MASK}")
            else:
                shown.append(self.text(word))
            mask_next = not equals and name.startswith("-") and is_secret_name(flag)
        return shown

    def configuration(self, text: str) -> str:
        """The same for the text of a file: also what follows a secret name on its line."""

        def masked(match: re.Match[str]) -> str:
            name = match["name"].strip(" \t-:=\"'")
            return match["name"] + MASK if is_secret_name(name) else match[0]

        return self.text(_LINE.sub(masked, text))


def _is_secret_entry(key: object, value: object) -> bool:
    return is_secret_name(str(key)) and isinstance(value, str) and bool(value)


def _secret_values(data: Any, name: str = "") -> Iterable[str]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _secret_values(value, str(key))
    elif isinstance(data, list | tuple):
        for item in data:
            yield from _secret_values(item, name)
    elif isinstance(data, str) and is_secret_name(name):
        yield data
