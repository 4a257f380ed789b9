"""A recipe's JSON schema: its parameters, the types allowed at a dotted name, and how a text is read there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from harmony_core.config.yaml_source import Path, dotted, parse_value, plain_scalar
from harmony_core.errors import nearest

MAX_DEPTH = 6
"""The depth to which parameters are listed; set deeper ones with `--set`. Recursive models end here at the latest."""

Node = dict[str, Any]

_NAMES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "null": "null"}
_TYPES: dict[type, str] = {
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
    """The type in words: `int`, `list[str]`, `grpo|dpo`."""
    description: str
    required: bool
    default: Any
    choices: tuple[Any, ...]
    bounds: str
    is_bool: bool
    is_tag: bool
    """A constant that only identifies the class."""
    variant: str
    """The branch of a union to which the parameter belongs; "" outside of unions."""


class Schema:
    """Wraps the result of `model_json_schema()`."""

    def __init__(self, schema: Node) -> None:
        self.root = schema
        self._definitions: dict[str, Node] = schema.get("$defs", {})

    def resolve_reference(self, node: Node) -> Node:
        """The node with `$ref` and a single `allOf` resolved; siblings such as `default` win."""
        while "$ref" in node or len(node.get("allOf", ())) == 1:
            name = "$ref" if "$ref" in node else "allOf"
            target = self._definitions[node[name].rsplit("/", 1)[1]] if name == "$ref" else node[name][0]
            node = {**target, **{k: v for k, v in node.items() if k != name}}
        return node

    def branches(self, node: Node) -> list[Node]:
        """Every alternative of a union, flattened; any other node is its own only branch."""
        node = self.resolve_reference(node)
        options = node.get("anyOf") or node.get("oneOf")
        return [branch for option in options for branch in self.branches(option)] if options else [node]

    def label(self, node: Node) -> str:
        """The type in words."""
        return "|".join(dict.fromkeys(self._branch_label(branch) for branch in self.branches(node)))

    def _branch_label(self, branch: Node) -> str:
        kind = branch.get("type")
        if choices := choices_of(branch):
            return "|".join(map(str, choices))
        if kind == "array":
            return f"list[{self.label(branch.get('items') or {})}]"
        if kind == "object" and "properties" not in branch:
            values = branch.get("additionalProperties")
            return f"dict[str, {self.label(values if isinstance(values, dict) else {})}]"
        name = branch.get("format", "str") if kind == "string" else _NAMES.get(str(kind), branch.get("title", "any"))
        return str(name)

    def parameters(self) -> Iterator[Parameter]:
        """Every place with a fixed name, in the order of declaration, blocks before their contents."""
        yield from self._parameters(self.root, (), "", frozenset(), {})

    def _parameters(
        self, node: Node, path: tuple[str, ...], variant: str, above: frozenset[str], defaults: Node
    ) -> Iterator[Parameter]:
        """`defaults` holds the default of the field above; it overrides the block's own defaults."""
        node = self.resolve_reference(node)
        required = set(node.get("required", ()))
        for name, raw in node.get("properties", {}).items():
            branches = self.branches(raw)
            default = raw.get("default")
            yield Parameter(
                path=(*path, name),
                type=self.label(raw),
                description=str(self.resolve_reference(raw).get("description", "")).strip(),
                required=name in required,
                default=defaults.get(name, default),
                choices=tuple(choice for branch in branches for choice in choices_of(branch)),
                bounds=bounds_of(branches),
                is_bool={branch.get("type") for branch in branches} == {"boolean"},
                is_tag=len(branches) == 1 and "const" in branches[0],
                variant=variant,
            )
            blocks = [branch for branch in branches if "properties" in branch]
            for block in blocks:
                title = str(block.get("title", ""))
                if title in above or len(path) + 1 >= MAX_DEPTH:
                    continue
                inner = title if len(blocks) > 1 else variant
                given = default if len(blocks) == 1 and isinstance(default, dict) else {}
                yield from self._parameters(block, (*path, name), inner, above | {title}, given)

    def step(self, nodes: list[Node], name: str, parent: Path) -> tuple[str | int, list[Node]]:
        """The key and the nodes allowed at `name` below the `nodes` of `parent`; kebab-case is folded for fields.

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
            properties, extra = branch.get("properties", {}), branch.get("additionalProperties")
            known |= set(properties)
            if branch.get("type") == "array":
                if name.isdecimal() and len(name) < 7:
                    key = int(name)
                    found.append(branch.get("items") or {})
            elif name in properties:
                found.append(properties[name])
            elif isinstance(extra, dict) or extra is True or is_open(branch):
                found.append(extra if isinstance(extra, dict) else {})
        if not found:
            raise UnknownKey(parent, name, known)
        return key, found

    def follow(self, names: list[str]) -> tuple[Path, list[Node]]:
        """A dotted name, split, to its path and the branches allowed there. Raises UnknownKey."""
        path: Path = ()
        nodes = [self.root]
        for name in names:
            key, nodes = self.step(nodes, name, path)
            path = (*path, key)
        return path, [branch for node in nodes for branch in self.branches(node)]

    def narrowed(self, node: Node, value: dict[str, Any]) -> list[Node]:
        """The branches that a map may belong to: of a tagged union, only the one that its tag names."""
        whole = self.resolve_reference(node)
        if tagged := whole.get("discriminator"):
            tag = value.get(tagged["propertyName"])
            if tag is None:  # missing or misspelt: any of them
                return self.branches(node)
            target = tagged.get("mapping", {}).get(tag) if isinstance(tag, str) else None
            return self.branches({"$ref": target}) if target else []
        options = whole.get("anyOf") or whole.get("oneOf")
        return [branch for option in options for branch in self.narrowed(option, value)] if options else [whole]


def bounds_of(branches: list[Node]) -> str:
    """The allowed range in words; "" without bounds."""
    found = [(sign, branch[key]) for branch in branches for key, sign in _BOUNDS.items() if key in branch]
    return ", ".join(f"{sign} {value:g}" if isinstance(value, float) else f"{sign} {value}" for sign, value in found)


def choices_of(branch: Node) -> list[Any]:
    """The values that a branch allows, if it lists them."""
    return [branch["const"]] if "const" in branch else branch.get("enum", [])


def is_open(branch: Node) -> bool:
    """Whether a branch allows anything below it."""
    free = "type" not in branch or (branch["type"] == "object" and "additionalProperties" not in branch)
    return free and not branch.keys() & {"properties", "enum", "const"}


def types_of(branches: list[Node]) -> set[str]:
    """JSON types that the branches allow; `any` for a branch without a type."""
    each = [{b["type"]} if "type" in b else {_TYPES[type(c)] for c in choices_of(b)} or {"any"} for b in branches]
    return set[str]().union(*each)


def from_text(text: str, branches: list[Node], schema: Schema) -> Any:
    """The value of `text` for these branches.

    If only text is allowed, the text stays as typed, such as `on` and `007`. Otherwise it is read as YAML, and as text
    if nothing else fits and text is allowed. A list may be written with commas. Raises ValueError.
    """
    allowed = types_of(branches)
    if text in _NULLS and "null" in allowed:
        return None
    value = text if allowed <= {"string", "null"} else _as_yaml(text, "string" in allowed)
    found = _TYPES[type(value)]
    if found in allowed or "any" in allowed or (found == "integer" and "number" in allowed):
        return value
    if "string" in allowed:
        return text
    if "array" in allowed and found not in ("object", "array"):
        lists = [branch for branch in branches if branch.get("type") == "array"]
        inner = [below for branch in lists for below in schema.branches(branch.get("items") or {})]
        return [from_text(part.strip(), inner, schema) for part in text.split(",")] if text.strip() else []
    return value


def _as_yaml(text: str, text_allowed: bool) -> Any:
    if not text.lstrip().startswith(("{", "[", '"', "'")) and "\n" not in text:
        # A colon or a leading @ is plain text here.
        return plain_scalar(text.strip())
    try:
        return parse_value(text)
    except ValueError:
        if text_allowed:
            return text
        raise
