from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from harmony_core.errors import GradeFailed, IgnoreGradeException, RankDied, UsageError
from harmony_core.graders import BaseGrader, CombinedGrader, score_or_refuse
from harmony_core.text.threads import StringThread

SAMPLE = StringThread([("user", "q"), ("assistant", "abc")])


def constant(key: str, value: Any) -> BaseGrader[Any]:
    async def grade(thread: StringThread) -> float:
        if isinstance(value, BaseException):
            raise value
        return value  # type: ignore[no-any-return]

    return BaseGrader.from_function(key, grade)


def test_weighted_mean_and_sum_with_the_logs_of_the_parts() -> None:
    parts = [constant("a", 1.0), constant("b", 4.0)]
    grader = CombinedGrader("both", parts, [1, 3])
    grade = asyncio.run(grader.grade(SAMPLE))
    assert grade.value == (1 + 3 * 4) / 4 and grade.reasoning == "a: 1\nb: 4"
    assert asyncio.run(CombinedGrader("s", parts, [1, 3], "sum").grade(SAMPLE)).value == 13.0
    assert asyncio.run(CombinedGrader("m", parts, []).grade(SAMPLE)).value == 2.5, "no weights are all 1"
    logs = grader.get_logs(clear=True)
    assert logs["score/mean"] == 3.25 and logs["a/score/mean"] == 1.0 and logs["b/score/count"] == 3
    assert logs["a/failure_rate"] == 0
    assert grader.get_logs() == {}


@pytest.mark.parametrize(
    ("failing", "code", "said"),
    [
        (ValueError("broken"), "grade_failed", "grader 'bad' raised ValueError: broken"),
        (float("nan"), "grade_failed", "grader 'bad' gave the score nan"),
        (IgnoreGradeException("not mine"), "grade_ignored", "grader 'bad': not mine"),
    ],
)
def test_one_part_that_fails_leaves_the_sample_unscored(
    failing: Any, code: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A mean over the others would be another quantity: a poisoned part would move it."""
    grader = CombinedGrader("both", [constant("good", 1.0), constant("bad", failing)])
    with caplog.at_level(logging.WARNING):
        for _ in range(30):
            with pytest.raises((GradeFailed, IgnoreGradeException), match=said) as caught:
                asyncio.run(score_or_refuse(grader, SAMPLE))
    assert caught.value.code == code
    logs = grader.get_logs()
    assert logs["bad/failure_rate"] == 1.0 and logs["good/failure_rate"] == 0.0 and "score/mean" not in logs
    assert caplog.text.count("'bad' of 'both' leaves 100 % of its samples unscored") == 1


def test_a_slow_part_is_cut_at_its_own_timeout() -> None:
    async def slow(thread: StringThread) -> float:
        await asyncio.Event().wait()
        return 1.0

    part = BaseGrader.from_function("slow", slow)
    part.timeout = 0.05
    with pytest.raises(GradeFailed, match="grader 'slow' gave no score within"):
        asyncio.run(score_or_refuse(CombinedGrader("both", [constant("a", 1.0), part]), SAMPLE))


def test_an_engine_error_of_a_part_goes_through() -> None:
    with pytest.raises(RankDied):
        asyncio.run(score_or_refuse(CombinedGrader("both", [constant("a", RankDied("gone"))]), SAMPLE))


def test_what_cannot_be_combined_is_refused() -> None:
    a, b = constant("a", 1.0), constant("b", 1.0)
    for parts, weights, said in (([], None, "different keys"), ([a, a], None, "different keys")):
        with pytest.raises(UsageError, match=said):
            CombinedGrader("c", parts, weights)
    with pytest.raises(UsageError, match="2 graders and 1 weights"):
        CombinedGrader("c", [a, b], [1.0])
    with pytest.raises(UsageError, match="sum to 0"):
        CombinedGrader("c", [a, b], [1.0, -1.0])
    with pytest.raises(UsageError, match="must be finite"):
        CombinedGrader("c", [a, b], [1.0, float("nan")])
