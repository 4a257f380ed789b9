"""Every way in which a recipe can end, without ranks: a dry run has the same path up to the first spawn."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from harmony_core.errors import MemoryRefused, NotFoundError
from harmony_core.home import Home
from harmony_core.options import EngineOptions, RunOptions
from harmony_core.recipe import load_recipe
from harmony_core.recipe.execution import execute
from harmony_core.registry import Registry
from harmony_core.runs.interruption import Interruption
from harmony_core.runs.run import Outcome, Run, exit_code_of
from launch.test_supervisor import LAUNCHER, RANK

HEAD = """\
import asyncio, sys, time
from pydantic import BaseModel
from harmony_core.recipe.context import RecipeContext
from harmony_core.errors import *
from harmony_core.recipe import InputConfig, recipe_main
from harmony_core.text.threads import StringThread
"""

Play = Callable[..., Outcome]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Run a recipe's body to its outcome."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    home = Home.open(tmp_path / "home")

    def run(body: str, timeout: float | None = None, wrapped: bool = True) -> Outcome:
        path = tmp_path / "recipe.py"
        main = "@recipe_main\n" if wrapped else ""
        path.write_text(f"{HEAD}\n{main}{body}\n")
        options = RunOptions(dry_run=True, device="cpu", timeout=timeout)
        with Run.opened(home, "test", []) as opened, Interruption(timeout) as stop:
            outcome = asyncio.run(execute(load_recipe(str(path)), None, options, opened, Registry(home), stop))
            opened.finish(outcome.status, outcome.exit_code, outcome.as_data(opened.id))
        # Whatever came of it can be printed as JSON that any parser takes.
        json.dumps(outcome.as_data(None), allow_nan=False)
        return outcome

    return run


def _lines(outcome: Outcome) -> list[str]:
    return [line for error in outcome.errors for line in error["lines"]]


def test_the_result_is_what_main_returns(play: Play) -> None:
    assert play("async def main(ctx: RecipeContext):\n    return {'x': 1}").result == {"x": 1}
    assert play("def main(ctx: RecipeContext):\n    return 'plain function'").result == "plain function"
    file = play(
        "async def main(ctx: RecipeContext):\n"
        "    loaded = ctx.client._engine.options.recipe\n"
        "    return [str(loaded.path), loaded.sha256]"
    ).result
    assert Path(file[0]).name == "recipe.py" and len(file[1]) == 64  # ranks may import its losses
    assert play("async def main(ctx: RecipeContext): ...").exit_code == 0


def test_gates(play: Play) -> None:
    body = "async def main(ctx: RecipeContext):\n    ctx.gate('acc', {}, '>=', 0.75)\n    return 1"
    assert play(body.format("0.8")).exit_code == 0
    failed = play(body.format("0.7"))
    assert (failed.exit_code, failed.result, failed.gates[0]["passed"]) == (8, 1, False)
    assert failed.as_data("id")["code"] == "gate_failed"
    assert play(body.format("float('nan')")).exit_code == 8


@pytest.mark.parametrize(
    ("last", "failed"), [("return 1", False), ("ctx.gate('g', 0, '>', 1)", False), ("raise ValueError", True)]
)
def test_what_is_to_end_with_the_run_is_told_how(
    last: str, failed: bool, play: Play, capsys: pytest.CaptureFixture[str]
) -> None:
    play(f"async def main(ctx: RecipeContext):\n    ctx.at_end(lambda f: print('failed', f))\n    {last}")
    assert f"failed {failed}" in capsys.readouterr().out


def test_the_recipes_own_frames_come_first(play: Play) -> None:
    body = (
        "async def main(ctx: RecipeContext):\n"
        "    try:\n"
        "        await asyncio.gather(work(), asyncio.Event().wait())\n"
        "    except ZeroDivisionError as error:\n"
        "        raise ValueError('bad') from error\n\n"
        "async def work():\n"
        "    return 1 / 0\n"
    )
    outcome = play(body)
    lines = _lines(outcome)
    assert outcome.exit_code == 1
    assert lines[0] == "ValueError: bad"
    assert lines[1].endswith("recipe.py:13 in main")
    assert "caused by ZeroDivisionError: division by zero" in lines
    assert lines[-2].endswith("recipe.py:16 in work")
    assert lines[-1].strip() == "return 1 / 0"
    assert not any("execution.py" in line or "Traceback" in line for line in lines)


def test_frames_below_the_recipe_are_folded(play: Play) -> None:
    class_body = "async def main(ctx: RecipeContext):\n    import json\n    json.loads('{')"
    lines = _lines(play(class_body))
    assert lines[0].startswith("JSONDecodeError")
    assert lines[1].endswith("recipe.py:11 in main")
    assert lines[-1] == "  ... 3 frames below the recipe ..."


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        ("raise ValueError('x')", 1),
        ("raise MemoryRefused('no room', hint='tp=2')", 4),
        ("raise DataError('x')", 2),
        ("raise NotFoundError('x')", 3),
        ("raise RankDied('x')", 5),
        ("raise VerificationError('x')", 7),
        ("raise HarmonyError('x')", 1),
        ("raise ExceptionGroup('g', [RankDied('a'), ConflictError('b')])", 5),
        ("raise ExceptionGroup('g', [RankDied('a'), ExceptionGroup('h', [ValueError('b')])])", 1),
        ("raise BaseException('x')", 1),
        ("raise asyncio.CancelledError", 1),
        ("raise KeyboardInterrupt", 1),
        ("sys.exit(3)", 1),
        ("sys.exit('words')", 1),
        ("sys.exit()", 0),
        ("sys.exit(0)", 0),
        ("raise StopIteration", 1),
        ("raise GeneratorExit", 1),
        ("assert False", 1),
        ("undefined", 1),
        ("RecursionError.__new__(1)", 1),
    ],
)
def test_exit_codes(play: Play, statement: str, code: int) -> None:
    outcome = play(f"async def main(ctx: RecipeContext):\n    {statement}")
    assert outcome.exit_code == code
    assert outcome.errors if code else not outcome.errors


def test_our_errors_say_where_and_the_way_out(play: Play) -> None:
    body = "async def main(ctx: RecipeContext):\n    raise MemoryRefused('no room', hint='tp=2')"
    outcome = play(body)
    lines = _lines(outcome)
    assert (lines[0], lines[-1]) == ("no room", "hint: tp=2")
    assert lines[1].endswith("recipe.py:10 in main")
    assert outcome.errors[0]["code"] == "memory_refused"


@pytest.mark.parametrize(
    "body",
    [
        "async def main(ctx: RecipeContext):\n    asyncio.sleep(0)\n",
        "async def main(ctx: RecipeContext):\n    work()\nasync def work(): ...\n",
        "async def main(ctx: RecipeContext):\n    waiting = [work() for _ in range(2)]\n    del waiting\n"
        "async def work(): ...\n",
    ],
)
def test_a_forgotten_await_fails_the_run(play: Play, body: str) -> None:
    outcome = play(body)
    assert outcome.exit_code == 1
    assert "was never awaited, created at" in _lines(outcome)[0]
    assert "recipe.py:" in _lines(outcome)[0]


def test_a_task_whose_failure_nobody_saw_fails_the_run(play: Play) -> None:
    body = (
        "async def main(ctx: RecipeContext):\n    task = asyncio.create_task(work())\n    await asyncio.wait([task])\n"
        "    del task\nasync def work():\n    raise ValueError('unseen')\n"
    )
    outcome = play(body)
    assert outcome.exit_code == 1
    assert _lines(outcome)[0] == "ValueError: unseen"


def test_the_time_limit(play: Play) -> None:
    outcome = play("async def main(ctx: RecipeContext):\n    await asyncio.Event().wait()", timeout=0.1)
    assert (outcome.exit_code, outcome.status) == (124, "stopped")
    assert [error["code"] for error in outcome.errors] == ["run_timeout"]


def test_a_dry_run_ends_at_the_first_call_that_needs_a_rank(play: Play) -> None:
    body = (
        "async def main(ctx: RecipeContext):\n"
        "    model = await ctx.client.model('builtin:tiny-lm').spawn_inference('m')\n"
        "    await model.generate(StringThread([('user', 'hi')]))\n"
    )
    outcome = play(body)
    assert (outcome.exit_code, outcome.status) == (0, "planned")
    assert outcome.planned_until == "recipe.py:11"
    assert [spawn["name"] for spawn in outcome.plan] == ["m"]


ROWS = (
    "from harmony_core.algorithms import *\n"
    "from harmony_core.graders import BaseGrader\n"
    "rows = [('user', 'ab' * (60 if i % 5 == 0 else 2)) for i in range(40)]\n"
    "bad = [StringThread([('user', 'x')])] * {bad}\n"
    "train = [StringThread([row, ('assistant', 'abc')]) for row in rows] + bad\n"
    "grader = BaseGrader.from_function('s', lambda thread: 1.0)\n"
    "@recipe_main\n"
    "async def main(ctx: RecipeContext):\n"
    "    model = await ctx.client.model('builtin:tiny-lm').spawn_train('policy', 96)\n"
)


@pytest.mark.parametrize(
    ("run", "longest", "share"),
    [
        ("SFT(train, model)", 144, "8 of 40"),
        ("DPO([(a, b) for a, b in zip(train, train[1:] + train[:1])], model)", 144, "16 of 40"),
        ("GRPO([StringThread([row]) for row in rows], model, grader, epochs=1)", 139, "8 of 40"),
    ],
)
def test_a_dry_run_says_how_many_rows_are_too_long(play: Play, run: str, longest: int, share: str) -> None:
    outcome = play(f"{ROWS.format(bad=0)}    await {run}.run()\n", wrapped=False)
    assert (outcome.exit_code, outcome.status) == (0, "planned"), outcome.errors
    (rows,) = outcome.as_data(None)["rows"]
    assert f"{share} rows" in rows["text"] and rows["tokens"]["longest"] == longest
    assert rows["setting"] == "max_batch_size" and rows["keeps_99_percent"] == longest + (run[:4] == "GRPO")
    assert not rows["estimate"] and rows["refused"] == {}


def test_rows_that_will_be_refused_are_seen_before_training(play: Play) -> None:
    """In a dry run as in a real one: more than half of the first 200 train nothing."""
    few, many = (
        f"{ROWS.format(bad=n)}    await SFT([t.with_weight_assistant_turns_from_index(0) for t in train],"
        " model).run()\n"
        for n in (30, 50)
    )
    assert play(few, wrapped=False).exit_code == 0
    outcome = play(many, wrapped=False)
    assert outcome.exit_code == 2 and outcome.errors[0]["code"] == "too_many_failures"
    assert "50 of the first 90 rows failed, more than max_failure_rate=0.5" in outcome.errors[0]["message"]
    assert outcome.rows[0]["refused"] == {"nothing_to_train": 50}


def test_several_errors_count_as_the_lowest() -> None:
    outcome = Outcome()
    outcome.fail(MemoryRefused("a"))
    outcome.fail(NotFoundError("b"))
    assert outcome.exit_code == 3
    assert exit_code_of(ExceptionGroup("g", [MemoryRefused("a"), ValueError("b")])) == 1


# --- an engine that fails, over ranks without torch -----------------------------------------------------------------

FAILS = """
async def main(ctx: RecipeContext):
    import os, signal
    engine = ctx.client._engine
    await engine.ready()
    if {model}:
        engine.spawns["policy"] = None
    os.kill(engine._ranks[1].pid, signal.{sent})
    try:
        for _ in range({turns}):
            await asyncio.sleep(0.1)
        return "went on"
    finally:
        print("finally")
