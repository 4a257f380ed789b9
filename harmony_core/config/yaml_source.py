"""YAML as configuration: plain data with the position of every value, and all problems of an untrusted text.

Limits on size, depth and aliases are checked on the events, before nodes are made of them; data is built from the nodes
directly, and tags construct no objects. Scalars are YAML 1.2: `1e-5` is a number; `on`, `no`, `12:30`,
`007` and dates are text. A `Source` says where a value was written, an `Issue` names a problem and its source.
"""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Literal, NoReturn

import yaml

from harmony_core.errors import ConfigError, NotFoundError, ResourceError, did_you_mean

Path = tuple[str | int, ...]
"""A place in the configuration: keys of maps, indices of lists."""

MAX_BYTES = 1_000_000
MAX_DEPTH = 64
MAX_ALIASES = 100
MAX_VALUES = 200_000
_Parser: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)")
_FLOAT = re.compile(
    r"[-+]?(?:(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
    r"|\.(?:nan|NaN|NAN)"
)
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_PREFIX = "tag:yaml.org,2002:"
_PLAIN = "plain"
_USUAL_TAGS = {yaml.ScalarNode: "str", yaml.SequenceNode: "seq", yaml.MappingNode: "map"}


def dotted(path: Path) -> str:
    """`("datasets", 0, "path")` -> `datasets.0.path`."""
    return ".".join(map(str, path))


def holds(node: Any, key: str | int) -> bool:
    """Whether a map has the key, or a list the index."""
    return key in node if isinstance(node, dict) else isinstance(node, list) and key in range(len(node))


def places(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every place in plain data with its value: the whole first, blocks before their contents."""
    yield path, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@dataclass(frozen=True)
class Source:
    """Where a value was written. Lines and columns count from 1; they are 0 if the source is not a file."""

    kind: Literal["default", "file", "env", "flag"]
    name: str = ""
    line: int = 0
    column: int = 0
    key_line: int = 0
    """The position of the value's key, for errors about the key."""
    key_column: int = 0

    def at_key(self) -> Source:
        """The same source, pointing at the key."""
        return Source(self.kind, self.name, self.key_line, self.key_column) if self.key_line else self

    def __str__(self) -> str:
        if self.kind == "default":
            return "default"
        return f"{self.name}:{self.line}:{self.column}" if self.line else self.name


DEFAULT = Source("default")


@dataclass(frozen=True)
class Issue:
    """One problem of the configuration."""

    message: str
    source: Source | None = None
    path: str = ""
    type: str = "invalid"
    suggestions: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.path}: {self.message}" if self.path and not self._flag_says_it() else self.message
        if self.source is not None and self.source.kind != "default":
            text = f"{self.source}: {text}"
        if self.suggestions:
            text += f" (did you mean {' or '.join(self.suggestions)}?)"
        return text

    def _flag_says_it(self) -> bool:
        return self.source is not None and self.source.name == f"--{self.path.replace('_', '-')}"

    def as_data(self) -> dict[str, Any]:
        """The issue as plain data, for `--json`."""
        data: dict[str, Any] = {"path": self.path, "type": self.type, "message": self.message}
        if (source := self.source) is not None:
            place = {"line": source.line, "column": source.column} if source.line else {}
            data["source"] = {"kind": source.kind, "name": source.name, **place}
        return data | ({"suggestions": list(self.suggestions)} if self.suggestions else {})


def in_reading_order(issues: Iterable[Issue]) -> list[Issue]:
    """Files first, by line; then the environment, flags, and issues without a source."""

    def place(issue: Issue) -> tuple[int, str, int, int]:
        source = issue.source or DEFAULT
        rank = ("file", "env", "flag", "default").index(source.kind)
        return (rank, source.name if rank == 0 else "", source.line, source.column)

    return sorted(dict.fromkeys(issues), key=place)


