"""Names of models: one allow-list, applied once, before a name touches the filesystem."""

from __future__ import annotations

import re
from dataclasses import dataclass

from harmony_core.errors import NotFoundError, UsageError

SCHEME = "model_registry://"
BUILTIN = "builtin:"

_SEGMENT = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_VERSION = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
_ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,63}", re.ASCII)
_HUB = re.compile(r"(hf:)?[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
_RULE = "up to four segments joined by '/', each of a-z, 0-9, '.', '_' and '-', starting with a letter or digit"


@dataclass(frozen=True)
class Reference:
    """A parsed reference: a key, with a version number, an alias, or neither (the newest version)."""

    key: str
    version: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        tail = self.version if self.version is not None else self.alias
        return self.key if tail is None else f"{self.key}@{tail}"


def _segment_problem(segment: str) -> str:
    if not _SEGMENT.fullmatch(segment):
        return _RULE
    if ".." in segment or segment.endswith("."):
        return "no segment holds '..' or ends in '.'"
    # Names that the layout itself uses.
    if re.fullmatch(r"v\d{6,}", segment) or segment.endswith((".json", ".tmp")):
        return "v000001 and names ending in .json or .tmp are the registry's own"
    return ""


def key_problem(key: str) -> str:
    """Why this is no key, or ""."""
    segments = key.split("/")
    if len(segments) > 4:
        return _RULE
    return next((problem for segment in segments if (problem := _segment_problem(segment))), "")


def check_key(key: str) -> None:
    """Raise UsageError, with the rule and a key that would do, for what is no key."""
    problem = key_problem(key)
    if problem:
        raise UsageError(f"{key[:100]!r} cannot be a model key: {problem}", hint=f"for example {slugify(key)!r}")


def check_alias(alias: str) -> None:
    """Raise UsageError for what is no alias; an alias starts with a letter, so it is no number."""
    if not _ALIAS.fullmatch(alias):
        raise UsageError(f"{alias[:100]!r} cannot be an alias: a-z first, then a-z, 0-9, '.', '_' and '-'")


def parse_reference(text: str) -> Reference:
    """`key`, `key@3`, `key@alias`, each also behind `model_registry://`. NotFoundError for what can name no model."""
    plain = text.removeprefix(SCHEME)
    key, at, tail = plain.partition("@")
    problem = key_problem(key)
    if problem:
        raise NotFoundError(f"there is no model {text[:200]!r}: a key has {problem}", hint=source_hint(text), ref=text)
    if not at:
        return Reference(key)
    if _VERSION.fullmatch(tail):
        return Reference(key, version=int(tail))
    if _ALIAS.fullmatch(tail):
        return Reference(key, alias=tail)
    raise NotFoundError(f"there is no model {text[:200]!r}: {tail[:100]!r} is neither a version nor an alias", ref=text)


def source_hint(text: str) -> str:
    """The `models add` line for a name that looks like a hub id or a path, else ""."""
    if _HUB.fullmatch(text):
        name = text.removeprefix("hf:")
        return f"adaptive models add {slugify(name.split('/')[1])} hf:{name}"
    if text.startswith(("/", "./", "../", "~")) and text.isprintable():
        return f"a path is added first: adaptive models add KEY {text[:200]}"
    return ""


def slugify(name: str) -> str:
    """The nearest key to any name: "My Model (v2)" -> "my-model-v2"; a key is returned unchanged."""
    if not key_problem(name):
        return name
    segments = []
    for segment in name.split("/")[:4]:
        plain = re.sub(r"[^a-z0-9._-]+", "-", segment.lower(), flags=re.ASCII)
        plain = re.sub(r"\.{2,}", ".", plain).strip("-._")[:64].strip("-._")
        if plain:
            segments.append(f"model-{plain.replace('.', '-')[:58]}" if _segment_problem(plain) else plain)
    return "/".join(segments) or "model"
