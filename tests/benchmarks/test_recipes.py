"""The recipes for a real model: what they reward, and what they are given."""

from __future__ import annotations

import asyncio
import json
from types import ModuleType

import pytest

from adaptive_harmony import StringThread
from harmony_core.recipe_file import import_file
from source_tree import ROOT

FOLDER = ROOT / "benchmarks" / "recipes"


@pytest.fixture(scope="module")
def format_grpo() -> ModuleType:
    return import_file(FOLDER / "format_grpo.py", importable_folder=False)


@pytest.fixture(scope="module")
def pirate_sft() -> ModuleType:
    return import_file(FOLDER / "pirate_sft.py", importable_folder=False)


def answered(answer: str) -> StringThread:
    return StringThread([("user", "What do rabbits eat?"), ("assistant", answer)])


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("grass, hay, carrots", 1),
        ("grass, hay", 2 / 30),
        ("grass, hay, carrots, leaves", 3 / 40),
        ("Grass, hay, carrots", 2 / 30),
        ("grass, hay, carrots.", 2 / 30),
        ("grass, hay, carrots\n", 2 / 30),
        ("grass, hay and, carrots", 2 / 30),
        ("grass,hay,carrots", 0),
        ("grass, grass, hay", 2 / 30),
        ("grass, grass, hay, carrots", 3 / 40),
        ("farmer, cow, hen", 0),
        ("grass, hay, hen", 2 / 30),
        ("", 0),
    ],
)
def test_three_new_words_are_the_format_and_parts_of_it_are_worth_a_tenth(
    format_grpo: ModuleType, answer: str, reward: float
) -> None:
    assert asyncio.run(format_grpo.reward(answered(answer))) == pytest.approx(reward)
    assert asyncio.run(format_grpo.is_in_format(answered(answer))) == (reward == 1)


@pytest.mark.parametrize(
    ("answer", "mark"),
    [("Arr, grass, matey!", 1), ("Arr, arr, grass.", 0), ("Grass, yes, and hay.", 0), ("Aye, hay it be for YE.", 1)],
)
def test_a_pirate_is_known_by_two_of_his_words(pirate_sft: ModuleType, answer: str, mark: float) -> None:
    assert asyncio.run(pirate_sft.is_pirate(answered(answer))) == mark


def rows(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def test_no_held_out_question_is_trained_and_every_answer_has_the_style(pirate_sft: ModuleType) -> None:
    held_out = {json.dumps(row["messages"]) for row in rows("questions-held-out.jsonl")}
    assert len(held_out) == 32
    for name, size in {"questions.jsonl": 72, "pirate.jsonl": 80}.items():
        asked = [json.dumps(row["messages"]) for row in rows(name)]
        assert len(asked) == len(set(asked)) == size and not held_out & set(asked)
    for row in rows("pirate.jsonl"):
        assert asyncio.run(pirate_sft.is_pirate(answered(str(row["completion"])))) == 1, row


@pytest.mark.parametrize("name", ["format_grpo.py", "pirate_sft.py"])
def test_a_recipe_is_as_short_as_a_shipped_one(name: str) -> None:
    assert len((FOLDER / name).read_text(encoding="utf-8").splitlines()) <= 120
