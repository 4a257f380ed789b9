"""Secrets: how they are recognised and masked in everything that a run writes and prints.

A text is secret by its name (`is_secret_name`), by its shape, or because a variable or field with a secret name holds
it. Known values of eight or more characters are masked everywhere, also in their escaped spellings; shorter ones only
if they are a field's whole value. Keys of data and values other than text are not changed.

The shapes are those of gitleaks' rules (github.com/gitleaks/gitleaks, config/gitleaks.toml, read at b58d3f10 of
2026-07-22), with open ends, so that a provider's next length is still found.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from harmony_core.plain_files import plain

MASK = "********"
_MASK = MASK.encode()

SHORT = 8
"""A known value with fewer characters is masked only if it stands alone."""

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET = re.compile(
    r"(?:secret|password|passwd|passphrase|pwd|pat|dsn|credential|authorization|cookie|jwt"
    r"|(?:api|access|secret|private|auth)key|(?:auth|access)token)s?"
)
_KEY = re.compile(r".*\b(?:api|access|secret|private|auth) keys?\b.*")
_TOKEN = re.compile(r"(?:.* )?token")
_KEY_OF_OURS = re.compile(
    r"(?:.* )?(?:(?:model|dataset|grader|judge)(?: key)?"  # and the tokens of tokenizers and model configurations:
    r"|(?:eos|bos|pad|unk|sep|cls|mask|image|video|audio|vision|speech|special|stop|start|end|begin|sot|eot|eom|boi|eoi"
    r"|boa|eoa|newline|prefix|suffix|middle|think|tool|next|first|last|new|per|max|min) token)"
)
_PLACES = ("file", "dir", "path", "directory")
_WORKING_DIRECTORY = ("PWD", "OLDPWD")
_SWITCHES = ("", "0", "1", "true", "false", "yes", "no", "on", "off", "none", "null")

_PREFIXES = (
    "sk- ghp_ gho_ ghu_ ghs_ ghr_ github_pat_ glpat- gldt- glrt- glptt- glsoat- glc_ glsa_ xoxb- xoxp- "
    "xoxa- xoxr- xoxs- xoxe- xapp- AKIA ASIA ABIA ACCA ABSK LTAI AIza ya29. GOCSPX- sk_live_ sk_test_ rk_live_ "
    "rk_test_ "
    "whsec_ npm_ pypi- SG. dop_v1_ doo_v1_ dor_v1_ dapi NRAK- shpat_ shpca_ shppa_ shpss_ lin_api_ ntn_ pplx- gsk_ "
    "xai- r8_ nvapi- hvs. dp.pt. PMAK- pul- rubygems_ sntryu_ sntrys_ xkeysib- AGE-SECRET-KEY-1 eyJ"
)
_SHAPE = re.compile(
    rb"(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))(?:(?:hf_|api_org_)\w{16,}|(?:%s)(?=[\w.-]*\d)[\w.-]{12,})"
    % "|".join(map(re.escape, _PREFIXES.split())).encode()
)
_SHORTEST = 15
"""The number of characters of the shortest text that has one of these shapes."""
_RUNS = bytes(97 if (chr(byte).isalnum() and byte < 128) or byte in b"_.-" else 32 for byte in range(256))
"""Maps the characters of keys to `a` and all others to blanks, so that one search finds the long runs."""
_DIGIT = re.compile(rb"\d")
_HOOK = re.compile(rb"(hooks\.slack\.com/services/)[\w/]+")
_BEARER = re.compile(rb"((?:bearer|basic)\s+)(?=\S*\d|\S{16})[\w.~+/=-]{8,}", re.IGNORECASE)
_URL_PASSWORD = re.compile(rb"(://)[^\s/:@\"'<>]*:([^\s/\"'<>]+)@")
_PEM = re.compile(
    rb"-----BEGIN[ A-Z0-9_-]{0,100}PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END[ A-Z0-9_-]{0,100}-----|\Z)", re.DOTALL
)
_STEMS = b"secret passw passphrase pwd pat dsn credential authorization cookie jwt token key".split()
_ASSIGNED = re.compile(
    rb"(?:d|ord)?s?(?P<between>\\?[\"']?[ \t]{0,2}[:=][ \t]{0,2}\\?)"
    rb"(?P<value>\"[^\"\n]{8,}\"|'[^'\n]{8,}'|[^\s\"',;&})\]]{8,})"
)
_NAME_BEFORE = re.compile(rb"[\w.-]*\Z")


def is_secret_name(name: str) -> bool:
    """`api_key`, `HF_TOKEN`, `db.password`; not `model_key`, not `eos_token`, not `tokens_to_generate`."""
    words = _words(name)
    if not words or words[-1] in _PLACES or is_key_of_ours(name):
        return False
    joined = " ".join(words)
    return any(map(_SECRET.fullmatch, words)) or bool(_KEY.fullmatch(joined) or _TOKEN.fullmatch(joined))


def is_key_of_ours(name: str) -> bool:
    """Whether a field names a model, dataset or grader, or holds a tokenizer's token: known values stay unmasked."""
    return bool(_KEY_OF_OURS.fullmatch(" ".join(_words(name))))


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(name)]


