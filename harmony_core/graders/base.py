"""The contract of a grader, graders made from plain functions, and the score of a thread.

Graders do not depend on training: a training class, a callback or a recipe asks for a score and reads the logs.
"""

from __future__ import annotations

import inspect
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypedDict, TypeVar

from harmony_core.config.argument_kinds import checked
from harmony_core.errors import EngineError, GradeFailed, IgnoreGradeException
from harmony_core.loggers.base import Table
from harmony_core.rpc.tracebacks import place_of, summary
from harmony_core.text.threads import StringThread


@dataclass
class Grade:
    """A thread's score, the key of the grader that gave it, and the grader's reason, if it gave one."""

    value: float
    grader_key: str
    reasoning: str | None = None

    def __post_init__(self) -> None:
        self.value = float(self.value)


LogT = TypeVar("LogT")


class SuccessJudgeLog(TypedDict):
    """The log entry of a sample that was scored."""

    prompt: str
    reasoning: str
    score: float


class FailedJudgeLog(TypedDict):
    """The log entry of a sample that could not be scored."""

    prompt: str
    error: str | None


class BaseGrader(ABC, Generic[LogT]):
    """Scores threads. Subclasses implement `grade`, which is called concurrently.

    `grade` raises IgnoreGradeException for a sample to ignore, and any other error for a sample that it cannot grade.
    In a rollout both drop the prompt, with different reasons. `get_logs` sums up the entries of `add_log`.
    """

    def __init__(self, grader_key: str) -> None:
        self.grader_key = grader_key
        self._logs: list[LogT] = []

    @abstractmethod
    async def grade(self, sample: StringThread) -> Grade:
        """The grade of a thread's last turn."""

    async def score_float_value(self, sample: StringThread) -> float:
        """The value of the thread's grade."""
        return (await self.grade(sample)).value

    def add_log(self, log_data: LogT) -> None:
        """Keep an entry for `get_logs`; a mapping with "score" counts in the statistics."""
        self._logs.append(log_data)

    def get_logs(self, clear: bool = False, log_all_samples: bool = False) -> dict[str, float | Table]:
        """`score/mean, std, min, max, count` over entries with a finite "score"; empty without such entries.

        `score/std` is the sample standard deviation, 0 for a single score. `log_all_samples` is for graders that add
        tables of samples.
        """
        entries = [entry for entry in self._logs if isinstance(entry, dict)]
        scores = [score for entry in entries if "score" in entry and math.isfinite(score := float(entry["score"]))]
        if clear:
            self.clear_logs()
        if not scores:
            return {}
        return {
            "score/mean": statistics.fmean(scores),
            "score/std": statistics.stdev(scores) if len(scores) > 1 else 0.0,
            "score/min": min(scores),
            "score/max": max(scores),
            "score/count": float(len(scores)),
        }

    def clear_logs(self) -> None:
        """Forget the entries."""
        self._logs = []

    def get_sample_tables(
        self, successful_samples: Sequence[SuccessJudgeLog], failed_samples: Sequence[FailedJudgeLog] | None = None
    ) -> dict[str, float | Table]:
        """Tables `score/scored_samples` and, if any failed, `score/unscored_samples`, and the row count of each."""
        scored = Table(["Prompt", "Reasoning", "Score"])
        scored.add_rows([[s["prompt"], s["reasoning"], s["score"]] for s in successful_samples])
        tables: dict[str, float | Table] = {
            "score/scored_samples": scored,
            "score/scored_samples_count": float(len(successful_samples)),
        }
        if failed_samples is not None:
            unscored = Table(["Prompt", "Error"]).add_rows([[s["prompt"], s["error"]] for s in failed_samples])
            if len(unscored):
                tables["score/unscored_samples"] = unscored
            tables["score/unscored_samples_count"] = float(len(failed_samples))
        return tables

    @classmethod
    @checked
    def from_function(
        cls, grader_key: str, async_fn: Callable[[StringThread], Awaitable[float] | float]
    ) -> BaseGrader[dict[str, Any]]:
        """A grader that returns and logs the value of a coroutine function or a plain function."""
        return FunctionGrader(grader_key, async_fn)


class FunctionGrader(BaseGrader[dict[str, Any]]):
    """See `BaseGrader.from_function`."""

    def __init__(self, grader_key: str, function: Callable[[StringThread], Awaitable[float] | float]) -> None:
        super().__init__(grader_key)
        self._function = function

    async def grade(self, sample: StringThread) -> Grade:
        """The function's value."""
        found = self._function(sample)
        value = float(await found if inspect.isawaitable(found) else found)
        self.add_log({"score": value})
        return Grade(value, self.grader_key)


async def score_or_refuse(grader: BaseGrader[Any], sample: StringThread) -> float:
    """The grader's score of the thread.

    Raises IgnoreGradeException when the grader does, GradeFailed for any other error in it and for a score that is not
    a finite number. An EngineError is raised unchanged.
    """
    try:
        score = float(await grader.score_float_value(sample))
    except (EngineError, IgnoreGradeException):
        raise
    except Exception as error:  # a grader is foreign code: its failure concerns one sample
        place = place_of(error)
        reason = summary(error) + (f" ({place})" if place else "")
        raise GradeFailed(f"grader {grader.grader_key!r} raised {reason}", grader=grader.grader_key) from error
    if not math.isfinite(score):
        raise GradeFailed(f"grader {grader.grader_key!r} gave the score {score}", grader=grader.grader_key)
    return score
