"""The shipped data: what it is, and that it is what the script makes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

from harmony_core.config.parameters import shipped_data

SCRIPT = Path(__file__).parents[2] / "recipes" / "data" / "make.py"
NAMES = ("sort-letters", "sort-letters-held-out")
PREFERENCES = ("sort-letters-preferences", "sort-letters-preferences-held-out")


def rows(name: str) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in shipped_data()[name].read_text(encoding="utf-8").splitlines()]
    return [(line["messages"][0]["content"], line["completion"]) for line in lines]


def test_the_script_makes_the_shipped_files(tmp_path: Path) -> None:
    runpy.run_path(str(SCRIPT))["main"](tmp_path)
    for name in NAMES + PREFERENCES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == shipped_data()[name].read_bytes()


def test_answers_are_right_and_nothing_held_out_is_trained() -> None:
    training, held_out = (rows(name) for name in NAMES)
    assert (len(training), len(held_out)) == (3000, 200)
    for prompt, answer in training + held_out:
        assert len(set(prompt)) == 5
        assert answer == "".join(sorted(prompt))
    assert not {answer for _, answer in training} & {answer for _, answer in held_out}


def test_the_preferred_answer_is_sorted_and_the_other_is_nearly() -> None:
    for name, prompts in zip(PREFERENCES, NAMES, strict=True):
        lines = [json.loads(line) for line in shipped_data()[name].read_text(encoding="utf-8").splitlines()]
        assert [line["messages"][0]["content"] for line in lines] == [prompt for prompt, _ in rows(prompts)]
        for line in lines:
            right, other = line["preferred_completion"], line["other_completion"]
            assert right == "".join(sorted(line["messages"][0]["content"])) == "".join(sorted(other))
            assert sum(a != b for a, b in zip(right, other, strict=True)) == 2
