"""A recipe's JSON schema: a list of parameters, what may stand at a dotted name, and what a text means there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from harmony_core.config.yaml_source import Path, dotted, parse_value, plain_scalar
from harmony_core.errors import nearest

MAX_DEPTH = 6
"""How deep parameters are listed; deeper ones are reached with `--set`. Recursive models end here at the latest."""

Node = dict[str, Any]

_NAMES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "null": "null"}
_KINDS: dict[type, str] = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}
_NULLS = ("null", "~", "None")
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


class UnknownKey(Exception):
    """A name that the schema does not have at this place."""

    def __init__(self, parent: Path, name: str, options: set[str]) -> None:
        self.parent = parent
        self.name = name
        self.options = sorted(options)
        self.suggestions = tuple(nearest(name, self.options, 2))
        super().__init__(dotted((*parent, name)))


@dataclass(frozen=True)
class Parameter:
    """One settable place: a leaf, or a whole block, list or map."""

    path: tuple[str, ...]
    type: str
    """For people: `int`, `list[str]`, `grpo|dpo`."""
    description: str
    required: bool
    default: Any
    choices: tuple[Any, ...]
    bounds: str
    is_bool: bool
    is_tag: bool
    """A constant that only says which class this is."""
    variant: str
    """The branch of a union in which the parameter exists, or nothing."""


class Schema:
    """Wraps what `model_json_schema()` returns."""

    def __init__(self, schema: Node) -> None:
        self.root = schema
        self._definitions: dict[str, Node] = schema.get("$defs", {})

    def resolve_reference(self, node: Node) -> Node:
        """The node with `$ref` and a lone `allOf` replaced by what they mean; siblings such as `default` win."""
        while "$ref" in node:
            target = self._definitions[node["$ref"].rsplit("/", 1)[1]]
            node = {**target, **{k: v for k, v in node.items() if k != "$ref"}}
        if len(node.get("allOf", ())) == 1:
            inner = self.resolve_reference(node["allOf"][0])
            node = {**inner, **{k: v for k, v in node.items() if k != "allOf"}}
        return node

    def branches(self, node: Node) -> list[Node]:
        """Every alternative of a union, flattened; a node that is no union is its only branch."""
        node = self.resolve_reference(node)
        for key in ("anyOf", "oneOf"):
            if key in node:
                return [branch for option in node[key] for branch in self.branches(option)]
        return [node]

    def label(self, node: Node) -> str:
        """The type in words."""
        return "|".join(dict.fromkeys(self._branch_label(branch) for branch in self.branches(node)))

    def _branch_label(self, branch: Node) -> str:
        if "const" in branch:
            return str(branch["const"])
        if "enum" in branch:
            return "|".join(map(str, branch["enum"]))
        kind = branch.get("type")
        if kind == "array":
            return f"list[{self.label(branch.get('items') or {})}]"
        if kind == "object" and "properties" not in branch:
            values = branch.get("additionalProperties")
            return f"dict[str, {self.label(values if isinstance(values, dict) else {})}]"
        if kind == "string":
            return str(branch.get("format", "str"))
        return _NAMES.get(str(kind), str(branch.get("title", "any")))

    def parameters(self) -> Iterator[Parameter]:
        """Every place with a fixed name, in the order of declaration, blocks before their contents."""
        yield from self._parameters(self.root, (), "", frozenset(), {})

    def _parameters(
        self, node: Node, path: tuple[str, ...], variant: str, above: frozenset[str], defaults: Node
    ) -> Iterator[Parameter]:
        """`defaults` is what the field above gives the block as its default; it wins over the block's own."""
        node = self.resolve_reference(node)
        required = set(node.get("required", ()))
        for name, raw in node.get("properties", {}).items():
            branches = self.branches(raw)
            parameter = self._parameter(raw, branches, (*path, name), name in required, variant)
            yield replace(parameter, default=defaults[name]) if name in defaults else parameter
            blocks = [branch for branch in branches if "properties" in branch]
            for block in blocks:
                title = str(block.get("title", ""))
                if title in above or len(path) + 1 >= MAX_DEPTH:
                    continue
                inner = title if len(blocks) > 1 else variant
                given = parameter.default if len(blocks) == 1 and isinstance(parameter.default, dict) else {}
                yield from self._parameters(block, (*path, name), inner, above | {title}, given)

    def _parameter(
        self, raw: Node, branches: list[Node], path: tuple[str, ...], required: bool, variant: str
    ) -> Parameter:
        whole = self.resolve_reference(raw)
        choices = [c for b in branches for c in b.get("enum", [b["const"]] if "const" in b else [])]
        return Parameter(
            path=path,
            type=self.label(raw),
            description=str(whole.get("description", "")).strip(),
            required=required,
            default=raw.get("default"),
            choices=tuple(choices),
            bounds=bounds_of(branches),
            is_bool={b.get("type") for b in branches} == {"boolean"},
            is_tag=len(branches) == 1 and "const" in branches[0],
            variant=variant,
        )

    def step(self, nodes: list[Node], name: str, parent: Path) -> tuple[str | int, list[Node]]:
        """From what may stand at `parent` to what may stand at `name` below it; kebab-case is folded for fields.

        Raises UnknownKey.
        """
        branches = [branch for node in nodes for branch in self.branches(node)]
        folded = name.replace("-", "_")
        if any(folded in branch.get("properties", {}) for branch in branches):
            name = folded
        found: list[Node] = []
        known: set[str] = set()
        key: str | int = name
        for branch in branches:
            if branch.get("type") == "array":
                if name.isdecimal() and len(name) < 7:
                    key = int(name)
                    found.append(branch.get("items") or {})
                continue
            properties = branch.get("properties", {})
            known |= set(properties)
            extra = branch.get("additionalProperties")
            if name in properties:
                found.append(properties[name])
            elif isinstance(extra, dict) or extra is True or is_open(branch):
                found.append(extra if isinstance(extra, dict) else {})
        if not found:
            raise UnknownKey(parent, name, known)
        return key, found

    def follow(self, names: list[str]) -> tuple[Path, list[Node]]:
        """A dotted name, split, to its path and the branches of what may stand there. Raises UnknownKey."""
        path: Path = ()
        nodes = [self.root]
        for name in names:
            key, nodes = self.step(nodes, name, path)
            path = (*path, key)
        return path, [branch for node in nodes for branch in self.branches(node)]

    def narrowed(self, node: Node, value: dict[str, Any]) -> list[Node]:
        """The branches that a map may be meant as: of a tagged union, only the one that its tag names."""
        whole = self.resolve_reference(node)
        tagged = whole.get("discriminator")
        if tagged:
            tag = value.get(tagged["propertyName"])
            if tag is None:  # missing or misspelt: any of them
                return self.branches(node)
            target = tagged.get("mapping", {}).get(tag) if isinstance(tag, str) else None
            return self.branches({"$ref": target}) if target else []
        options = whole.get("anyOf") or whole.get("oneOf")
        return [branch for option in options for branch in self.narrowed(option, value)] if options else [whole]


