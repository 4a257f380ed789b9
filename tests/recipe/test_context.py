from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import ValidationError

from harmony_core.client import EngineOptions, HarmonyClient, get_client
from harmony_core.errors import ModelRefused, UsageError
from harmony_core.home import Home
from harmony_core.loggers import get_prod_logger
from harmony_core.notifiers import StdoutJobNotifier
from harmony_core.recipe.context import RecipeConfig, RecipeContext
from harmony_core.recipe.runner import RecipeConfigCli
from harmony_core.registry import Registry
from harmony_core.runs.records import find_run, list_runs
from harmony_core.runs.run import Run
from harmony_core.text.threads import StringThread


def events(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.directory / "events.jsonl").read_text().splitlines()]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("ADAPTIVE_HOME", str(tmp_path / "home"))
    return Home.open()


@pytest.fixture
def ctx(home: Home, tmp_path: Path) -> Iterator[RecipeContext]:
    """A context over a planning client: no rank is started."""
    registry, run = Registry(home), Run.create(home)

    async def start() -> HarmonyClient:
        options = EngineOptions(log_dir=run.directory / "logs", run_id=run.id, num_processes=3, dry_run=True)
        return HarmonyClient.start(options, registry, run.events.write)

    job = StdoutJobNotifier("job-1", sink=lambda *report: None, events=run.events.write)
    yield RecipeContext.create(asyncio.run(start()), run, registry, tmp_path / "work", job)
    run.finish("succeeded", 0, {})


def test_it_is_not_constructed() -> None:
    with pytest.raises(TypeError, match=r"RecipeContext\.load"):
        RecipeContext()
    with pytest.raises(TypeError):
        RecipeContext(RecipeConfig())


def test_what_a_recipe_finds(ctx: RecipeContext, tmp_path: Path) -> None:
    assert ctx.world_size == 3
    assert ctx.control_plane is None
    assert ctx.checkpoint_restore_data is None
    assert ctx.config.job_id == ctx.job.job_id == "job-1"
    work = tmp_path / "work"
    assert ctx.working_dir == work
    assert ctx.recipes_dir == work / "job_job-1" / "recipes"
    assert ctx.artifacts_dir == work / "job_job-1" / "artifacts"
    assert ctx.datasets_dir == work / "datasets"
    assert all(d.is_dir() for d in (ctx.working_dir, ctx.recipes_dir, ctx.artifacts_dir, ctx.datasets_dir))


def test_folders_are_made_when_they_are_asked_for(ctx: RecipeContext, tmp_path: Path) -> None:
    assert not (tmp_path / "work").exists()
    assert ctx.datasets_dir.is_dir()


@pytest.mark.parametrize(
    ("value", "op", "threshold", "passed"),
    [
        (0.9, ">=", 0.9, True),
        (0.89, ">=", 0.9, False),
        (1, "<", 2, True),
        (2, "<", 2, False),
        (2, "<=", 2, True),
        (3, ">", 2, True),
        (2, "==", 2, True),
        (2, "!=", 2, False),
        (float("nan"), ">=", 0, False),
        (float("nan"), "!=", 0, False),
    ],
)
def test_gates(ctx: RecipeContext, value: float, op: Any, threshold: float, passed: bool) -> None:
    assert ctx.gate("accuracy", value, op, threshold) is passed
    (gate,) = ctx.gates
    assert (gate.name, gate.op, gate.threshold, gate.passed) == ("accuracy", op, threshold, passed)
    assert "accuracy" in str(gate)
    last = events(ctx.run)[-1]
    assert last["type"] == "gate"
    assert last["data"]["passed"] is passed
    json.dumps(last, allow_nan=False)


def test_a_comparison_that_is_none_is_refused(ctx: RecipeContext) -> None:
    with pytest.raises(UsageError, match="gate 'a'") as caught:
        ctx.gate("a", 1, cast(Any, "=>"), 1)
    assert ">=" in caught.value.hint
    assert not ctx.gates


def test_contexts_share_no_gates(ctx: RecipeContext, tmp_path: Path) -> None:
    other = RecipeContext.create(ctx.client, ctx.run, ctx.registry, tmp_path, ctx.job)
    other.gate("a", 1, "<", 0)
    assert ctx.gates == []


