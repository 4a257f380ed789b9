"""A process that answers what becomes of a case, and the table of what was tried."""

from __future__ import annotations

import compileall
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import small_gguf
import small_models
from dataset_table import as_arrow, as_parquet
from harmony_core.home import Home
from harmony_core.registry import Registry
from harmony_core.runs.checkpoints import CheckpointStore
from harmony_core.runs.resuming import RunCheckpoints
from harmony_core.runs.run import Run
from security.cases import SEED, Ask
from source_tree import FOLDERS, ROOT

HERE = Path(__file__).resolve().parent


def prepare(root: Path) -> None:
    """A home with a stopped run and the valid files that some hostile ones are made from."""
    home = Home.open(root / "home")
    Registry(home).resolve("builtin:tiny-lm")
    run = Run.create(home, "generate")
    run.note(recipe="generate", options={"num_processes": 1, "device": "cpu", "seed": 0})
    for name in ("models.json", "sources.json", "versions.json"):
        run.write_json(name, {})
    run.write_json("argv.json", ["run", "generate"])
    facts = {"ranks": 1, "device": "cpu", "seed": 0, "deterministic": False}
    stage = {"name": "SFT Training", "recipe_type": "SFT", "steps": {"policy": 3}, "completion_percentage": 0.5}
    checkpoints = RunCheckpoints(CheckpointStore(run.directory / "checkpoints"), facts, config={"prompt": "ab"})
    for _ in range(2):
        with checkpoints.store.write() as writing:
            small_models.write_safetensors(writing.models("policy") / "model.safetensors", {"a": (2, 2)})
            writing.commit(checkpoints.state(stage))
    run.finish("stopped", 75, {"models": [], "errors": []})
    tensors = load_file(small_models.write_model(root / "small") / "model.safetensors")
    small_gguf.write(root / "small.gguf", tensors)
    rows = [{"question": "ab", "answer": "ba", "at": 1}]
    (root / "rows.parquet").write_bytes(as_parquet(rows))
    (root / "rows.arrow").write_bytes(as_arrow(rows))
    for folder in FOLDERS:
        compileall.compile_dir(ROOT / folder, quiet=2)  # as an installed package is; half of a start's time
    (root / "watch").mkdir()
    shutil.copy(HERE / "watch.py", root / "watch" / "sitecustomize.py")


@pytest.fixture(scope="session")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Runs one case in a fork of a process that has the command line loaded."""
    root = tmp_path_factory.mktemp("hostile")
    prepare(root)
    path = os.pathsep.join(filter(None, [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH")]))
    paths = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "120"}
    fixed = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # torch sets where it caches code in the environment of whoever imports it, such as another test of this process.
    around = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHINDUCTOR_", "TRITON_"))}
    with subprocess.Popen(
        [sys.executable, HERE / "warm.py", root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=around | paths | fixed,
    ) as warm:
        assert warm.stdin is not None and warm.stdout is not None

        def ask(kind: str, number: int, **more: Any) -> dict[str, Any]:
            assert warm.stdin is not None and warm.stdout is not None
            warm.stdin.write(json.dumps({"kind": kind, "number": number, "seed": SEED} | more) + "\n")
            warm.stdin.flush()
            answer: dict[str, Any] = json.loads(warm.stdout.readline())
            return answer

        yield ask
        warm.stdin.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The rows of the table in docs/security.md, where this folder is what was asked for."""
    kinds: dict[str, list[float]] = {}
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for kind, *numbers in (value for name, value in report.user_properties if name == "tried"):
            kinds[kind] = [sum(pair) for pair in zip(kinds.get(kind, [0] * 4), numbers, strict=True)]
    if kinds:
        terminalreporter.write_line("| kind | cases | taken | wrong | seconds |\n| --- | ---: | ---: | ---: | ---: |")
    for kind, (cases, taken, wrong, seconds) in kinds.items():
        terminalreporter.write_line(f"| {kind} | {cases:,} | {taken:,} | {wrong} | {seconds:.0f} |")
