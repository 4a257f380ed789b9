"""The grades of a trajectory, and the advantages of its tokens, against computations by hand."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from harmony_core.environments import (
    EnvironmentFactory,
    ThreadScore,
    TrajectoryHistory,
    get_reward_statistics,
    mean_of_grade_values,
    sum_of_grade_values,
)
from harmony_core.errors import DataError, UsageError
from harmony_core.graders import Grade
from harmony_core.loggers.base import Table
from harmony_core.text.threads import TokenizedThread
from harmony_core.text.turns import Text, TokenTurn
from worlds import Factory, answers, grade

MODEL = cast(Any, None)


def thread(*lengths: int) -> TokenizedThread:
    """Weighted turns of these lengths, next to each other, after a prompt of two tokens and an unweighted one of 3."""
    turns, start = [TokenTurn("user", (Text("q"),), 0.0, 0, 2), TokenTurn("assistant", (Text("old"),), 0.0, 2, 5)], 5
    for length in lengths:
        turns.append(TokenTurn("assistant", (Text("a"),), 1.0, start, start + length))
        start += length
    return TokenizedThread([7] * start, turns)


def history(*threads: list[list[Grade] | None]) -> TrajectoryHistory:
    made = TrajectoryHistory()
    for grades in threads:
        made.add_new_thread()
        for one in grades:
            made.add_turn(one)
    return made


TWO = history([grade(0.5), None], [grade(1.0)])
"""The documented example: a reward, a turn without, a new thread with a reward."""


def test_aggregators() -> None:
    grades = [Grade(1.0, "a"), Grade(0.5, "b")]
    assert mean_of_grade_values(grades) == 0.75 and sum_of_grade_values(grades) == 1.5
    assert mean_of_grade_values([]) == sum_of_grade_values([]) == 0.0


def test_the_documented_advantages() -> None:
    mean, std = get_reward_statistics([TWO])
    assert (mean, std) == (0.75, pytest.approx(0.25))
    found = asyncio.run(TWO.get_advantage_for_grpo(0.75, 0.25, [thread(2, 1), thread(3)], MODEL))
    assert found == [[0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]
    assert asyncio.run(TWO.count_weighted_tokens_per_turn(thread(2, 1), MODEL)) == [2, 1]
    assert asyncio.run(history([None, grade(3.0)]).get_advantage_for_gspo(1.0, 2.0)) == 1.0


def test_equal_rewards_give_no_advantage() -> None:
    same = [history([grade(0.1)]) for _ in range(3)]
    mean, std = get_reward_statistics(same)
    assert asyncio.run(same[0].get_advantage_for_gspo(mean, std)) == 0.0
    assert get_reward_statistics([history([None])]) == (0.0, 1e-8)


def test_threads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match=r"\[1, 1\] weighted turns, but \[2, 1\] were recorded"):
        asyncio.run(TWO.get_advantage_for_grpo(0.0, 1.0, [thread(3), thread(3)], MODEL))
    with pytest.raises(DataError, match="one reward for each trajectory, not 2"):
        asyncio.run(TWO.get_advantage_for_gspo(0.0, 1.0))


def ppo(made: TrajectoryHistory, *args: Any) -> tuple[list[list[float]], list[list[float]]]:
    return asyncio.run(made.get_advantage_for_ppo(MODEL, *args))


def test_returns_of_ppo_with_the_divergence_as_a_penalty() -> None:
    """kl = 1, beta = 0.1, no grade, gamma = 1."""
    _, returns = ppo(history([grade(0.0)]), [thread(2)], [[0.0, 0.0]], [[1.0, 1.0]], 0.1, 0.95, 1.0)
    assert returns == [[pytest.approx(-0.2), pytest.approx(-0.1)]]


def test_returns_and_advantages_flow_back_over_threads() -> None:
    values = [[0.1, 0.2, 0.3], [0.4]]
    advantages, returns = ppo(TWO, [thread(2, 1), thread(1)], values, [[0.0] * 3, [0.0]], 0.1, 0.5, 0.9)
    # Rewards 0, 0.5 (the end of the first turn), 0, 1.
    assert returns == [pytest.approx([0.9 * (0.5 + 0.9 * 0.9), 0.5 + 0.9 * 0.9, 0.9]), [1.0]]
    last = 1 - 0.4
    third = 0.9 * 0.4 - 0.3 + 0.45 * last
    second = 0.5 + 0.9 * 0.3 - 0.2 + 0.45 * third
    first = 0.9 * 0.2 - 0.1 + 0.45 * second
    assert advantages == [pytest.approx([first, second, third]), pytest.approx([last])]


def test_grades_by_grader() -> None:
    made = history([[Grade(1.0, "a"), Grade(0.0, "b")], None, [Grade(0.5, "a")]])
    assert made.get_cumulative_reward() == 1.0 and made.total_number_of_turns_generated == 3
    assert [len(grades or ()) for grades in made.get_grades_per_turn()] == [2, 0, 1]
    assert len(made.get_all_grades_flat()) == 3 and len(made.get_grades_by_grader_key()["a"]) == 2
    assert made.get_mean_score_per_grader() == {"a": 0.75, "b": 0.0}
    assert made.get_averaged_grades() == [Grade(0.75, "a"), Grade(0.0, "b")]
    score: ThreadScore = made.threads[0]
    assert score.get_all_rewards(sum_of_grade_values) == [1.0, 0.0, 0.5] and score.get_all_grades()[1] == []
    score.store_environment_snapshot(Factory(answers(1)).create_environment(None))
    assert len(score.environment_snapshots) == 1


def test_logs_of_a_factory() -> None:
    factory: EnvironmentFactory = Factory(answers(1))
    factory.add_log("steps", 1)
    factory.add_log("steps", 2.0)
    for cell in "ab":
        factory.add_log("table", Table(["x"]).add_row([cell]))
    logs = factory.get_logs(clear=True)
    table = logs.pop("table")
    assert logs == {"steps": 1.5} and isinstance(table, Table) and table["x"] == ["a", "b"]
    assert factory.get_logs() == {}
    with pytest.raises(UsageError, match="a number or a Table, not str"):
        factory.add_log("steps", cast(Any, "many"))
    factory.logging_name = "mine"
    factory.add_log("steps", 1)
    assert factory.get_logs() == {"mine/steps": 1.0}