class Redactor:
    """Masks secrets in text and in plain data. `values` are the known secrets."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        self.values = frozenset(value for value in values if value.strip("*"))
        spellings = {spelling for value in self.values for spelling in _spellings(value)}
        known = sorted((s for s in spellings if len(s) >= SHORT), key=len, reverse=True)
        self._known = [spelling.encode("utf-8", "surrogatepass") for spelling in known]

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Redactor:
        """A redactor that knows the values of variables with secret names, and passwords in URLs."""
        found = {name: value for name, value in environ.items() if value.lower() not in _SWITCHES}
        return cls(secret_values({n: v for n, v in found.items() if n not in _WORKING_DIRECTORY}))

    def knowing(self, data: Any) -> Redactor:
        """A redactor that also knows the secrets in `data`: text under secret names, and pydantic's secret values."""
        return Redactor([*self.values, *secret_values(data)])

    def text(self, text: str) -> str:
        """Mask known values, shapes of keys, passwords in URLs, and values behind a secret name and `=` or `:`."""
        if len(text) < SHORT:
            return text
        return self.raw(text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")

    def code(self, text: str) -> str:
        """Like `text`, for a program's source, in which only quoted texts are values."""
        return self.raw(text.encode("utf-8", "surrogatepass"), code=True).decode("utf-8", "surrogatepass")

    def raw(self, text: bytes, code: bool = False) -> bytes:
        """Like `text`, for UTF-8, in as few passes as possible: ranks can write tens of megabytes a second."""
        for value in self._known:
            text = text.replace(value, _MASK)
        if b"PRIVATE KEY" in text:
            text = _PEM.sub(_MASK, text)
        lower = text.lower()
        if b"bearer" in lower or b"basic" in lower:
            text = _BEARER.sub(rb"\1" + _MASK, text)
        if b"://" in text:
            text = _URL_PASSWORD.sub(rb"\1" + _MASK + b"@", text)
        if b"hooks.slack" in text:
            text = _HOOK.sub(rb"\1" + _MASK, text)
        return _replaced(text, [*_shaped(text), *_assigned(text, code)])

    def data(self, data: Any, name: str = "", secret: bool = False) -> Any:
        """Plain data with its secrets masked. `name`: the field that holds it; `secret`: it is under a secret name.

        Values that JSON cannot represent become text.
        """
        if isinstance(data, Mapping):
            return {
                self._key(key): self.data(value, str(key), secret or is_secret_name(str(key)))
                for key, value in data.items()
            }
        if isinstance(data, list | tuple | set | frozenset):
            return [self.data(item, name, secret) for item in data]
        if data is None or isinstance(data, bool | int | float):
            return plain(data)
        text = str(data)
        if is_key_of_ours(name):
            return Redactor().text(text)
        if text and (secret or text in self.values):
            return MASK
        return self.text(text)

    def _key(self, key: Any) -> Any:
        """Mask a key, unless it has only the characters that keys of our records have."""
        return key if not isinstance(key, str) or re.fullmatch(r"[a-z_./]*", key) else self.text(key)

    def argv(self, argv: Sequence[str]) -> list[str]:
        """Mask a command line, including the word after `--api-key` and the value of `--set api_key=...`."""
        shown: list[str] = []
        behind = ""
        for word in argv:
            name, equals, value = word.partition("=")
            flag = name.lstrip("-")
            if equals and re.fullmatch(r"[\w.-]+", flag) and not (is_secret_name(behind) or is_key_of_ours(behind)):
                shown.append(f"{name}={self.data(value, flag, is_secret_name(flag))}")
            else:
                shown.append(self.data(word, behind, is_secret_name(behind)))
            behind = flag if name.startswith("-") and not equals and not is_secret_name(behind) else ""
        return shown


def _shaped(text: bytes) -> Iterator[tuple[int, int]]:
    """The spans of texts with the shape of a provider's key."""
    runs, start = text.translate(_RUNS), 0
    while (start := runs.find(b"a" * _SHORTEST, start)) >= 0:
        end = runs.find(b" ", start)
        end = len(runs) if end < 0 else end
        run = text[start:end]
        if (_DIGIT.search(run) and run.strip(b"0123456789.-")) or b"hf_" in run or b"api_org_" in run:
            yield from (match.span() for match in _SHAPE.finditer(text, start, end))
        start = end


def _assigned(text: bytes, code: bool) -> Iterator[tuple[int, int]]:
    """The spans of values that follow a secret name."""
    lower = text.lower()
    for stem in _STEMS:
        at = lower.find(stem)
        while at >= 0:
            match = _ASSIGNED.match(lower, at + len(stem))
            if match is not None and not (code and match["value"][:1] not in b"\"'"):
                before = _NAME_BEFORE.search(text, max(0, at - 64), at)
                name = text[before.start() if before else at : match.start("between")].decode("utf-8", "replace")
                start, end = match.span("value")
                quoted = match["value"][:1] in (b'"', b"'")
                # A bare `token:` often precedes a token of a text.
                doubtful = name == "token" and not _DIGIT.search(match["value"])
                if is_secret_name(name) and not doubtful and match["value"].strip(b"*\"'\\"):
                    yield (start + quoted, end - quoted)
            at = lower.find(stem, at + 1)


def _replaced(text: bytes, spans: list[tuple[int, int]]) -> bytes:
    parts, last = [], 0
    for start, end in sorted(spans):
        if end > last:
            parts += [text[last : max(start, last)], _MASK if start >= last else b""]
            last = end
    return b"".join([*parts, text[last:]]) if parts else text


def secret_values(data: Any, secret: bool = False) -> Iterable[str]:
    """The texts in plain data that are secret by their names, pydantic's secret values, and passwords in URLs."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            inside = secret and not is_key_of_ours(str(key))
            yield from secret_values(value, inside or is_secret_name(str(key)))
    elif isinstance(data, list | tuple | set | frozenset):
        for item in data:
            yield from secret_values(item, secret)
    elif isinstance(data, str):
        if secret:
            yield data
        passwords = _URL_PASSWORD.findall(data.encode("utf-8", "surrogatepass")) if "://" in data else []
        yield from (password.decode("utf-8", "surrogatepass") for _, password in passwords)
    elif callable(reveal := getattr(data, "get_secret_value", None)):
        found = reveal()
        yield found.decode("utf-8", "replace") if isinstance(found, bytes) else str(found)


def _spellings(value: str) -> set[str]:
    """How a text looks in JSON, in Python's `repr`, in a URL, and line by line."""
    escaped = {
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        repr(value)[1:-1],
        repr(value + '"')[1:-2],
    }
    lines = {line.strip() for line in value.splitlines() if len(line.strip()) >= 2 * SHORT and "-----" not in line}
    return {value, quote(value, safe=""), quote(value)} | escaped | (lines if "\n" in value else set())


MAX_LINE = 64 * 1024
"""Maximum bytes held of an unfinished line or multi-line key. A longer one is written in pieces, and a secret is masked
within one piece."""


class KeptPrints:
    """Keeps the prints of one stream, from any thread: in memory before `begin`, in a file until `end`.

    Lines are written when they are complete. Prints are lost while the disk is full: the file states the number of
    lost bytes where it continues, and `lost` counts them.
    """

    def __init__(self) -> None:
        self.lost = 0
        self._gap = 0
        self._lock = threading.Lock()
        self._held = b""
        self._descriptor: int | None = None
        self._redactor = Redactor()
        self._ended = False

    def begin(self, target: Path | int, redactor: Redactor) -> None:
        """Append held and later prints to a file, or to a descriptor that this object then owns."""
        with self._lock:
            self._redactor = redactor
            try:
                self._descriptor = target if isinstance(target, int) else _opened(target)
            except OSError:
                self._ended, self.lost = True, max(1, len(self._held))
            self._write_lines()

    def write(self, data: bytes) -> None:
        """Keep these bytes. Never raises OSError."""
        with self._lock:
            if self._ended:
                return
            self._held += data
            if self._descriptor is not None:
                self._write_lines()

    def end(self) -> None:
        """Write an unfinished line, and drop later prints."""
        with self._lock:
            self._write_lines(last=True)
            self._ended = True
            if self._descriptor is not None:
                os.close(self._descriptor)
            self._descriptor = None

    def _write_lines(self, last: bool = False) -> None:
        whole = len(self._held) if last else _whole(self._held)
        told, self._held = self._held[:whole], self._held[whole:]
        if not told or self._descriptor is None:
            return
        text = self._redactor.raw(told)
        try:
            if self._gap:
                _write(self._descriptor, f"\n[{self._gap} bytes could not be written here]\n".encode())
                self._gap = 0
            _write(self._descriptor, text)
        except OSError:
            self._gap += len(text)
            self.lost += len(text)


def _opened(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _whole(held: bytes) -> int:
    """The number of bytes that can be masked and written: complete lines, without a key that has no end yet."""
    whole = max(held.rfind(b"\n"), held.rfind(b"\r")) + 1
    begun = held.rfind(b"-----BEGIN", 0, whole)
    if begun >= 0 and b"PRIVATE KEY" in held[begun : begun + 100] and held.find(b"-----END", begun, whole) < 0:
        whole = held.rfind(b"\n", 0, begun) + 1
    if whole == 0 and len(held) > MAX_LINE:
        return (held.rfind(b" ") + 1) or len(held)
    return whole


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
