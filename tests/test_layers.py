"""Imports go one way. The table is the architecture: a new edge is a decision, made here."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from source_tree import Import, imports, imports_of, modules

EDGES: dict[str, str] = {
    "errors": "",
    "notifiers": "",
    "request_seeds": "",
    "returns": "errors",
    "plain_files": "errors",
    "grammar": "errors",
    "redaction": "plain_files",
    "model": "errors plain_files",
    "rpc": "errors grammar model",
    "confined": "errors plain_files rpc",
    "home": "errors plain_files",
    "recipe_file": "errors rpc",
    "memory": "errors model rpc",
    "text": "confined errors grammar model notifiers plain_files",
    "engine.kernels": "memory",
    "journal": "notifiers plain_files redaction text",
    "options": "errors",
    "registry": "confined errors home model plain_files rpc text",
    "tokenization": "text",
    "structured_output": "errors text",
    "data": "errors home plain_files registry text",
    "external": "errors journal redaction text",
    "engine.models": "engine.kernels errors memory model plain_files rpc",
    "loggers": "errors journal notifiers plain_files",
    "runs": "errors home journal memory model plain_files redaction rpc",
    "config": "data errors external journal model plain_files registry",
    "engine.inference": "engine.kernels engine.models errors grammar memory rpc",
    "engine.training": "engine.kernels engine.models errors recipe_file rpc",
    "engine": "confined engine.inference engine.models engine.training errors options plain_files rpc text",
    "graders": "config errors home loggers model plain_files recipe_file redaction registry rpc structured_output text",
    "artifacts": "data errors graders journal notifiers plain_files text",
    "launch": "config errors options plain_files redaction rpc",
    "environments": "errors graders loggers returns rpc text",
    "algorithms": "config data environments errors graders journal loggers notifiers request_seeds returns runs text",
    "client": "artifacts config errors external grammar home journal launch memory model notifiers "
    "options plain_files recipe_file registry request_seeds rpc structured_output text",
    "loss_checks": "client engine.training errors text",
    "recipe": "artifacts client config errors graders home journal launch memory notifiers options "
    "plain_files recipe_file registry rpc runs text",
    "adaptive_harmony": "algorithms artifacts client config data environments errors graders loggers model "
    "notifiers recipe returns structured_output text",
    "cli": "config errors graders home memory notifiers options plain_files recipe recipe_file "
    "redaction registry rpc runs text",
    "recipes": "adaptive_harmony",
}
"""What each part may import, lowest first: only parts that stand above it in this table."""


OWNERS: dict[str, tuple[str, ...]] = {
    "accelerate": (),  # it is run as a command
    "llguidance": ("harmony_core.grammar",),
    "huggingface_hub": ("harmony_core.engine", "harmony_core.registry.sources", "harmony_core.data.datasets"),
    "jinja2": ("harmony_core.text.chat_template", "harmony_core.runs.report.page"),
    "mlflow": (),  # imported by name, when its logger is made
    "peft": ("harmony_core.engine.models.adapters",),
    "rich": ("harmony_core.cli",),
    "torch": ("harmony_core.engine", "harmony_core.launch.start"),  # the latter becomes the launcher
    "transformers": ("harmony_core.engine",),
    "triton": ("harmony_core.engine.kernels",),
    "typer": ("harmony_core.cli",),
    "wandb": (),
}
"""Libraries that only these modules, or what is below them, import."""

REASONS = re.compile(
    r"\b(device|cpu|cuda|kernels?|optional|formats?|process|interface|documented path)\b|`(adaptive|python -m) ", re.I
)
"""Reasons to be a module with one importer: a device, an optional dependency, a format, a process or a command of its
own, the interface of a package, a documented path. The first line of the docstring has to have one of these words."""

MAX_LINES = 400
"""Of a file."""

MODULES = modules()


def part_of(module: str) -> str:
    """The part of the architecture that a module belongs to; "" for the package itself."""
    names = module.split(".")
    if names[0] in ("adaptive_harmony", "harmony_client"):
        return "adaptive_harmony"
    within_engine = ".".join(names[1:3])
    return within_engine if within_engine in EDGES else ".".join(names[1:2])


def within(module: str, owners: tuple[str, ...]) -> bool:
    return any(module == owner or module.startswith(owner + ".") for owner in owners)


def violations(module: str, found: list[Import]) -> list[str]:
    """What is wrong with a module's imports, one line each."""
    part, wrong = part_of(module), []
    allowed = {"", part, *EDGES.get(part, "").split()}
    for entry in found:
        top = entry.target.split(".")[0]
        place = f"{module}:{entry.line} imports {entry.target}"
        if top in OWNERS and not within(module, OWNERS[top]):
            wrong.append(f"{place}: {top} belongs to {', '.join(OWNERS[top]) or 'nobody'}")
        if part == "recipes" and top not in {*sys.stdlib_module_names, "adaptive_harmony", "pydantic"}:
            wrong.append(f"{place}: a recipe sees the standard library, pydantic and adaptive_harmony")
        # A type-only import costs nothing and binds nothing, but on the ranks it would still be a wrong thought.
        if entry.typing_only and not part.startswith("engine"):
            continue
        if entry.target in MODULES and part_of(entry.target) not in allowed:
            wrong.append(f"{place}: {part or 'the package'} may not know {part_of(entry.target)}")
    return wrong


