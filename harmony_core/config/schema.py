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
        while "$ref" in node or len(node.get("allOf", ())) == 1:
            name = "$ref" if "$ref" in node else "allOf"
            target = self._definitions[node[name].rsplit("/", 1)[1]] if name == "$ref" else node[name][0]
            node = {**target, **{k: v for k, v in node.items() if k != name}}
        return node

    def branches(self, node: Node) -> list[Node]:
        """Every alternative of a union, flattened; a node that is no union is its only branch."""
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
        return Parameter(
            path=path,
            type=self.label(raw),
            description=str(whole.get("description", "")).strip(),
            required=required,
            default=raw.get("default"),
            choices=tuple(choice for branch in branches for choice in choices_of(branch)),
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
        if tagged := whole.get("discriminator"):
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


def choices_of(branch: Node) -> list[Any]:
    """The values that a branch allows, where it lists them."""
    return [branch["const"]] if "const" in branch else branch.get("enum", [])


def is_open(branch: Node) -> bool:
    """Whether a branch allows anything below it."""
    free = "type" not in branch or (branch["type"] == "object" and "additionalProperties" not in branch)
    return free and not branch.keys() & {"properties", "enum", "const"}


def kinds_of(branches: list[Node]) -> set[str]:
    """JSON types that may stand here; `any` where a branch does not say."""
    listed = {branch["type"] for branch in branches if "type" in branch}
    others = [choices_of(branch) for branch in branches if "type" not in branch]
    return (
        listed | {_KINDS[type(choice)] for choices in others for choice in choices} | {"any" for c in others if not c}
    )


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
        lists = [branch for branch in branches if branch.get("type") == "array"]
        inner = [below for branch in lists for below in schema.branches(branch.get("items") or {})]
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
