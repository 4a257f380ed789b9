from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from harmony_core.errors import DataError, GradeFailed, RankDied
from harmony_core.graders import BaseGrader, Grade, IgnoreGradeException, score_or_refuse
from harmony_core.text.threads import StringThread


def thread(answer: str) -> StringThread:
    return StringThread([("user", "q"), ("assistant", answer)])


class Length(BaseGrader[dict[str, Any]]):
    """Scores the length of the answer; does as it is told by some answers."""

    async def grade(self, sample: StringThread) -> Grade:
        answer = sample.last_content()
        if answer == "ignore":
            raise IgnoreGradeException
        if answer == "die":
            raise RankDied("rank 0 is gone")
        if answer == "no number":
            grade = Grade(1.0, self.grader_key)
            grade.value = None  # type: ignore[assignment]
            return grade
        value = float("nan") if answer == "nan" else len(answer) / (answer != "broken")
        self.add_log({"score": value})
        return Grade(value, self.grader_key, reasoning="its length")


def test_a_grade_is_a_mutable_record_of_a_float() -> None:
    grade = Grade(True, "key")
    assert (grade.value, grade.grader_key, grade.reasoning) == (1.0, "key", None)
    assert isinstance(grade.value, float)
    grade.reasoning = "because"
    assert grade == Grade(1.0, "key", "because")
    with pytest.raises(TypeError):
        Grade(1.0, "key", reason="because")  # type: ignore[call-arg]


STATISTICS_OF_A_FOUR = {"mean": 4.0, "std": 0.0, "min": 4.0, "max": 4.0, "count": 1.0}


def test_statistics_of_the_logs() -> None:
    grader = Length("length")
    assert grader.get_logs() == {}

    async def score_all() -> list[float]:
        return list(await asyncio.gather(*(grader.score_float_value(thread("x" * n)) for n in (1, 2, 6))))

    assert asyncio.run(score_all()) == [1.0, 2.0, 6.0]
    grader.add_log({"note": "no score"})
    logs = grader.get_logs(clear=True)
    # Mean 3; the sample standard deviation is sqrt((4 + 1 + 9) / 2).
    assert logs == {
        "score/mean": 3.0,
        "score/std": pytest.approx(7**0.5),
        "score/min": 1.0,
        "score/max": 6.0,
        "score/count": 3.0,
    }
    assert grader.get_logs() == {}
    grader.add_log({"score": 4})
    for failed in (float("nan"), float("inf")):
        grader.add_log({"score": failed})
    assert grader.get_logs() == {f"score/{name}": value for name, value in STATISTICS_OF_A_FOUR.items()}


def test_a_function_is_a_grader_whether_or_not_it_is_a_coroutine() -> None:
    async def slow(sample: StringThread) -> float:
        await asyncio.sleep(0)
        return len(sample.last_content())

    for function in (slow, lambda sample: len(sample.last_content())):
        grader = BaseGrader.from_function("f", function)
        assert asyncio.run(grader.grade(thread("abc"))) == Grade(3.0, "f")
        assert grader.get_logs()["score/mean"] == 3.0


def test_every_failure_is_a_counted_reason() -> None:
    grader = Length("length")

    def reason(answer: str) -> str:
        with pytest.raises(DataError) as caught:
            asyncio.run(score_or_refuse(grader, thread(answer)))
        return f"{caught.value.code}: {caught.value.message}"

    assert asyncio.run(score_or_refuse(grader, thread("four"))) == 4.0
    assert reason("ignore") == "grade_ignored: the grader ignores this sample"
    assert reason("broken").startswith("grade_failed: grader 'length' raised ZeroDivisionError: division by zero (")
    assert re.search(r"test_graders\.py:\d+\)$", reason("broken")), "where, since a run shows no more of it"
    assert "TypeError" in reason("no number")
    assert reason("nan") == "grade_failed: grader 'length' gave the score nan"
    with pytest.raises(RankDied):
        asyncio.run(score_or_refuse(grader, thread("die")))
    with pytest.raises(GradeFailed) as caught:
        asyncio.run(score_or_refuse(grader, thread("broken")))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.details == {"grader": "length"}


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError()])
def test_a_coroutine_that_exits_or_cancels_itself_fails_on_its_sample(error: BaseException) -> None:
    async def grade(sample: StringThread) -> float:
        raise error

    with pytest.raises(GradeFailed, match=type(error).__name__):
        asyncio.run(score_or_refuse(BaseGrader.from_function("ends", grade), thread("a")))


def test_a_grade_that_is_waited_for_can_be_cancelled() -> None:
    async def grade(sample: StringThread) -> float:
        await asyncio.Event().wait()
        return 0.0

    async def work() -> None:
        waiting = asyncio.ensure_future(score_or_refuse(BaseGrader.from_function("waits", grade), thread("a")))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(work())


def test_tables_of_scored_and_unscored_samples() -> None:
    grader = Length("length")
    logs = grader.get_sample_tables(
        [{"prompt": "p", "reasoning": "r", "score": 1.0}], [{"prompt": "x", "error": "no answer"}]
    )
    assert logs["score/scored_samples"].rows() == [["p", "r", 1.0]]  # type: ignore[union-attr]
    assert logs["score/unscored_samples"].rows() == [["x", "no answer"]]  # type: ignore[union-attr]
    assert (logs["score/scored_samples_count"], logs["score/unscored_samples_count"]) == (1, 1)
    assert set(grader.get_sample_tables([])) == {"score/scored_samples", "score/scored_samples_count"}