"""


def _on_fake_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, **options: Any) -> tuple[Outcome, Path]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(
        "harmony_core.recipe.execution.EngineOptions", partial(EngineOptions, command=RANK, launcher=LAUNCHER)
    )
    path, home = tmp_path / "recipe.py", Home.open(tmp_path / "home")
    path.write_text(f"{HEAD}\n@recipe_main\n{body}")
    chosen = RunOptions(device="cpu", num_processes=2, **options)
    with Run.opened(home, "test", []) as run, Interruption() as stop:
        outcome = asyncio.run(execute(load_recipe(str(path)), None, chosen, run, Registry(home), stop))
        run.finish(outcome.status, outcome.exit_code, outcome.as_data(run.id))
    return outcome, run.directory


@pytest.mark.parametrize(("sent", "code", "error"), [("SIGKILL", 5, "rank_died"), ("SIGSTOP", 124, "run_timeout")])
def test_a_recipe_with_a_model_is_cancelled_when_the_engine_has_failed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sent: str,
    code: int,
    error: str,
) -> None:
    body = FAILS.format(model=True, sent=sent, turns=600)
    outcome, directory = _on_fake_ranks(tmp_path, monkeypatch, body, fault_grace=0.3, silence_timeout=2.0)
    assert (outcome.exit_code, outcome.status, [e["code"] for e in outcome.errors]) == (code, "failed", [error])
    captured = capsys.readouterr()
    assert "finally" in captured.out
    told = [line for line in captured.err.splitlines() if line.startswith("the engine has failed: rank 1 (pid ")]
    assert len(told) == 1
    record = json.loads((directory / "run.json").read_text())
    assert (record["fault"]["error"], record["fault"]["rank"]) == (error, 1)
    events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    (failed,) = [event for event in events if event["type"] == "engine.failed"]
    assert failed["rank"] == 1 and failed["data"]["details"]["rank"] == 1 and failed["data"]["details"]["log"]


def test_a_recipe_without_a_model_goes_on_when_the_engine_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = FAILS.format(model=False, sent="SIGKILL", turns=20)
    outcome, directory = _on_fake_ranks(tmp_path, monkeypatch, body, fault_grace=0.0)
    assert (outcome.exit_code, outcome.result) == (0, "went on")
    assert "the engine has failed: rank 1" in capsys.readouterr().err
    assert json.loads((directory / "run.json").read_text())["fault"]["rank"] == 1
