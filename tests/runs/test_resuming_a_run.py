"""Runs that are killed, stopped and resumed from the command line end as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from harmony_core.config.parameters import shipped_data
from harmony_core.home import Home
from harmony_core.registry import Registry
from leftovers import running, wait_until
from test_end_to_end import ADAPTIVE, RECIPES, adaptive, events, result

RECIPE = str(RECIPES / "two_stages.py")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def ended(home: Path, run: str, reference: str) -> dict[str, Any]:
    """Digests of what was saved (weights, and the optimizer's state), and the last that was logged of each step."""
    folder = Registry(Home.open(home)).resolve(reference).path
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {f["path"]: f["sha256"] for f in manifest["files"] if f["path"].endswith(".safetensors")}
    metrics = events(home, run, "metrics")
    logged = {e["data"]["step"]: e["data"]["metrics"] | {"seconds": 0} for e in metrics}
    assert sorted(logged) == list(range(1, len(logged) + 1)), "no step is missing"
    return {"files": files, "metrics": logged}


@pytest.fixture(scope="module")
def calm(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run that nothing stops leaves."""
    words = ("run", RECIPE, "--save-as", "calm", "--keep-checkpoints", "0", "--json")
    done = result(adaptive(home, tmp_path_factory.mktemp("calm"), *words))
    assert not list((home / "runs" / done["run"] / "checkpoints").iterdir())
    found = ended(home, done["run"], done["result"])
    assert set(found["files"]) == {"model.safetensors", "optimizer.safetensors"}
    return found


def interrupted(home: Path, folder: Path, *words: str, at: str | float, by: int, code: int) -> str:
    """Run until stderr says `at`, or for so many seconds after the first step, and send a signal. Returns stderr."""
    marker = f"{os.getpid()}-{folder.name}-{at}"
    environment = {**os.environ, "ADAPTIVE_HOME": str(home), "OMP_NUM_THREADS": "1", "RESUMED": marker}
    with (folder / "stderr").open("w") as stderr:
        command = [ADAPTIVE, "run", *words]
        run = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        said = at if isinstance(at, str) else "goes on|step 2 "
        assert wait_until(lambda: bool(re.search(said, (folder / "stderr").read_text())), 120), "not so far"
        if isinstance(at, float):
            wait_until(lambda: run.poll() is not None, at)
        run.send_signal(by)
        assert run.wait(timeout=40) == code, (folder / "stderr").read_text()[-3000:]
        assert wait_until(lambda: not running("RESUMED", marker), 10), running("RESUMED", marker)
    finally:
        run.kill()
        run.wait()
    return (folder / "stderr").read_text()


def test_killed_stopped_and_resumed_a_run_ends_equal(home: Path, tmp_path: Path, calm: dict[str, Any]) -> None:
    begin = (RECIPE, "--pause", "0.1", "--save-as", "stopped")
    interrupted(home, tmp_path, *begin, at="step 6 ", by=signal.SIGKILL, code=-signal.SIGKILL)
    (run,) = (record.name for record in (home / "runs").iterdir() if "crashed" in shown(home, tmp_path, record.name))
    told = interrupted(home, tmp_path, "--resume", at="step 17 ", by=signal.SIGTERM, code=75)
    # How far it had come by the time the signal arrived depends on the machine.
    assert re.search(r"first goes on at \d+\.\d%, from checkpoint-00000[12]", told), told
    assert re.search(rf"to go on from checkpoint-00000\d, second at \d+\.\d%: adaptive run --resume {run}", told), told
    resume = result(adaptive(home, tmp_path, "runs", "show", run, "--json"))["run"]["resume"]
    assert resume["command"] == f"adaptive run --resume {run}" and resume["stage"] == "second" and resume["step"] > 16
    assert f"resume     {resume['command']}  ({resume['checkpoint']}: second, step" in shown(home, tmp_path, run)
    done = adaptive(home, tmp_path, "run", RECIPE, "--resume", "--json")
    assert "first had finished and is skipped" in done.stderr and "second goes on at" in done.stderr
    assert result(done)["resume"] is None
    assert ended(home, run, result(done)["result"]) == calm
    assert "checkpoints deleted" in done.stderr and not list((home / "runs" / run / "checkpoints").iterdir())
    refused = adaptive(home, tmp_path, "run", "--resume", run, code=2)
    assert "nothing is left to do" in refused.stderr


def shown(home: Path, folder: Path, run: str) -> str:
    return adaptive(home, folder, "runs", "show", run).stdout


def two_stages(folder: Path, *words: str) -> tuple[str, ...]:
    """The recipe, made small."""
    rows = shipped_data()["sort-letters-held-out"].read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(rows[:4]), encoding="utf-8")
    sizes = ("--prompts-per-batch", "2", "--completions-per-sample", "2", "--max-gen-len", "6", "--grpo-steps", "40")
    return ("sft_then_grpo", "--held-out", str(folder / "few.jsonl"), *sizes, *words)


def test_the_recipe_of_two_stages_goes_on_in_the_second(home: Path, tmp_path: Path) -> None:
    words = two_stages(tmp_path, "--sft-epochs", "0.1", "--save-as", "twice")
    told = interrupted(home, tmp_path, *words, at="step 8 ", by=signal.SIGHUP, code=75)
    assert re.search(r"to go on from checkpoint-0000\d\d, GRPO at ", told), told
    done = adaptive(home, tmp_path, "run", "sft_then_grpo", "--resume", "--json")
    assert "SFT had finished and is skipped" in done.stderr and "GRPO goes on at" in done.stderr
    found = result(done)
    assert [model["ref"] for model in found["models"]] == ["twice/sft@1", "twice/grpo@1"], "nothing is saved twice"
    assert len(ended(home, found["run"], "twice/grpo@1")["metrics"]) == 3 + 40
    assert {tuple(e["data"]["stages"]) for e in events(home, found["run"], "job.stages")} == {("SFT", "GRPO")}
    spawned = {e["data"]["model"] for e in events(home, found["run"], "spawn")}
    assert len(spawned) > 1, "the reference is a model of its own"


@pytest.mark.slow
def test_the_recipe_of_two_stages_stopped_in_both_ends_equal(home: Path, tmp_path: Path) -> None:
    words = two_stages(tmp_path, "--sft-epochs", "0.2", "--sft-samples-per-batch", "16", "--deterministic")
    calm = result(adaptive(home, tmp_path, "run", *words, "--save-as", "calmly", "--json"))
    first = interrupted(home, tmp_path, *words, "--save-as", "halting", at="step 9 ", by=signal.SIGTERM, code=75)
    assert re.search(r"to go on from checkpoint-00000\d, SFT at ", first), first
    second = interrupted(home, tmp_path, "--resume", at="step 45 ", by=signal.SIGTERM, code=75)
    assert "SFT goes on at" in second and re.search(r"to go on from checkpoint-0000\d\d, GRPO at ", second), second
    done = result(adaptive(home, tmp_path, "run", "--resume", "--json"))
    for stage in ("sft", "grpo"):
        assert ended(home, done["run"], f"halting/{stage}@1") == ended(home, calm["run"], f"calmly/{stage}@1")
    assert done["result"] == calm["result"]


@pytest.mark.slow
def test_a_run_that_was_not_saved_ends_with_143(home: Path, tmp_path: Path) -> None:
    words = (RECIPE, "--pause", "0.1", "--keep-checkpoints", "0")
    told = interrupted(home, tmp_path, *words, at="step 3 ", by=signal.SIGTERM, code=143)
    assert "--resume" not in told


KILLS = int(os.environ.get("ADAPTIVE_TEST_KILLS", "6"))


@pytest.mark.slow
@pytest.mark.timeout(120 + 30 * KILLS)
def test_kills_at_random_times(home: Path, tmp_path: Path) -> None:
    chance = random.Random(5)
    steps = ("--steps", str(3 * KILLS))
    done = result(adaptive(home, tmp_path, "run", RECIPE, *steps, "--save-as", "long", "--json"))
    calm = ended(home, done["run"], done["result"])
    words: tuple[str, ...] = (RECIPE, *steps, "--pause", "0.2", "--frequency", "0.01", "--save-as", "killed")
    before = {path.name for path in (home / "runs").iterdir()}
    for _ in range(KILLS):
        after = chance.random() * 0.5
        interrupted(home, tmp_path, *words, at=after, by=signal.SIGKILL, code=-signal.SIGKILL)
        (run,) = {path.name for path in (home / "runs").iterdir()} - before
        words = ("--resume", run)
    done = result(adaptive(home, tmp_path, "run", *words, "--json"))
    assert ended(home, run, done["result"]) == calm