def raise_if_any(issues: Iterable[Issue]) -> None:
    """Raise one ConfigError with all issues, if there are any."""
    if ordered := in_reading_order(issues):
        message = str(ordered[0]) if len(ordered) == 1 else f"the configuration is not valid: {len(ordered)} problems"
        raise ConfigError(message, issues=map(str, ordered), errors=[issue.as_data() for issue in ordered])


@dataclass
class YamlDocument:
    """A parsed file: `data` holds dicts, lists and scalars, `sources` the position of each value by path."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    sources: dict[Path, Source] = field(default_factory=dict)
    issues: list[Issue] = field(default_factory=list)


def plain_scalar(text: str) -> Any:
    """The value of unquoted text."""
    digits = text.replace("_", "")
    if _INT.fullmatch(text) and len(digits) < 400:  # Python refuses long ones (its limit against quadratic conversion)
        return int(digits)
    if _FLOAT.fullmatch(text):
        return float(digits.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return _WORDS.get(text, text)


def load_yaml_file(path: FilePath, name: str | None = None) -> YamlDocument:
    """Read and parse a file. Raises NotFoundError or ResourceError; problems of the text are in `issues`."""
    shown = name or str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        siblings = [p.name for pattern in ("*.yaml", "*.yml") for p in path.parent.glob(pattern)]
        raise NotFoundError(f"there is no configuration file {shown}", hint=did_you_mean(path.name, siblings)) from None
    except OSError as error:
        raise ResourceError(f"cannot read {shown}: {error.strerror or error}") from error
    return load_yaml(raw, shown)


def load_yaml(raw: bytes | str, name: str) -> YamlDocument:
    """Parse one document whose top level is a map. Problems are kept in `issues`."""
    builder = _Builder(name)
    with contextlib.suppress(_TooMuch):  # the issue is recorded; the rest of the text is skipped
        builder.read(raw)
    return builder.document


def parse_value(text: str) -> Any:
    """One value as on a command line. Raises ValueError with the reason."""
    document = load_yaml(f"value: {text}" if "\n" not in text else "value:\n" + textwrap.indent(text, "  "), "")
    if document.issues or set(document.data) != {"value"}:
        raise ValueError(document.issues[0].message if document.issues else "not one YAML value")
    return document.data["value"]


class _TooMuch(Exception):
    """A limit was exceeded."""


class _Loader(_Parser):  # type: ignore[misc]
    """Leaves plain scalars untagged, so that YAML 1.1 does not read them and explicit tags can be recognised."""

    def resolve(self, kind: type[yaml.Node], value: str | None, implicit: tuple[bool, bool]) -> str:
        """The tag of an untagged node."""
        plain = kind is yaml.ScalarNode and implicit[0]
        return _PLAIN if plain else str(super().resolve(kind, value, implicit))


class _Builder:
    """Turns nodes into data, each with its position."""

    def __init__(self, name: str) -> None:
        self.document = YamlDocument(name)
        self._open: set[int] = set()
        self._values = 0

    def read(self, raw: bytes | str) -> None:
        """Read the whole stream, in UTF-8 with or without a byte order mark; it may hold one document at most."""
        data = raw.encode("utf-8", "surrogateescape") if isinstance(raw, str) else raw
        if len(raw) > MAX_BYTES:
            self._too_much(f"larger than {MAX_BYTES // 1_000_000} MB", self._at("", 0))
        try:
            self._compose(data.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            self._issue("not UTF-8", self._at(data.decode("latin-1"), error.start))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            at = Source("file", self.document.name, mark.line + 1, mark.column + 1) if mark else None
            self._issue(f"not valid YAML: {', '.join(filter(None, (error.context, error.problem)))}", at)
        except yaml.reader.ReaderError as error:
            position = error.position if isinstance(error.position, int) else 0
            place = self._at(data.decode("utf-8-sig"), position)
            self._issue("a control character, which YAML does not allow", place)

    def _compose(self, text: str) -> None:
        """Limits are checked before the composer begins."""
        depth = aliases = 0
        for event in yaml.parse(text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            aliases += isinstance(event, yaml.AliasEvent)
            if depth > MAX_DEPTH:
                self._too_much(f"nested deeper than {MAX_DEPTH} levels", self._source(event))
            if aliases > MAX_ALIASES:
                self._too_much(f"over {MAX_ALIASES} aliases", self._source(event))
        sources: dict[Path, Source] = {}
        node = yaml.compose(text, Loader=_Loader)
        value = None if node is None else self._value(node, (), None, sources)
        if isinstance(value, dict):
            self.document.data, self.document.sources = value, sources
        elif value is not None:
            self._issue("the top level must be a map of keys to values", sources.get(()))

    def _at(self, text: str, position: int) -> Source:
        line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
        return Source("file", self.document.name, line, column)

    def _value(self, node: yaml.Node, path: Path, key: Any, sources: dict[Path, Source]) -> Any:
        """The value of a node; the target of an alias is built again for each use."""
        source = sources[path] = self._source(node, key)
        self._values += 1
        if self._values > MAX_VALUES:
            self._too_much(f"more than {MAX_VALUES:,} values, aliases expanded", self._source(node))
        if id(node) in self._open:
            self._issue("contains itself", source, path)
            return None
        if node.tag == _PLAIN:
            return plain_scalar(node.value)
        allowed = node.tag in ("!", _PREFIX + _USUAL_TAGS[type(node)])
        if not allowed:
            shown = node.tag.replace(_PREFIX, "!!")[:60]
            self._issue(f"the tag {shown} is not allowed; configuration is plain data", source, path, "tag")
        if isinstance(node, yaml.ScalarNode):
            return str(node.value) if allowed else None
        if len(self._open) == MAX_DEPTH:
            self._too_much(f"nested deeper than {MAX_DEPTH} levels, aliases expanded", self._source(node))
        self._open.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            value: Any = [self._value(item, (*path, i), None, sources) for i, item in enumerate(node.value)]
        else:
            value = self._map(node, path, sources)
        self._open.remove(id(node))
        return value

    def _map(self, node: yaml.Node, path: Path, sources: dict[Path, Source]) -> dict[str, Any]:
        items: dict[str, Any] = {}
        merged: list[tuple[Any, dict[Path, Source]]] = []
        first: dict[str, Source] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._too_much("a key must be plain text", self._source(key), path)
            name = str(key.value)
            if name == "<<" and key.tag == _PLAIN:
                below: dict[Path, Source] = {}
                merged.append((self._value(value, path, None, below), below))
            elif name in first:
                message = f"duplicate key (first at line {first[name].line})"
                self._issue(message, self._source(key), (*path, name), "duplicate")
            else:
                first[name] = self._source(key)
                items[name] = self._value(value, (*path, name), key, sources)
        for other, below in merged:
            if isinstance(other, dict):  # the keys of another map that are missing here
                new = other.keys() - items.keys()
                items |= {name: value for name, value in other.items() if name in new}
                sources |= {p: source for p, source in below.items() if p != path and p[len(path)] in new}
            else:
                self._issue("`<<` takes a map", below[path], path)
        return items

    def _too_much(self, message: str, at: Source, path: Path = ()) -> NoReturn:
        self._issue(message, at, path)
        raise _TooMuch

    def _source(self, node: Any, key: Any = None) -> Source:
        mark = node.start_mark
        key_line, key_column = (key.start_mark.line + 1, key.start_mark.column + 1) if key is not None else (0, 0)
        return Source("file", self.document.name, mark.line + 1, mark.column + 1, key_line, key_column)

    def _issue(self, message: str, source: Source | None, path: Path = (), type: str = "yaml") -> None:
        self.document.issues.append(Issue(message, source, dotted(path), type))


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be read back as another type; `1e-5` is a number here and text in YAML 1.1."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    quoted = '"' if not isinstance(plain_scalar(text), str) else "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=quoted)


_Dumper.add_representer(str, _text)


def as_yaml(data: Mapping[str, Any]) -> str:
    """YAML in the order of the fields."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
