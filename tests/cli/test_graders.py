"""`adaptive graders ...`, and graders in flags."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harmony_core.graders import score_or_refuse
from harmony_core.graders.reward_server import RewardServerGrader
from harmony_core.text.threads import StringThread

Adaptive = Any

MINE = """\
def reward(thread):
    answer = thread.completion()
    if answer == "b":
        raise ValueError("no b")
    return float(len(answer))
"""


def write(name: str, *answers: str) -> None:
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": a}]} for a in answers]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_grader_is_added_shown_tried_and_removed(adaptive: Adaptive) -> None:
    Path("mine.py").write_text(MINE)
    write("rows.jsonl", "a", "b", "ccc", "dddd")
    assert adaptive("graders", "add", "length", "mine.py:reward").out == "length\n"
    assert adaptive("graders", "add", "length", "mine.py").code == 6
    listed = adaptive("graders", "list", "--json").json["graders"]
    assert [one["key"] for one in listed][:2] == ["length", "builtin:exact_match"]
    shown = adaptive("graders", "show", "length")
    assert "function   reward" in shown.out and "def reward(thread):" in shown.out
    done = adaptive("graders", "test", "length", "--dataset", "rows.jsonl", "--limit", "3")
    assert done.code == 0 and "unscored" in done.out and "raised ValueError: no b" in done.out
    assert done.out.endswith("mean 2 of 2 scored, 1 unscored\n")
    found = adaptive("graders", "test", "length", "--dataset", "rows.jsonl", "--json").json
    assert [row["score"] for row in found["samples"]] == [1.0, None, 3.0, 4.0]
    assert found["samples"][1]["unscored"] == "grade_failed" and found["unscored"] == 1
    assert adaptive("graders", "rm", "length").code == 0
    gone = adaptive("graders", "test", "lenght", "--dataset", "rows.jsonl")
    assert gone.code == 3 and "there is no grader 'lenght'" in gone.err


def test_a_key_that_does_not_exist_is_found_before_anything_starts(adaptive: Adaptive) -> None:
    Path("mine.py").write_text(MINE)
    done = adaptive("run", "grpo", "--grader", "builtin:jsn", "--steps", "1")
    assert done.code == 3 and "builtin:json" in done.err
    done = adaptive("run", "grpo", "--grader", "mine.py:rewrad", "--dry-run")
    assert done.code == 3 and "reward" in done.err


def test_a_judge_file_tells_all_its_mistakes_and_no_flag_that_is_not_there(adaptive: Adaptive) -> None:
    Path("bad.yaml").write_text("type: Range\nmodel_keyy: x\nscore_range: [1, two]\n")
    added = adaptive("graders", "add", "bad", "bad.yaml")
    run = adaptive("run", "grpo", "--grader", "bad.yaml", "--dry-run")
    for done in (added, run):
        assert done.code == 2 and "bad.yaml:2:1: model_keyy: unknown key" in done.err and "score_range.1" in done.err
        assert "criteria: a value is required" in done.err and "give --" not in done.err
    Path("list.yaml").write_text("- 1\n")
    done = adaptive("graders", "add", "list", "list.yaml")
    assert done.code == 2 and "top level must be a map" in done.err and "required" not in done.err


def test_a_key_that_would_name_a_file_and_a_damaged_grader(adaptive: Adaptive) -> None:
    Path("mine.py").write_text(MINE)
    done = adaptive("graders", "add", "mine.py", "mine.py")
    assert done.code == 2 and "cannot be a grader key" in done.err
    done = adaptive("graders", "add", "Mine", "mine.py")
    assert done.code == 2 and "cannot be a grader key" in done.err
    assert adaptive("graders", "add", "mine", "mine.py").code == 0
    (copy,) = Path(os.environ["ADAPTIVE_HOME"]).glob("graders/mine/mine.py")
    copy.write_text(MINE + "#")
    done = adaptive("graders", "list")
    assert done.code == 7 and "adaptive graders rm mine" in done.err
    assert adaptive("graders", "rm", "mine").code == 0 and adaptive("graders", "list").code == 0


def test_a_set_of_graders_in_a_recipe(adaptive: Adaptive) -> None:
    Path("several.py").write_text(
        "from typing import Set\n"
        "from adaptive_harmony.parameters import Grader\n"
        "from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main\n"
        "class Config(InputConfig):\n"
        "    graders: Set[Grader]\n"
        "    others: list[Grader] = []\n"
        "@recipe_main\n"
        "async def main(config: Config, ctx: RecipeContext):\n"
        "    return sorted([(await g.load(ctx)).grader_key for g in [*config.graders, *config.others]])\n"
    )
    Path("mine.py").write_text(MINE)
    flags = ["--graders", '["builtin:json", "builtin:regex"]', "--others", '["mine.py:reward"]']
    done = adaptive("run", "several.py", *flags, "--quiet")
    assert done.code == 0 and json.loads(done.out) == ["json", "regex", "reward"]
    done = adaptive("run", "several.py", "--graders", '["builtin:json", "nope"]')
    assert done.code == 3 and "there is no grader 'nope'" in done.err


def test_an_evaluation_refuses_two_graders_of_one_name(adaptive: Adaptive) -> None:
    for name in ("mine.py", "other.py"):
        Path(name).write_text(MINE)
    done = adaptive("run", "evaluate", "--graders", "mine.py:reward,other.py:reward", "--dry-run")
    assert done.code == 1 and "two graders have the name 'reward'" in done.err


@pytest.mark.slow
def test_a_grader_that_always_fails_ends_the_run_with_its_reason(adaptive: Adaptive) -> None:
    Path("mine.py").write_text("def reward(thread):\n    raise ValueError('never')\n")
    words = (
        "--steps",
        "20",
        "--prompts-per-batch",
        "4",
        "--warm-up-epochs",
        "0",
        "--save-as",
        "null",
        "--device",
        "cpu",
    )
    done = adaptive("run", "grpo", "--grader", "mine.py:reward", *words)
    assert done.code == 2 and "the last 64 grades all failed" in done.err and "ValueError: never" in done.err
    assert "KeyError" not in done.err


def test_a_grader_is_served_until_it_is_interrupted(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    command = [sys.executable, "-m", "harmony_core.cli", "graders", "serve", "mine.py:reward"]
    environment = os.environ | {"ADAPTIVE_HOME": str(tmp_path / "home")}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url, token = process.stdout.readline().strip(), process.stdout.readline().strip().partition("=")[2]

        async def score() -> float:
            grader = RewardServerGrader("remote", "id", url, token=token)
            found = await score_or_refuse(grader, StringThread([("user", "q"), ("assistant", "abc")]))
            await grader.client.drop_websocket()
            return found

        try:
            assert asyncio.run(score()) == 3.0
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
        finally:
            process.kill()


@pytest.mark.slow
def test_grpo_runs_with_a_grader_and_no_recipe(adaptive: Adaptive) -> None:
    Path("mine.py").write_text("def reward(thread):\n    return float('a' in thread.completion())\n")
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("abc", "bca", "cab")]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ["--steps", "2", "--prompts-per-batch", "2", "--save-as", "null"]
    done = adaptive("run", "grpo", "--dataset", "mine.jsonl", "--grader", "mine.py:reward", *sizes)
    assert done.code == 0, done.err
    assert "held-out score" in done.out
