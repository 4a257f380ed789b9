"""`--resume`: which run is meant, with what it goes on, and what is refused before anything starts."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harmony_core.cli.app import with_resume

from harmony_core.errors import ConflictError, NotFoundError, UsageError
from harmony_core.home import Home
from harmony_core.options import RunOptions
from harmony_core.redaction import MASK
from harmony_core.runs.checkpoints import CheckpointStore
from harmony_core.runs.records import find_run
from harmony_core.runs.resuming import RunCheckpoints, find_resumable
from harmony_core.runs.run import Run

MODEL = '{"%s": {"ref": "m@1", "digest": "", "path": ""}}'
FACTS = {"ranks": 1, "device": "cpu", "seed": 0, "deterministic": False}
STAGE = {"name": "Training", "recipe_type": "SFT"}


def stopped(home: Home, recipe: str, status: str = "stopped", **state: Any) -> str:
    """A run of `recipe` that was stopped within a stage. Returns its id."""
    run = Run.create(home, "r")
    run.note(recipe=recipe, options={"num_processes": 1, "device": "cpu", "seed": 0})
    run.write_json("models.json", {})
    checkpoints = RunCheckpoints(CheckpointStore(run.directory / "checkpoints"), FACTS)
    with checkpoints.store.write() as writing:
        writing.commit(checkpoints.state(state.pop("data", STAGE)) | state)
    run.finish(status, 0 if status == "succeeded" else 75, {})
    return run.id


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("ADAPTIVE_HOME", str(tmp_path / "home"))
    return Home.open()


def test_the_word_behind_the_flag_is_a_run_where_it_can_be(home: Home) -> None:
    run = stopped(home, "sft")

    def told(line: str) -> str:
        return " ".join(with_resume(line.split()))

    assert told("run sft --resume") == "run sft --resume=newest"
    assert told("run sft --resume --lr 1") == "run sft --resume=newest --lr 1"
    assert told("run sft --resume abc --lr 1") == "run sft --resume=abc --lr 1"
    assert told("run --resume abc sft") == "run --resume=abc sft"
    assert told("run --resume sft") == "run --resume=newest sft"
    assert told("run --resume") == "run sft --resume=newest"
    assert told("run --resume --lr 1") == "run sft --resume=newest --lr 1"
    assert told(f"run --resume {run} --quiet") == f"run sft --resume={run} --quiet"
    assert told(f"run --resume={run}") == f"run sft --resume={run}"
    assert told("run sft -- --resume") == "run sft -- --resume"


def test_the_newest_run_that_can_be_resumed_is_found(home: Home) -> None:
    with pytest.raises(NotFoundError, match="no run can be resumed"):
        find_resumable(home, "newest")
    wanted = stopped(home, "sft")
    done = stopped(home, "sft", "succeeded", data=None)
    left_early = stopped(home, "grpo", "succeeded")
    without = Run.create(home, "r")
    without.note(recipe="sft")
    without.finish("failed", 1, {})
    assert find_resumable(home, "newest", "sft").id == wanted
    assert find_resumable(home, "newest", "grpo").id == left_early
    with pytest.raises(UsageError, match="nothing is left to do"):
        find_resumable(home, done, "sft")
    with pytest.raises(UsageError, match="no checkpoint"):
        find_resumable(home, without.id, "sft")
    with pytest.raises(UsageError, match="is of the recipe sft, not grpo"):
        find_resumable(home, wanted, "grpo")


def test_runs_say_whether_and_from_where_they_can_be_resumed(home: Home, adaptive: Any) -> None:
    finished = STAGE | {"name": "First", "steps": {"policy": 9}, "completion_percentage": 1.0}
    done = stopped(home, "sft", "succeeded", data=None, finished_stages=[finished])
    between = stopped(home, "sft", data=None, finished_stages=[finished])
    within = stopped(home, "sft", data=STAGE | {"steps": {"policy": 12, "value": None}, "completion_percentage": 0.4})
    found = {run["id"]: run["resume"] for run in adaptive("runs", "list", "--json").json["runs"]}
    told = {"checkpoint": "checkpoint-000001", "command": f"adaptive run --resume {within}"}
    assert found[done] is None
    assert found[within] == told | {"stage": "Training", "step": 12, "completion": 0.4}
    assert (found[between]["stage"], found[between]["step"], found[between]["completion"]) == ("First", 9, 1.0)
    lines = {line.split()[0]: line.split()[3] for line in adaptive("runs", "list").out.splitlines()}
    assert (lines[done], lines[between], lines["ID"]) == ("-", "yes", "RESUME")
    assert f"resume     adaptive run --resume {within}  (checkpoint-000001: Training, step 12)" in (
        adaptive("runs", "show", within).out
    )


def test_a_run_that_is_alive_is_refused(home: Home) -> None:
    run = Run.create(home, "r")
    run.note(recipe="sft")
    with CheckpointStore(run.directory / "checkpoints").write() as writing:
        writing.commit({"data": STAGE})
    with pytest.raises(UsageError, match="it is running"):
        find_resumable(home, run.id)
    with pytest.raises(ConflictError, match="is running"):
        Run.reopen(find_run(home, run.id))
    run.finish("stopped", 75, {})


@pytest.fixture
def resumable(adaptive: Any) -> Path:
    """The directory of a stopped run of hello.py."""
    home = Home.open(os.environ["ADAPTIVE_HOME"])
    config = {"model": "builtin:tiny-lm", "lr": 1e-5, "kind": "cosine", "seed": 3, "lora": {"r": 16, "alpha": 32.0}}
    run = stopped(home, f"{Path('hello.py').resolve()}:main", config=config)
    return find_run(home, run).directory


def test_another_configuration_is_refused_with_the_difference(adaptive: Any, resumable: Path) -> None:
    done = adaptive("run", "hello.py", "--resume", "--lr", "1e-3", "--lora.r", "8")
    assert done.code == 2
    assert "lr: 1e-05 -> 0.001" in done.err and "lora.r: 16 -> 8" in done.err and "--allow-change" in done.err
    assert json.loads((resumable / "run.json").read_text())["status"] == "stopped"
    assert adaptive("run", "--resume", "--num-processes", "2").errors[0].endswith("ranks: 1 -> 2")
    assert adaptive("run", "--resume", "--seed", "4").code == 2


def test_a_changed_recipe_is_refused(adaptive: Any, resumable: Path) -> None:
    state = json.loads((resumable / "run.json").read_text())
    (resumable / "run.json").write_text(json.dumps(state | {"recipe_sha256": "0" * 64}))
    done = adaptive("run", "--resume", "--dry-run")
    assert done.code == 2 and "hello.py has changed since" in done.err
    done = adaptive("run", "--resume", "--dry-run", "--allow-change")
    assert done.code == 0 and "changed: the recipe's file" in done.err


def test_a_damaged_checkpoint_is_told_of(adaptive: Any, resumable: Path) -> None:
    (resumable / "checkpoints" / "checkpoint-000001" / "state.json").write_text("{")
    done = adaptive("run", "--resume")
    assert done.code == 7 and "warning: checkpoint-000001 is damaged" in done.err and "is whole" in done.err


@pytest.mark.parametrize(
    ("text", "told"),
    [("[", "not JSON"), ('{"model": {"ref": 1}}', "another type"), (MODEL % "x.y", "'x.y', which checkpoint-000001")],
)
def test_a_damaged_record_of_the_models_is_named(adaptive: Any, resumable: Path, text: str, told: str) -> None:
    (resumable / "models.json").write_text(text)
    done = adaptive("run", "--resume")
    assert done.code == 7 and f"run {resumable.name}: models.json: " in done.errors[0] and told in done.errors[0]


def test_a_checkpoint_that_nobody_takes_is_an_error(adaptive: Any, resumable: Path) -> None:
    done = adaptive("run", "hello.py", "--resume")
    assert done.code == 2 and "no training class took it" in done.err
    events = [json.loads(line) for line in (resumable / "events.jsonl").read_text().splitlines()]
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert {"run.resume", "resumed"} <= {event["type"] for event in events}


def test_a_resumed_run_has_the_runners_values_that_it_was_started_with() -> None:
    started = RunOptions(
        num_processes=2, device="cpu", memory=1 << 30, seed=7, deterministic=True, compile=False, keep_checkpoints=5
    )
    kept = json.loads(json.dumps(started.kept()))
    assert RunOptions(timeout=5.0).resuming(kept) == replace(started, timeout=5.0)
    assert RunOptions(memory=2 << 30).resuming(kept).memory == 2 << 30
    found = RunOptions().resuming(kept | {"accelerate_config": "file.yaml"})
    assert (found.accelerate_config, found.num_processes) == (Path("file.yaml"), None)
    assert RunOptions().resuming({}) == RunOptions()


def test_the_flag_needs_a_run_to_change(adaptive: Any) -> None:
    assert adaptive("run", "hello.py", "--allow-change").code == 2
    assert adaptive("run", "hello.py", "--resume").code == 3


KEYED = """
from harmony_core.recipe.context import RecipeContext
from harmony_core.options import RunOptions
from harmony_core.recipe import InputConfig, recipe_main

