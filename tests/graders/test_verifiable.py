from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel

from harmony_core.errors import GradeFailed, UsageError
from harmony_core.graders import (
    BaseGrader,
    exact_match_grader,
    json_grader,
    math_grader,
    regex_grader,
    score_or_refuse,
)
from harmony_core.text.threads import StringThread


class Point(BaseModel):
    x: int


def score(grader: BaseGrader[Any], completion: str, answer: Any = None) -> float:
    sample = StringThread([("user", "q"), ("assistant", completion)], {} if answer is None else {"answer": answer})
    return asyncio.run(score_or_refuse(grader, sample))


def test_answers_are_checked_by_a_program() -> None:
    exact = exact_match_grader()
    assert [score(exact, " 4\n", "4"), score(exact, "5", "4"), score(exact, "b", ["a", "b"])] == [1, 0, 1]
    with pytest.raises(GradeFailed, match="answer"):
        score(exact, "4")
    pattern = regex_grader("tags", r"<a>\d+</a>")
    assert [score(pattern, "so <a>12</a>"), score(pattern, "<a>x</a>")] == [1, 0]
    assert score(regex_grader(), "is 12.", r"\d+") == 1
    with pytest.raises(UsageError, match="not a regular expression"):
        regex_grader("bad", "(")
    assert [score(json_grader(), text) for text in ('{"a": 1}', " [] ", "{'a': 1}", "", '{"a": 1')] == [1, 1, 0, 0, 0]
    point = json_grader("point", Point)
    assert [score(point, text) for text in ('{"x": 1}', '{"x": "one"}', "{}")] == [1, 0, 0]


def test_a_regular_expression_that_takes_for_ever_is_cut() -> None:
    grader = regex_grader("slow", r"(a+)+$")
    grader.timeout = 1.0
    with pytest.raises(GradeFailed, match="no score within 1 s"):
        score(grader, "a" * 60 + "b")


@pytest.mark.slow
def test_mathematics_are_compared() -> None:
    pytest.importorskip("math_verify")
    grader = math_grader()
    assert score(grader, r"The answer is $\frac{1}{2}$.", "$0.5$") == 1
    assert score(grader, r"The answer is $\boxed{3}$.", "$2$") == 0
