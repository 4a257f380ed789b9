"""Scores of several models: unscored grades, paired bootstrap intervals."""

from __future__ import annotations

import asyncio
import math
import random

import pytest

from harmony_core.errors import EngineError, IgnoreGradeException, UsageError
from harmony_core.graders import BaseGrader, Grade
from harmony_core.graders.evaluation import (
    EvalSample,
    EvalSampleInteraction,
    EvaluationArtifactBase,
    compare_models,
    evaluation_tables,
    grade_or_reason,
    paired_bootstrap,
    scores_of,
)
from harmony_core.text.threads import StringThread


def answers(model: str, *values: float | None, grader: str = "g", prompts: str = "abcdefgh") -> list[EvalSample]:
    """One answer for each prompt; None: it has no grade."""
    return [
        EvalSample(
            EvalSampleInteraction(StringThread([("user", prompt), ("assistant", "x")]), model),
            [] if value is None else [Grade(value, grader)],
            "rows",
        )
        for prompt, value in zip(prompts, values, strict=False)
    ]


def test_unscored_is_counted_and_never_zero() -> None:
    found = scores_of(answers("model_registry://a", 1, 0, None, math.nan) + answers("b", None, math.inf))
    assert {model: (row["g"].mean, row["g"].unscored) for model, row in found.items()} == {
        "a": (0.5, 2),
        "b": (None, 2),
    }


def test_two_pairs_by_hand() -> None:
    """Differences 0 and 1: a draw's mean is 0, 1/2, 1 with probability 1/4, 1/2, 1/4."""
    assert paired_bootstrap([0, 0], [0, 1]) == (0.5, 0.0, 1.0)
    assert paired_bootstrap([0, 0], [0, 1], confidence=0.4) == (0.5, 0.5, 0.5)


def test_pairing_takes_away_what_the_pairs_have_in_common() -> None:
    hard = [random.Random(0).random() * n for n in range(50)]
    mean, low, high = paired_bootstrap(hard, [value + 0.25 for value in hard])
    assert mean == pytest.approx(0.25) and low == pytest.approx(0.25) and high == pytest.approx(0.25)


def test_an_interval_is_that_of_the_normal_distribution() -> None:
    draw = random.Random(1)
    differences = [draw.gauss(0.1, 1) for _ in range(400)]
    mean, low, high = paired_bootstrap([0] * 400, differences, draws=4000)
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / 400 / 400)
    assert (high - low) / (2 * 1.96 * deviation) == pytest.approx(1, abs=0.05)
    assert paired_bootstrap([0] * 400, differences, draws=4000) == (mean, low, high)
    assert paired_bootstrap([0] * 400, differences, draws=4000, seed=1) != (mean, low, high)


def test_what_bootstrap_refuses() -> None:
    assert all(map(math.isnan, paired_bootstrap([], [])))
    for bad in ({"confidence": 1.0}, {"draws": 0}):
        with pytest.raises(UsageError):
            paired_bootstrap([0], [1], **bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="1 and 2 values"):
        paired_bootstrap([0], [1, 2])


def test_models_are_compared_on_the_prompts_that_both_have_scores_for() -> None:
    first, second = answers("a", 0, 1, 1, math.nan), answers("b", 1, math.nan, 1, 1)
    (found,) = compare_models(first + second)
    assert (found.model, found.baseline, found.grader, found.mean, found.prompts) == ("b", "a", "g", 0.5, 2)
    assert found.cells == ["g", "b - a", "+0.500", "+0.000 to +1.000", "2"]
    twice = first + answers("a", 1) + second
    assert compare_models(twice)[0].mean == 0.25, "two answers to one prompt count by their mean"
    assert compare_models(first) == []
    (nothing,) = compare_models(first + answers("b", math.nan))
    assert nothing.prompts == 0 and math.isnan(nothing.mean) and nothing.cells[3] == "not known"


def test_tables() -> None:
    first = answers("a", *[0.0, 1.0] * 30, prompts="".join(map(chr, range(48, 108))))
    second = answers("b", *[math.nan] * 60, prompts="".join(map(chr, range(48, 108))))
    second[0].grades = [Grade(1, "g", "x" * 3000)]
    found = evaluation_tables(first + second)
    assert found["mean scores"]["rows"] == [["a", "0.500"], ["b", "1.000* (59 unscored)"]]
    assert found["differences"]["rows"] == [["g", "b - a", "+1.000", "+1.000 to +1.000", "1"]]
    rows = found["answers (50 of 120)"]["rows"]
    assert [row[1] for row in rows[:3]] == ["a", "b", "a"] and rows[0][0] == rows[1][0] == "[user] 0"
    assert rows[1][3].startswith("g: 1: xxx") and len(rows[1][3]) == 2000 and rows[3][3] == "g: unscored"
    assert list(evaluation_tables(first)) == ["mean scores", "answers (50 of 60)"]
    assert evaluation_tables(answers("a", None, grader="g"))["mean scores"]["rows"] == [["a"]]
    assert evaluation_tables(answers("a", math.nan))["mean scores"]["rows"] == [["a", "all failed"]]


class Poisoned(BaseGrader[None]):
    async def grade(self, sample: StringThread) -> Grade:
        raise {"ignored": IgnoreGradeException("no text"), "engine": EngineError("gone")}.get(
            sample.last_content(), ZeroDivisionError("oh")
        )


def test_a_failing_grader_gives_a_reason() -> None:
    def grade(text: str) -> Grade:
        return asyncio.run(grade_or_reason(Poisoned("p"), StringThread([("user", text)])))

    assert math.isnan(grade("ignored").value) and "no text" in (grade("ignored").reasoning or "")
    assert "ZeroDivisionError" in (grade("x").reasoning or "")
    with pytest.raises(EngineError):
        grade("engine")


def test_the_documented_record() -> None:
    base = EvaluationArtifactBase("n", "uri", "id", more=1)
    assert (base.kind, base.name, base.uri, base.id) == ("eval", "n", "uri", "id")
    (line,) = base.samples_to_adaptive_json(answers("", 1))
    assert '"model_key": ""' in line
    (sample,) = answers("", 1)
    sample.grades.append(Grade(0, "h"))
    assert len(sample.grades) == 2 and len(sample.id) == 36