class Config(InputConfig):
    api_key: str | None = None
    urls: list[str] = []
    hub: dict[str, str] = {}
    note: str = "as before"

@recipe_main
async def main(config: Config, ctx: RecipeContext):
    return [config.api_key, config.urls, config.hub, config.note]
"""


def test_secrets_that_were_masked_are_asked_for_by_name(adaptive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("keyed.py").write_text(KEYED)
    kept = {"api_key": MASK, "urls": ["a", f"x://{MASK}@h"], "hub": {"token": MASK, "user": "me"}, "note": "kept"}
    run = stopped(Home.open(), f"{Path('keyed.py').absolute()}:main", config=kept)
    monkeypatch.setenv("ADAPTIVE_CFG__API_KEY", "secret-anew")
    done = adaptive("run", "--resume", run, "--dry-run")
    assert done.code == 2
    assert done.errors == [f"run {run} does not keep secrets: it needs its urls, hub.token again"]
    assert "ADAPTIVE_CFG__URLS=... ADAPTIVE_CFG__HUB__TOKEN=..." in done.err
    given = ["--set", "hub.token=t", "--urls", "[a, x://pw@h]"]
    assert adaptive("run", "--resume", run, "--dry-run", *given).code == 0
    done = adaptive("run", "--resume", run, "--dry-run", *given, "--note", "other")
    assert done.code == 2 and "note" in done.errors[0] and "secret-anew" not in done.err