def bounds_of(branches: list[Node]) -> str:
    """The allowed range in words, or nothing."""
    found = [(sign, branch[key]) for branch in branches for key, sign in _BOUNDS.items() if key in branch]
    return ", ".join(f"{sign} {value:g}" if isinstance(value, float) else f"{sign} {value}" for sign, value in found)


def is_open(branch: Node) -> bool:
    """Whether a branch says nothing about what stands below it."""
    if "properties" in branch or "enum" in branch or "const" in branch:
        return False
    return (branch.get("type") == "object" and "additionalProperties" not in branch) or "type" not in branch


def kinds_of(branches: list[Node]) -> set[str]:
    """JSON types that may stand here; `any` where a branch does not say."""
    found: set[str] = set()
    for branch in branches:
        if "type" in branch:
            found.add(branch["type"])
        elif "const" in branch or "enum" in branch:
            found |= {_KINDS[type(choice)] for choice in branch.get("enum", [branch.get("const")])}
        else:
            found.add("any")
    return found


def from_text(text: str, branches: list[Node], schema: Schema) -> Any:
    """The value that `text` means for these branches.

    Where only text fits, it is taken as typed: `on` and `007` stay text. Everything else is read as YAML; text that
    fits nothing else is text where text is allowed; a list may be written with commas. Raises ValueError.
    """
    kinds = kinds_of(branches)
    if text in _NULLS and "null" in kinds:
        return None
    if kinds <= {"string", "null"}:
        return text
    value = _as_yaml(text, "string" in kinds)
    kind = _KINDS[type(value)]
    if kind in kinds or "any" in kinds or (kind == "integer" and "number" in kinds):
        return value
    if "string" in kinds:
        return text
    if "array" in kinds and kind not in ("object", "array"):
        items = [branch.get("items") or {} for branch in branches if branch.get("type") == "array"]
        inner = [branch for item in items for branch in schema.branches(item)]
        return [from_text(part.strip(), inner, schema) for part in text.split(",")] if text.strip() else []
    return value


def _as_yaml(text: str, text_allowed: bool) -> Any:
    if not text.lstrip().startswith(("{", "[", '"', "'")) and "\n" not in text:
        # A colon or a leading @ in plain text is no syntax here.
        return plain_scalar(text.strip())
    try:
        return parse_value(text)
    except ValueError:
        if text_allowed:
            return text
        raise
