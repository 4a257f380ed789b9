"""The command line as people use it, on real ranks: whole runs from the shell prompt to the result."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from leftovers import command_line, running, wait_until

ADAPTIVE = str(Path(sys.executable).with_name("adaptive"))
RECIPES = Path(__file__).parent / "recipes"
BUILTIN_BYTES = 4 * 324_000
"""Of the builtin model's weights."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def adaptive(
    home: Path, folder: Path, *words: str, code: int = 0, timeout: float = 240, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder` and check its exit code."""
    environment = {**os.environ, "ADAPTIVE_HOME": str(home), "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **variables}
    done = subprocess.run(
        [ADAPTIVE, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one object that `--json` prints."""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def events(home: Path, run: str, kind: str) -> list[dict[str, Any]]:
    lines = (home / "runs" / run / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["type"] == kind]


def test_a_recipe_for_the_documented_api_runs_unmodified(home: Path, tmp_path: Path) -> None:
    said = [[{"role": "user", "content": f"say {i}"}] for i in range(20)]
    data = [{"messages": turns, "completion": "ab" * (1 + i % 3)} for i, turns in enumerate(said)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, data)))
    (tmp_path / "cfg.yaml").write_text(
        "model_to_train: builtin:tiny-lm\njudge: builtin:tiny-lm\ndataset: ./data.jsonl  # beside this file\n"
    )
    recipe = str(RECIPES / "judged.py")
    done = result(adaptive(home, Path("/"), "run", recipe, "-c", str(tmp_path / "cfg.yaml"), "--steps", "4", "--json"))
    assert done["ok"] and done["result"]["answers"] == 16 and done["result"]["gain"] > 0
    assert [g["name"] for g in done["gates"]] == ["learned", "judge stays"]
    shown = result(adaptive(home, tmp_path, "models", "show", done["result"]["key"], "--json"))
    assert shown["model"]["ref"] == done["result"]["key"] == "judged@1"
    spawned = {e["data"]["model"]: e["data"] for e in events(home, done["run"], "spawn")}
    assert spawned["judge"]["shared_bytes"] == spawned["judge"]["parameter_bytes"]
    dry = adaptive(home, tmp_path, "run", recipe, "-c", "cfg.yaml", "--dry-run")
    assert "policy" in dry.stdout + dry.stderr and "judged.py:" in dry.stdout + dry.stderr


@pytest.mark.slow
def test_one_model_over_two_ranks_has_the_same_losses(home: Path, tmp_path: Path) -> None:
    common = ("run", "sft", "--samples-per-batch", "64", "--epochs", "0.12", "--adapter", "--json", "--save-as", "null")
    single = result(adaptive(home, tmp_path, *common))
    split = result(adaptive(home, tmp_path, *common, "--num-processes", "2", "--tp", "2"))
    curves = [[e["data"]["loss"] for e in events(home, done["run"], "optim_step")] for done in (single, split)]
    assert len(curves[0]) == 6 and curves[0] == pytest.approx(curves[1], abs=3e-4)
    held = [
        {e["rank"]: e["data"]["parameter_bytes"] for e in events(home, done["run"], "spawn")}
        for done in (single, split)
    ]
    assert set(held[1]) == {0, 1} and max(held[1].values()) <= 0.55 * held[0][0]


def test_a_refused_spawn_keeps_its_code_and_names_ways_out(home: Path, tmp_path: Path) -> None:
    words = ("run", "sft", "--memory", "12MiB", "--max-batch-size", "100000")
    done = adaptive(home, tmp_path, *words, code=4)
    assert "does not fit" in done.stderr and "what fits: " in done.stderr and "Traceback" not in done.stderr
    failed = result(adaptive(home, tmp_path, *words, "--json", code=4))
    assert failed["exit"] == 4 and failed["errors"][0]["code"] == "memory_refused"


@pytest.mark.parametrize("victim", ["rank-1", pytest.param("launcher", marks=pytest.mark.slow)])
def test_a_killed_part_ends_the_run_with_its_reason(home: Path, tmp_path: Path, victim: str) -> None:
    marker = f"{os.getpid()}-{victim}"
    environment = {**os.environ, "ADAPTIVE_HOME": str(home), "OMP_NUM_THREADS": "1", "E2E": marker}
    words = [ADAPTIVE, "run", "sft", "--num-processes", "2", "--tp", "2", "--epochs", "1000"]
    with (tmp_path / "stderr").open("w") as stderr:
        run = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        assert wait_until(lambda: "step 2 " in (tmp_path / "stderr").read_text(), 120), "no training step"
        started = re.search(r"^run (\S+)$", (tmp_path / "stderr").read_text(), re.MULTILINE)
        assert started, "it does not say which run it is"
        held = {event["rank"]: event["data"]["parameter_bytes"] for event in events(home, started[1], "spawn")}
        assert set(held) == {0, 1} and max(held.values()) < 0.55 * BUILTIN_BYTES
        parts = {command_line(pid): pid for pid in running("E2E", marker)}
        found = [p for line, p in parts.items() if ("accelerate" in line) == (victim == "launcher") and p != run.pid]
        os.kill(sorted(found)[-1], signal.SIGKILL)
        assert run.wait(timeout=15) == 5
        text = (tmp_path / "stderr").read_text()
        assert "SIGKILL" in text and "Traceback" not in text
        assert wait_until(lambda: not running("E2E", marker), 5), running("E2E", marker)
    finally:
        run.kill()
        run.wait()


NOTEBOOK = """
import harmony_core, asyncio
from adaptive_harmony import StringThread, get_client
client = await get_client(num_gpus=1)
model = await client.model("builtin:tiny-lm", kv_cache_len=2048).spawn_train("policy", 512)
threads = [StringThread([("user", f"say {i}"), ("assistant", "ab")]) for i in range(8)]
await asyncio.gather(*(model.train_language_modelling(t) for t in threads))
metrics = await model.optim_step(1e-3, 0.0, 1.0)
answer = await model.generate(StringThread([("user", "hi")]))
await client.aclose()
print("steps", int(metrics["step"]), "turns", len(answer.get_turns()))
"""


EXTRACTION = """
from typing import Literal
from pydantic import BaseModel, Field
from adaptive_harmony import StringThread, get_client

class Ticket(BaseModel):
    kind: Literal["bug", "question"] = Field(description="what the user writes about")
    urgent: bool = Field(description="whether it cannot wait")

client = await get_client(num_gpus=1)
model = await client.model("builtin:tiny-lm", kv_cache_len=2048, tokens_to_generate=400).spawn_inference("reader")
thread = StringThread([("user", "It is on fire! Answer with JSON:\\n" + model.render_schema(Ticket))])
thread, ticket = await model.generate(thread, Ticket)
text, again = await model.generate_and_validate(StringThread([("user", "And this?")]), Ticket)
await client.aclose()
print(type(ticket).__name__, ticket.kind in ("bug", "question"), type(again.urgent).__name__, len(thread.get_turns()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "expected"), [(NOTEBOOK, "steps 1 turns 2"), (EXTRACTION, "Ticket True bool 2")])
def test_a_notebook_has_the_same_client(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cell: str, expected: str
) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("ADAPTIVE_HOME", str(home))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    nbclient.NotebookClient(notebook, timeout=720, kernel_name="python3").execute(cwd=str(tmp_path))
    printed = "".join(o.get("text", "") for o in notebook.cells[0].outputs)
    assert expected in printed
