"""Imports go down only. The table is the architecture: a new edge is a decision, made here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from source_tree import Import, imports, imports_of, modules

PLAIN = frozenset(
    (
        *("chat_template", "checkpoint_files", "checkpoints", "dataset_kinds", "dataset_lines", "datasets", "errors"),
        *("fragments", "frames", "home"),
        *("inline_metadata", "interruption", "ledger", "logging_table", "mapping", "memory", "messages", "model_kinds"),
        *("journal", "model_families", "model_spec", "notifiers", "outcome", "parameters", "recipe_file", "redaction"),
        *("registry", "report", "rl_utils", "rpc", "run"),
        *("schedulers", "thread_tools", "threads", "token_threads", "tokenization", "tokenizer_files"),
        *("toolchain", "turns", "weight_files"),
    )
)
"""Plain data: no models, no ranks. These may import each other, without cycles."""

ABOVE: dict[str, set[str]] = {
    "adaptive_harmony": {"algorithms", "client", "context", "graders", "loggers", "recipe"},
    "algorithms": {"graders", "loggers"},
    "cli": {"config", "doctor", "execution", "recipe"},
    "client": {"launch"},
    "config": set(),
    "context": {"client"},
    "doctor": set(),
    "execution": {"client", "context", "recipe"},
    "graders": set(),
    "launch": {"config"},
    "loggers": set(),
    "loss_checks": {"client", "engine.training"},
    "recipe": {"context"},
}
"""What each part of the driver may import beside plain data."""

RANK: dict[str, set[str]] = {
    "engine": {"engine.inference", "engine.models", "engine.training", "errors", "model_spec", "rpc", "toolchain"},
    "engine.inference": {"engine.kernels", "engine.models", "errors", "rpc"},
    "engine.kernels": set(),
    "engine.models": {"engine.kernels", "errors", "rpc"},
    "engine.training": {"engine.kernels", "engine.models", "errors", "recipe_file", "rpc"},
}
"""The ranks' side: everything that it may import."""

OWNERS: dict[str, tuple[str, ...]] = {
    "accelerate": (),  # it is run as a command
    "huggingface_hub": ("harmony_core.engine", "harmony_core.registry.import_hub"),
    "jinja2": ("harmony_core.chat_template",),
    "mlflow": (),  # imported by name, when its logger is made
    "peft": ("harmony_core.engine.models.adapters",),
    "rich": ("harmony_core.cli",),
    "torch": ("harmony_core.engine",),
    "transformers": ("harmony_core.engine",),
    "triton": ("harmony_core.engine.kernels",),
    "typer": ("harmony_core.cli",),
    "wandb": (),
}
"""Libraries that only these modules, or what is below them, import."""

MODULES = modules()


def part_of(module: str) -> str:
    """The part of the architecture that a module belongs to; "" for the package itself."""
    names = module.split(".")
    if names[0] == "adaptive_harmony":
        return names[0]
    if names[1:2] == ["engine"] and ".".join(names[1:3]) in RANK:
        return ".".join(names[1:3])
    return ".".join(names[1:2])


def allowed(part: str) -> frozenset[str]:
    """The parts that a part may import, itself and the package's root included."""
    if part in RANK:
        return frozenset({"", part, *RANK[part]})
    if part == "recipes":
        return frozenset({"recipes", "adaptive_harmony"})
    if part in ABOVE:
        return frozenset({"", part, *ABOVE[part]}) | PLAIN
    return PLAIN | {""}


def within(module: str, owners: tuple[str, ...]) -> bool:
    return any(module == owner or module.startswith(owner + ".") for owner in owners)


def violations(module: str, found: list[Import]) -> list[str]:
    """What is wrong with a module's imports, one line each."""
    part, wrong = part_of(module), []
    for entry in found:
        top = entry.target.split(".")[0]
        place = f"{module}:{entry.line} imports {entry.target}"
        if top in OWNERS and not within(module, OWNERS[top]):
            wrong.append(f"{place}: {top} belongs to {', '.join(OWNERS[top]) or 'nobody'}")
        if part == "recipes" and top not in {*sys.stdlib_module_names, "adaptive_harmony", "pydantic"}:
            wrong.append(f"{place}: a recipe sees the standard library, pydantic and adaptive_harmony")
        # A type-only import costs nothing and binds nothing, but between these it would still be a wrong thought.
        if entry.typing_only and part not in RANK:
            continue
        if entry.target in MODULES and part_of(entry.target) not in allowed(part):
            wrong.append(f"{place}: {part or 'the package'} may not know {part_of(entry.target)}")
    return wrong


def test_every_part_has_its_place() -> None:
    parts = {part_of(module) for module in MODULES} - {"", "recipes"}
    placed = PLAIN | ABOVE.keys() | RANK.keys()
    assert not parts - placed, "new parts: say in the table what they may import"
    assert not placed - parts, "parts of the table that no longer exist"


def test_imports_go_down() -> None:
    wrong = [line for module, file in MODULES.items() for line in violations(module, imports_of(module, file))]
    assert wrong == []


def test_nothing_imports_the_command_line() -> None:
    users = [
        module
        for module, file in MODULES.items()
        if part_of(module) != "cli"
        and any(within(entry.target, ("harmony_core.cli",)) for entry in imports_of(module, file))
    ]
    assert users == []


def test_plain_data_has_no_cycles() -> None:
    """Of imports at the top of a module, the ones that run when it is imported."""
    names = {module for module in MODULES if part_of(module) in PLAIN}
    edges = {module: sorted(top_level_targets(MODULES[module], module) & names - {module}) for module in names}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for below in edges[module]:
                visit(below, (*trail, module))
            done.add(module)

    for module in sorted(names):
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
        (
            "harmony_core.client.new",
            "from harmony_core.engine.models import adapters",
            "client may not know eng",
        ),
        ("harmony_core.engine.training.new", "import harmony_core.engine.inference.runner", "may not know engine.inf"),
        (
            "harmony_core.engine.inference.new",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from harmony_core.engine.training import trainer",
            "may not know engine.training",
        ),
        ("harmony_core.engine.host", "def f():\n    from harmony_core.client import engine", "may not know client"),
        ("harmony_core.threads", "import torch", "torch belongs to harmony_core.engine"),
        ("harmony_core.engine.models.model", "import peft.tuners", "peft belongs to"),
        ("harmony_core.launch.launcher", "from accelerate.commands import launch", "accelerate belongs to nobody"),
        ("harmony_core.run", "from rich import console", "rich belongs to harmony_core.cli"),
        ("harmony_core.recipes.new", "from harmony_core import errors", "a recipe sees"),
        ("harmony_core.cli.new", "from ..client import engine", "cli may not know client"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str, complaint: str) -> None:
    assert any(complaint in line for line in violations(module, list(imports(source, module))))
