"""YAML as configuration: plain data, the position of every value, and every problem found, from untrusted text.

The event stream is read once, with limits on size, depth, aliases and expanded nodes, and data is built from it
directly: nothing is ever constructed from a tag, and the C parser's composer, which overflows its stack on deep
nesting, is never entered. Scalars are YAML 1.2: `1e-5` is a number; `on`, `no`, `12:30`, `007` and dates are text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from harmony_core.config.problems import Issue, Path, Source, dotted
from harmony_core.errors import NotFoundError, ResourceError, did_you_mean

MAX_BYTES = 1_000_000
MAX_DEPTH = 64
MAX_ALIASES = 100
MAX_NODES = 200_000

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


@dataclass
class YamlDocument:
    """What a file says: `data` is dicts, lists and scalars; `sources` has the position of each value by path."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    sources: dict[Path, Source] = field(default_factory=dict)
    issues: list[Issue] = field(default_factory=list)


def plain_scalar(text: str) -> Any:
    """What unquoted text means."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        digits = text.replace("_", "")
        # Python refuses longer ones (its limit against quadratic conversion); no field means them as numbers.
        return int(digits) if len(digits) < 400 else text
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def load_yaml_file(path: FilePath, name: str | None = None) -> YamlDocument:
    """Read and parse a file. Raises NotFoundError or ResourceError; what is wrong inside is in `issues`."""
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


def load_yaml(raw: bytes | str, name: str, parser: type[Any] = _Parser) -> YamlDocument:
    """Parse one document whose top level is a map. Never raises: `issues` holds what is wrong."""
    builder = _Builder(name)
    text = builder.decode(raw)
    if text is not None:
        try:
            builder.read(parser(text))
        except yaml.MarkedYAMLError as error:
            builder.syntax_error(error)
        except yaml.reader.ReaderError as error:
            builder.unreadable(text, error)
        except _TooMuch:
            pass  # the issue is recorded; the rest of the text is not looked at
    return builder.document


def parse_value(text: str) -> Any:
    """One value as on a command line. Raises ValueError with the reason."""
    document = load_yaml(f"value: {text}" if "\n" not in text else "value:\n" + _indented(text), "")
    if document.issues or set(document.data) != {"value"}:
        raise ValueError(document.issues[0].message if document.issues else "not one YAML value")
    return document.data["value"]


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


class _TooMuch(Exception):
    """A limit was passed."""


@dataclass
class _Anchor:
    value: Any
    sources: dict[Path, Source]
    path: Path
    nodes: int

    def positions(self) -> dict[Path, Source]:
        """Positions below the anchored value, relative to it."""
        depth = len(self.path)
        return {p[depth:]: s for p, s in self.sources.items() if p[:depth] == self.path and len(p) > depth}


class _Builder:
    """Turns events into data. Recursion is bounded by MAX_DEPTH."""

    def __init__(self, name: str) -> None:
        self.document = YamlDocument(name)
        self._anchors: dict[str, _Anchor | None] = {}  # None while the anchored value is still open
        self._aliases = 0
        self._nodes = 0

    def decode(self, raw: bytes | str) -> str | None:
        """UTF-8 with or without a byte order mark."""
        if len(raw) > MAX_BYTES:
            self._issue(f"larger than {MAX_BYTES // 1_000_000} MB", Source("file", self.document.name, 1, 1))
            return None
        if isinstance(raw, str):
            raw = raw.encode("utf-8", "surrogateescape")
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            column = error.start - raw.rfind(b"\n", 0, error.start)
            self._issue("not UTF-8", Source("file", self.document.name, line, column))
            return None

    def read(self, parser: Any) -> None:
        """Take the whole stream: one document or none."""
        try:
            parser.get_event()  # start of the stream
            if parser.check_event(yaml.StreamEndEvent):
                return
            parser.get_event()  # start of the document
            sources: dict[Path, Source] = {}
            value = self._value(parser, (), None, 0, sources)
            parser.get_event()
            if not parser.check_event(yaml.StreamEndEvent):
                self._issue("a second document; one is allowed", self._source(parser.peek_event()))
            if isinstance(value, dict):
                self.document.data, self.document.sources = value, sources
            elif value is not None:
                self._issue("the top level must be a map of keys to values", sources.get(()))
        finally:
            parser.dispose()

    def syntax_error(self, error: yaml.MarkedYAMLError) -> None:
        """The parser's own complaint, at its place."""
        mark = error.problem_mark or error.context_mark
        at = Source("file", self.document.name, mark.line + 1, mark.column + 1) if mark else None
        self._issue(f"not valid YAML: {error.problem or error.context}", at)

    def unreadable(self, text: str, error: yaml.reader.ReaderError) -> None:
        """A character that YAML does not allow."""
        before = text[: error.position] if isinstance(error.position, int) else ""
        at = Source("file", self.document.name, before.count("\n") + 1, len(before) - before.rfind("\n"))
        self._issue("a control character, which YAML does not allow", at)

    def _value(self, parser: Any, path: Path, key: Any, depth: int, sources: dict[Path, Source]) -> Any:
        event = parser.get_event()
        self._count(event, 1)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, path, key, sources)
        source = sources[path] = self._source(event, key)
        before = self._nodes
        if event.anchor:
            self._anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, path, source)
        elif depth >= MAX_DEPTH:
            self._issue(f"nested deeper than {MAX_DEPTH} levels", source)
            raise _TooMuch
        elif isinstance(event, yaml.SequenceStartEvent):
            self._refuse_tag(event, path, source)
            value = self._list(parser, path, depth, sources)
        else:
            self._refuse_tag(event, path, source)
            value = self._map(parser, path, depth, sources)
        if event.anchor:
            self._anchors[event.anchor] = _Anchor(value, sources, path, self._nodes - before + 1)
        return value

    def _list(self, parser: Any, path: Path, depth: int, sources: dict[Path, Source]) -> list[Any]:
        items: list[Any] = []
        while not parser.check_event(yaml.SequenceEndEvent):
            items.append(self._value(parser, (*path, len(items)), None, depth + 1, sources))
        parser.get_event()
        return items

    def _map(self, parser: Any, path: Path, depth: int, sources: dict[Path, Source]) -> dict[str, Any]:
        items: dict[str, Any] = {}
        merged: list[tuple[Any, dict[Path, Source]]] = []
        first: dict[str, Source] = {}
        while not parser.check_event(yaml.MappingEndEvent):
            key = parser.get_event()
            self._count(key, 1)
            if not isinstance(key, yaml.ScalarEvent):
                self._issue("a key must be plain text", self._source(key), path)
                raise _TooMuch
            name = str(key.value)
            if name == "<<" and key.implicit[0]:
                below: dict[Path, Source] = {}
                merged.append((self._value(parser, (), None, depth + 1, below), below))
                continue
            target = sources
            if name in first:
                target = {}  # read to its end, then dropped
                message = f"duplicate key (first at line {first[name].line})"
                self._issue(message, self._source(key), (*path, name), "duplicate")
            else:
                first[name] = self._source(key)
            value = self._value(parser, (*path, name), key, depth + 1, target)
            items.setdefault(name, value)
        parser.get_event()
        for value, below in merged:
            self._merge(items, value, path, below, sources)
        return items

    def _merge(self, items: dict[str, Any], value: Any, path: Path, below: dict[Path, Source], sources: Any) -> None:
        """`<<`: the keys of another map (or of several), where this one does not have them."""
        parts = [(value, ())] if not isinstance(value, list) else [(v, (i,)) for i, v in enumerate(value)]
        for part, prefix in parts:
            if not isinstance(part, dict):
                self._issue("`<<` takes a map or a list of maps", below.get(()), path)
                continue
            for name in [name for name in part if name not in items]:
                items[name] = part[name]
                start = (*prefix, name)
                for p, s in below.items():
                    if p[: len(start)] == start:
                        sources[path + p[len(prefix) :]] = s

    def _alias(self, event: Any, path: Path, key: Any, sources: dict[Path, Source]) -> Any:
        self._aliases += 1
        source = sources[path] = self._source(event, key)
        if event.anchor not in self._anchors:
            self._issue(f"*{event.anchor} is not defined above", source, path)
            return None
        anchor = self._anchors[event.anchor]
        if anchor is None:
            self._issue(f"*{event.anchor} contains itself", source, path)
            return None
        if self._aliases > MAX_ALIASES:
            self._issue(f"more than {MAX_ALIASES} aliases", source, path)
            raise _TooMuch
        self._count(event, anchor.nodes)
        sources.update({path + p: s for p, s in anchor.positions().items()})
        return copied(anchor.value)

    def _scalar(self, event: Any, path: Path, source: Source) -> Any:
        if event.tag in (None, "!", _PREFIX + "str"):
            return plain_scalar(event.value) if event.implicit[0] and event.tag is None else str(event.value)
        self._refuse_tag(event, path, source)
        return None

    def _refuse_tag(self, event: Any, path: Path, source: Source) -> None:
        usual = _PREFIX + ("seq" if isinstance(event, yaml.SequenceStartEvent) else "map")
        if event.tag not in (None, "!", usual):
            shown = event.tag.replace(_PREFIX, "!!")[:60]
            self._issue(f"the tag {shown} is not allowed; configuration is plain data", source, path, "tag")

    def _count(self, event: Any, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            self._issue(f"more than {MAX_NODES:,} values, aliases expanded", self._source(event))
            raise _TooMuch

    def _source(self, event: Any, key: Any = None) -> Source:
        mark = event.start_mark
        key_line, key_column = (key.start_mark.line + 1, key.start_mark.column + 1) if key is not None else (0, 0)
        return Source("file", self.document.name, mark.line + 1, mark.column + 1, key_line, key_column)

    def _issue(self, message: str, source: Source | None, path: Path = (), type: str = "yaml") -> None:
        self.document.issues.append(Issue(message, source, dotted(path), type))


def copied(value: Any) -> Any:
    """Maps and lists anew, so that nothing is shared."""
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    return [copied(v) for v in value] if isinstance(value, list) else value