def test_metrics_reach_the_runs_events(ctx: RecipeContext, capsys: pytest.CaptureFixture[str]) -> None:
    get_prod_logger(ctx)({"loss": 0.5})
    last = events(ctx.run)[-1]
    assert (last["type"], last["data"]) == ("metrics", {"step": 1, "metrics": {"loss": 0.5}})
    assert "loss=0.5" in capsys.readouterr().err


def test_closing_a_context_of_the_command_line_leaves_its_run_open(ctx: RecipeContext) -> None:
    asyncio.run(ctx.aclose())
    ctx.run.events.write("still", {})
    assert [event["type"] for event in events(ctx.run)][-2:] == ["job.complete", "still"]


def test_configuration_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTIVE_NUM_GPUS", "2")
    monkeypatch.setenv("ADAPTIVE_PROJECT", "p")
    monkeypatch.setenv("ADAPTIVE_NAME", "")
    config = RecipeConfigCli()
    assert (config.num_gpus, config.project, config.name) == (2, "p", None)
    with pytest.raises(ValidationError, match="colour"):
        RecipeConfig(colour="red")  # type: ignore[call-arg]


def test_a_context_with_an_engine_of_its_own(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RecipeConfig(harmony_url="ws://far:1", num_gpus=1, name="notebook", working_dir=str(tmp_path / "w"))

    async def good() -> Run:
        async with RecipeContext.from_config(config) as ctx:
            model = await ctx.client.model("builtin:tiny-lm", kv_cache_len=128).spawn_inference("m")
            answer = await model.max_gen_len(3).generate(StringThread([("user", "hi")]))
            assert [turn.role for turn in answer.get_turns()] == ["user", "assistant"]
            assert ctx.working_dir == tmp_path / "w"
            return ctx.run

    run = asyncio.run(good())
    assert find_run(home, run.id).status == "succeeded"
    assert "the engine runs on this machine" in capsys.readouterr().err
    kinds = [event["type"] for event in events(run)]
    assert kinds.index("job.running") < kinds.index("job.complete") < kinds.index("run.end")


def test_a_failure_inside_ends_the_run_as_failed(home: Home) -> None:
    async def bad() -> None:
        async with RecipeContext.from_config(RecipeConfig(num_gpus=1)):
            raise ModelRefused("no")

    with pytest.raises(ModelRefused):
        asyncio.run(bad())
    (record,) = list_runs(home)
    assert (record.status, record.data["exit"]) == ("failed", 2)


def test_a_session_is_not_resumed_and_says_so(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTIVE_RESUME_CHECKPOINT_ARTIFACT_ID", "job-7")
    with pytest.raises(UsageError, match="'job-7': a session writes no checkpoints"):
        asyncio.run(RecipeContext.load())  # type: ignore[arg-type]
    assert list_runs(home) == []


@pytest.mark.parametrize(
    ("times", "told"),
    [
        ({"silence_timeout": 1}, r"silence_timeout: 1 \(allowed: 2 to 315360000 seconds\)"),
        ({"hang_timeout": -1}, "hang_timeout: -1"),
        ({"hang_timeout": 1e12}, "hang_timeout: 1000000000000"),
        ({"save_wait": math.nan}, "save_wait: nan"),
    ],
)
def test_the_deadlines_of_a_session_have_the_bounds_of_the_flags(home: Home, times: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        asyncio.run(get_client(**times))
    with pytest.raises(UsageError, match=told.partition(":")[0]):
        asyncio.run(RecipeContext.from_config(RecipeConfig(**times))._open())
    assert list_runs(home) == []


def test_load_is_awaited_and_closed(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTIVE_NUM_GPUS", "1")
    for name, seconds in {"HANG_TIMEOUT": "700", "SILENCE_TIMEOUT": "90", "SAVE_WAIT": "3"}.items():
        monkeypatch.setenv(f"ADAPTIVE_{name}", seconds)
    monkeypatch.setattr(sys, "argv", ["mine.py", "--silence-timeout", "80", "--steps", "3"])

    async def use() -> str:
        ctx = await RecipeContext.load()
        options = ctx.client._engine.options
        assert (ctx.world_size, options.hang_timeout, options.silence_timeout, options.save_wait) == (1, 700, 80, 3)
        await ctx.aclose()
        return ctx.run.id

    assert find_run(home, asyncio.run(use())).status == "succeeded"