def test_every_part_has_its_place() -> None:
    parts = {part_of(module) for module in MODULES} - {""}
    assert not parts - EDGES.keys(), "new parts: say in the table what they may import"
    assert not EDGES.keys() - parts, "parts of the table that no longer exist"


def test_the_table_goes_one_way() -> None:
    above: set[str] = set()
    for part, known in EDGES.items():
        assert set(known.split()) <= above, part
        above.add(part)


def test_imports_go_down() -> None:
    wrong = [line for module, file in MODULES.items() for line in violations(module, imports_of(module, file))]
    assert wrong == []


def test_an_edge_is_used() -> None:
    """What nothing needs is taken out of the table."""
    used = {
        (part_of(module), part_of(entry.target))
        for module, file in MODULES.items()
        for entry in imports_of(module, file)
        if entry.target in MODULES
    }
    assert [(part, known) for part in EDGES for known in EDGES[part].split() if (part, known) not in used] == []


def test_no_circle_within_a_part() -> None:
    """Of imports at the top of a module, the ones that run when it is imported."""
    edges = {module: sorted(top_level_targets(MODULES[module], module) - {module}) for module in MODULES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for below in edges[module]:
                visit(below, (*trail, module))
            done.add(module)

    for module in sorted(MODULES):
        visit(module, ())


def top_level_targets(file: Path, module: str) -> set[str]:
    """Modules named by unindented imports; a package only stands for itself, not for what it re-exports."""
    lines = file.read_text(encoding="utf-8").splitlines()
    found = [e.target for e in imports_of(module, file) if not e.typing_only and not lines[e.line - 1].startswith(" ")]
    packages = {name for name in found if any(other.startswith(name + ".") and other in MODULES for other in found)}
    return {name for name in found if name in MODULES} - packages


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("harmony_core.client.new", "from harmony_core.engine.models import adapters", "client may not know engine.mo"),
        ("harmony_core.engine.training.new", "import harmony_core.engine.inference.runner", "may not know engine.inf"),
        (
            "harmony_core.engine.inference.new",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from harmony_core.engine.training import trainer",
            "may not know engine.training",
        ),
        ("harmony_core.engine.worker", "def f():\n    from harmony_core.client import engine", "may not know client"),
        ("harmony_core.text.threads", "import torch", "torch belongs to harmony_core.engine"),
        ("harmony_core.engine.models.model", "import peft.tuners", "peft belongs to"),
        ("harmony_core.launch.launcher", "from accelerate.commands import launch", "accelerate belongs to nobody"),
        ("harmony_core.runs.run", "from rich import console", "rich belongs to harmony_core.cli"),
        ("harmony_core.recipes.new", "from harmony_core import errors", "a recipe sees"),
        ("harmony_core.cli.new", "from ..client import engine", "cli may not know client"),
        ("harmony_core.text.new", "from harmony_core.runs import run", "text may not know runs"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str, complaint: str) -> None:
    assert any(complaint in line for line in violations(module, list(imports(source, module))))


def with_one_importer() -> dict[str, set[str]]:
    """Modules with at most one importer, and that; without packages, recipes and documented aliases.

    An `__init__` that re-exports a module stands for all importers of the package.
    """
    importers: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, file in MODULES.items():
        for entry in imports_of(module, file):
            if entry.target != module and entry.target in importers:
                importers[entry.target].add(module)
    return {
        module: found
        for module, found in importers.items()
        if len(found) <= 1
        and module.rpartition(".")[0] not in found
        and MODULES[module].name != "__init__.py"
        and not module.startswith(("adaptive_harmony.", "harmony_client.", "harmony_core.recipes."))
    }


def test_a_module_has_two_importers_or_a_reason() -> None:
    """Its first line says why it stands alone, or the two would be longer than a file may be."""
    lacking = []
    for module, importers in with_one_importer().items():
        text = MODULES[module].read_text()
        first = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
        together = len(text.splitlines()) + sum(len(MODULES[name].read_text().splitlines()) for name in importers)
        if not REASONS.search(first) and (not importers or together <= MAX_LINES):
            lacking.append(module)
    assert lacking == [], "merge it with its importer, or give a reason in its first line"
