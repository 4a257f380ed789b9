"""Every row of the documented API works, is accepted without effect, or is refused with what to use instead.

`api_surface.json` lists the rows: by module, each with name, kind, signature, and whether it is async. A row works if
its name is importable under the documented path, takes the documented arguments, is async where that is documented, and
is used in a test. The other rows are in the tables of docs/compatibility.md.
"""

from __future__ import annotations

import ast
import asyncio
import fnmatch
import functools
import importlib
import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

import adaptive_harmony as api
from harmony_core.errors import HarmonyError
from source_tree import ROOT

TESTS = Path(__file__).parent
COMPATIBILITY = ROOT / "docs" / "compatibility.md"
LISTS = {"test_api_surface.py", "test_alias.py", "test_public_names.py", "test_layers.py"}
"""Tests that only list names."""


class Row(NamedTuple):
    """One documented name."""

    module: str
    name: str
    kind: str
    signature: str
    is_async: bool

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


def read_rows() -> list[Row]:
    stored = json.loads((TESTS / "api_surface.json").read_text(encoding="utf-8"))
    return [Row(module, *row) for module, rows in stored.items() for row in rows]


ROWS = read_rows()


def table(title: str) -> dict[str, str]:
    """Patterns of names in backticks in the first column under a heading, and what the second column says of them."""
    text = COMPATIBILITY.read_text(encoding="utf-8")
    section = re.split(r"^#+ ", text.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {pattern: cells[1].strip() for cells in lines for pattern in re.findall(r"`([\w.*]+)`", cells[0])}


ACCEPTED = table("Accepted without effect")
REFUSED = table("Refused")


def listed(row: Row, patterns: dict[str, str]) -> str | None:
    """The pattern that names a row: a name of the end of its path, `*` for any further names."""
    return next((p for p in patterns if fnmatch.fnmatchcase(f".{row.path}", f"*.{p}")), None)


def outcome(row: Row) -> str:
    return "refused" if listed(row, REFUSED) else "accepted" if listed(row, ACCEPTED) else "works"


def find(row: Row) -> Any:
    """The object of a row. Raises ImportError, AttributeError."""
    found: Any = importlib.import_module(row.module)
    for name in row.name.split(".") if row.name != "*" else ():
        owner, found = found, inspect.getattr_static(found, name, None)
        if found is None:
            found = _declared(owner, name) or getattr(owner, name)
    return found.__func__ if isinstance(found, classmethod | staticmethod) else found


def _declared(owner: Any, name: str) -> Any:
    """A field of a class that has no value on the class: annotated, or set in a method."""
    for cls in getattr(owner, "__mro__", ()):
        if name in inspect.get_annotations(cls) or name in getattr(cls, "model_fields", {}):
            return f"field {name}"
        if cls.__module__.startswith("harmony_core") and re.search(rf"self\.{name}\b.*=", inspect.getsource(cls)):
            return f"field {name}"
    return None


def documented_arguments(signature: str) -> list[str]:
    """Names of the documented arguments that may be given by position."""
    inside = signature[signature.index("(") + 1 : _closing(signature)]
    names = []
    for part in _split(inside):
        name = re.match(r"[*$]*\w*", part)
        assert name, signature
        if name[0].startswith("*"):
            break
        if name[0] not in ("self", "cls", "$self", "_internal", ""):
            names.append(name[0])
    return names


def _closing(text: str) -> int:
    depth = 0
    for place in range(text.index("("), len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    raise ValueError(text)


def _split(text: str) -> Iterator[str]:
    """Parts between commas that are in no bracket and in no quotes."""
    depth, start, quoted = 0, 0, ""
    for place, character in enumerate(text):
        if character in "'\"" and quoted in ("", character):
            quoted = "" if quoted else character
        elif not quoted:
            depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
            if character == "," and not depth:
                yield text[start:place].strip()
                start = place + 1
    yield text[start:].strip()


def taken_arguments(found: Any) -> tuple[list[str], list[str]]:
    """Names that may be given by position, and those of them that must be given."""
    parameters = [p for p in inspect.signature(found).parameters.values() if p.name not in ("self", "cls")]
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [p.name for p in by_position], [p.name for p in by_position if p.default is p.empty]


def problem_of_signature(row: Row, found: Any) -> str:
    if (
        "(" not in row.signature
        or row.signature == "(attribute)"
        or row.kind in ("property", "property-setter", "field", "constant-or-alias")
    ):
        return ""
    if not callable(found):
        return "" if row.kind == "class-constant" else "is not callable"
    documented = documented_arguments(row.signature)
    try:
        any_kind = {p.kind for p in inspect.signature(found).parameters.values()}
    except ValueError:  # of Python's own, such as an exception's `add_note`
        return ""
    taken, needed = taken_arguments(found)
    if inspect.Parameter.VAR_POSITIONAL in any_kind:
        return ""
    if inspect.isclass(found) and inspect.Parameter.VAR_KEYWORD in any_kind and not taken:
        return ""
    # The native signature leaves out what Python adds to it.
    native = row.kind == "native-only-member" and [name for name in taken if name in documented] == documented
    if taken[: len(documented)] != documented and not native:
        return f"takes {taken}, documented {documented}"
    if extra := [name for name in needed if name not in documented]:
        return f"needs {extra} as well"
    return ""


def is_awaitable(found: Any) -> bool:
    inner = inspect.unwrap(found)
    returned = str(getattr(inner, "__annotations__", {}).get("return", ""))
    return inspect.iscoroutinefunction(inner) or any(w in returned for w in ("Coroutine", "Queued", "Awaitable"))


@functools.cache
def used_names() -> set[str]:
    """Every name that a test uses: as a name, an attribute, a keyword, in an import, or to override a method."""
    found: set[str] = set()
    for file in TESTS.rglob("*.py"):
        if file.name in LISTS:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.keyword) and node.arg:
                found.add(node.arg)
            elif isinstance(node, ast.alias):
                found.update(node.name.split("."))
            elif isinstance(node, ast.ClassDef):  # what it overrides
                found.update(
                    child.name for child in node.body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                )
    return found


def problem(row: Row) -> str:
    """Why a row does not work; empty if it does."""
    try:
        found = find(row)
    except (ImportError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    if row.kind == "star-reexport":
        return ""
    if wrong := problem_of_signature(row, found):
        return wrong
    if row.is_async and not is_awaitable(found):
        return "is not async"
    *owners, name = row.name.split(".")
    # Special methods are used by their operators.
    looked_for = owners[-1] if name.startswith("__") else name
    return "" if looked_for in used_names() else "is used in no test"


@pytest.mark.parametrize("module", sorted({row.module for row in ROWS}))
def test_every_row_works_or_is_in_a_table(module: str) -> None:
    rows = [row for row in ROWS if row.module == module and outcome(row) == "works"]
    assert {row.name: why for row in rows if (why := problem(row))} == {}


@pytest.mark.parametrize("row", [row for row in ROWS if outcome(row) == "accepted"], ids=lambda row: row.path)
def test_what_has_no_effect_can_be_used(row: Row) -> None:
    assert problem(row) == ""


def refused_calls() -> dict[str, Callable[[], Any]]:
    """For each pattern of the table a call that it refuses."""
    builder: Any = object()
    live = SimpleNamespace(model=lambda *args, **kwargs: object.__new__(api.ModelBuilder))
    ctx: Any = SimpleNamespace(client=live)
    model, tokens = api.parameters.Model("m"), api.TokenizedThread([], [])
    thread = api.StringThread([("user", "q")])
    bare = object.__new__(api.InferenceModel)
    return {
        "ModelBuilder.with_draft": lambda: api.ModelBuilder.with_draft(builder, "draft"),
        "Model.with_draft": lambda: model.with_draft("draft").to_builder(ctx),
        "ModelBuilder.tools": lambda: api.ModelBuilder.tools(builder, ["uri"]),
        "Model.tools": lambda: model.tools(["uri"]).to_builder(ctx),
        "InferenceModel.thread_with_tools": lambda: bare.thread_with_tools(thread, ["uri"]),
        "TrainingModel.thread_with_tools": lambda: bare.thread_with_tools(thread, ["uri"]),
        "TokenizedThread.assistant": lambda: tokens.assistant([1]),
    }


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_is_refused_says_what_to_use_instead(pattern: str) -> None:
    rows = [row for row in ROWS if listed(row, {pattern: ""})]
    assert rows, "nothing has this name"
    if pattern in (calls := refused_calls()):
        call = calls[pattern]
    else:
        call = find(rows[0]._replace(name=rows[0].name.split(".")[0]))
    with pytest.raises(HarmonyError) as caught:
        returned = call()
        if inspect.iscoroutine(returned):
            asyncio.run(returned)
    told = f"{caught.value.message} {caught.value.hint}"
    instead = re.findall(r"`([^`]+)`", REFUSED[pattern].split(" (a `Model`")[0])
    assert caught.value.hint and [code for code in instead if code not in told] == []


def test_every_pattern_of_the_tables_names_something() -> None:
    assert [p for p in (*ACCEPTED, *REFUSED) if not any(listed(row, {p: ""}) for row in ROWS)] == []


def test_the_counts_are_those_of_the_page() -> None:
    counts = Counter(outcome(row) for row in ROWS)
    text = " ".join(COMPATIBILITY.read_text(encoding="utf-8").split())
    told = "{} of them: {} work, {} are accepted without effect, {} are refused"
    assert told.format(len(ROWS), counts["works"], counts["accepted"], counts["refused"]) in text
