"""What the driver's side loads: never the heavy libraries, and for help hardly anything."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

HEAVY = ("accelerate", "peft", "torch", "transformers")
NOT_FOR_HELP = (*HEAVY, "asyncio", "jinja2", "msgspec", "numpy", "pydantic", "rich", "tokenizers", "yaml")

GROUPS = {
    "package": ("harmony_core",),
    "command line": tuple(
        f"harmony_core.cli.{name}" for name in ("app", "config", "doctor", "models", "recipes", "run", "runs")
    ),
    "config": ("harmony_core.config",),
    "registry": ("harmony_core.registry",),
    "memory": ("harmony_core.memory.plan",),
    "client": ("harmony_core.client", "harmony_core.client.spawning", "harmony_core.launch.supervisor"),
    "context": ("harmony_core.recipe.context",),
    "recipe": ("harmony_core.recipe", "harmony_core.recipe.execution"),
    "aliases": (
        *("adaptive_harmony", "adaptive_harmony.common", "adaptive_harmony.core.utils"),
        *("adaptive_harmony.metric_logger", "adaptive_harmony.parameters", "adaptive_harmony.runtime"),
    ),
    "tokenization": ("harmony_core.data.datasets", "harmony_core.text.tokenization"),
}

_IMPORT = """
import importlib, json, sys
for name in {modules!r}:
    importlib.import_module(name)
print(json.dumps(sorted({watched!r} & sys.modules.keys())))
"""

_COMMAND = """
import contextlib, io, json, sys
from importlib.metadata import entry_points
(script,) = entry_points(group="console_scripts", name="adaptive")
with contextlib.redirect_stdout(io.StringIO()):
    code = script.load()({words!r})
assert code == 0, code
print(json.dumps(sorted({watched!r} & sys.modules.keys())))
"""


def loaded(code: str, watched: Sequence[str], **values: object) -> list[str]:
    """Which of the watched packages a fresh interpreter has loaded after running the code."""
    # No site-wide imports of the tests' own: -P keeps the working directory out of the path.
    program = code.format(watched=set(watched), **values)
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("group", GROUPS)
def test_the_driver_loads_nothing_heavy(group: str) -> None:
    assert loaded(_IMPORT, HEAVY, modules=GROUPS[group]) == []


def test_the_package_itself_loads_next_to_nothing() -> None:
    assert loaded(_IMPORT, (*NOT_FOR_HELP, "typer"), modules=("harmony_core", "harmony_core.cli")) == []


def test_a_heavy_import_would_be_seen() -> None:
    assert "torch" in loaded(_IMPORT, HEAVY, modules=("harmony_core.engine.training.packing",))


@pytest.mark.parametrize("words", [["--help"], ["--version"]], ids=" ".join)
def test_help_loads_nothing_but_typer(words: list[str]) -> None:
    assert loaded(_COMMAND, NOT_FOR_HELP, words=words) == []


@pytest.mark.parametrize(
    "words",
    [
        ["models", "list"],
        ["models", "show", "builtin:tiny-lm"],
        ["recipes", "list"],
        ["run", "sft", "--help"],
        ["config", "show", "sft"],
        ["run", "sft", "--dry-run", "--device", "cpu", "--quiet"],
    ],
    ids=" ".join,
)
def test_checking_and_planning_load_nothing_heavy(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTIVE_HOME", str(tmp_path))
    assert loaded(_COMMAND, HEAVY, words=words) == []
