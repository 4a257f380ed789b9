"""The contract of a grader, graders made from plain functions, and the score of a thread.

Graders do not depend on training: a training class, a callback or a recipe asks for a score and reads the logs.
"""

from __future__ import annotations

import asyncio
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar

from harmony_core.config.argument_kinds import checked
from harmony_core.errors import EngineError, GradeFailed, GradeTimedOut, IgnoreGradeException
from harmony_core.loggers.base import Table
from harmony_core.rpc.tracebacks import place_of, summary
from harmony_core.text.threads import StringThread

if TYPE_CHECKING:
    from harmony_core.graders.records import AdaptiveGrader, CustomJudge, PrebuiltJudge, RemoteRewardEndpoint
    from harmony_core.recipe.context import RecipeContext


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
    Either leaves the sample unscored: it is counted by its reason, and never trained. `get_logs` sums up the entries of
    `add_log`.
    """

    timeout: float | None = 60.0
    """Seconds that one grade may take; None for no limit. Set it on the grader."""
    keeps_time: bool = False
    """Whether `grade` itself keeps to `timeout`, which then begins with the work and not with the call."""

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
        """A grader that returns and logs the value of a coroutine function or a plain function.

        A coroutine function runs in the event loop. A plain function at the top level of a file runs in worker
        processes that import the file; any other plain function in a thread. See `docs/graders.md`.
        """
        from harmony_core.graders.functions import FunctionGrader

        return FunctionGrader(grader_key, async_fn)

    @classmethod
    @checked
    def from_source_code(cls, grader_key: str, source_code: str) -> BaseGrader[dict[str, Any]]:
        """A grader by Python text that defines `grade(thread)`, plain or `async`; it runs in worker processes.

        Raises UsageError if the text is not Python or does not define `grade`.
        """
        from harmony_core.graders.functions import grader_of_source

        return grader_of_source(grader_key, source_code)

    @classmethod
    async def from_config(
        cls,
        grader_config: AdaptiveGrader,
        ctx: RecipeContext,
        tp: int | None = None,
        kv_cache_len: int | None = None,
        max_tokens: int | None = None,
    ) -> BaseGrader[Any]:
        """The grader that a record describes; a judge spawns its model with the given limits, in tokens.

        Raises ValueError for a `Custom` grader, which only a recipe can build, and for `Function` without source.
        """
        from harmony_core.graders.records import grader_of

        return await grader_of(grader_config, ctx, tp, kv_cache_len, max_tokens)

    @classmethod
    async def from_templated_judge(
        cls,
        grader_key: str,
        grader_id: str,
        config: CustomJudge,
        ctx: RecipeContext,
        tp: int | None = None,
        kv_cache_len: int | None = None,
        max_tokens: int | None = None,
    ) -> BaseGrader[Any]:
        """A `TemplatedPromptJudgeGrader` with the record's templates, criteria and examples."""
        from harmony_core.graders.records import templated_judge

        return await templated_judge(grader_key, grader_id, config, ctx, (tp, kv_cache_len, max_tokens))

    @classmethod
    async def from_prebuilt_judge(
        cls,
        grader_key: str,
        grader_id: str,
        config: PrebuiltJudge,
        ctx: RecipeContext,
        tp: int | None = None,
        kv_cache_len: int | None = None,
        max_tokens: int | None = None,
    ) -> BaseGrader[Any]:
        """The faithfulness, answer relevancy or context relevancy judge that the record names."""
        from harmony_core.graders.records import prebuilt_judge

        return await prebuilt_judge(grader_key, grader_id, config, ctx, (tp, kv_cache_len, max_tokens))

    @classmethod
    def from_remote_reward_endpoint(
        cls, grader_key: str, grader_id: str, config: RemoteRewardEndpoint
    ) -> BaseGrader[Any]:
        """A `RewardServerGrader` for the record's URL."""
        from harmony_core.graders.reward_server import RewardServerGrader

        return RewardServerGrader(grader_key, grader_id, config.url)


async def score_or_refuse(grader: BaseGrader[Any], sample: StringThread) -> float:
    """The grader's score of the thread.

    Raises IgnoreGradeException when the grader does, GradeTimedOut when it takes longer than its `timeout`, GradeFailed
    for any other error in it and for a score that is not a finite number. An EngineError is raised unchanged.
    """
    return (await _refusing(grader, sample, grader.score_float_value)).value


async def grade_or_refuse(grader: BaseGrader[Any], sample: StringThread) -> Grade:
    """As `score_or_refuse`, but returns the whole grade."""
    return await _refusing(grader, sample, grader.grade)


async def _refusing(
    grader: BaseGrader[Any], sample: StringThread, call: Callable[[StringThread], Awaitable[Grade | float]]
) -> Grade:
    clock = asyncio.timeout(None if grader.keeps_time else grader.timeout)
    try:
        async with clock:
            found = await call(sample)
        grade = found if isinstance(found, Grade) else Grade(as_score(found), grader.grader_key)
        score = as_score(grade.value)
    except (EngineError, IgnoreGradeException, GradeFailed):
        raise
    except (SystemExit, asyncio.CancelledError) as error:  # a grader's own must not end the run
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        told = f"grader {grader.grader_key!r} raised {error!r}"
        raise GradeFailed(told, grader=grader.grader_key) from error
    except Exception as error:  # a grader is foreign code: its failure concerns one sample
        if clock.expired():
            raise timed_out(grader.grader_key, grader.timeout or 0) from None
        raise GradeFailed(
            f"grader {grader.grader_key!r} raised {reason_of(error)}", grader=grader.grader_key
        ) from error
    if not math.isfinite(score):
        raise GradeFailed(f"grader {grader.grader_key!r} gave the score {score}", grader=grader.grader_key)
    return grade


def as_score(found: Any) -> float:
    """A score as a float. Raises TypeError for text, which `float` would read, and for what is no number."""
    if isinstance(found, str | bytes):
        raise TypeError(f"a score is a number, not {found!r:.80}")
    return float(found)


def reason_of(error: Exception) -> str:
    """An exception in one line, with the place in the grader's code that raised it."""
    place = place_of(error)
    return summary(error) + (f" ({place})" if place else "")


def timed_out(grader_key: str, seconds: float) -> GradeTimedOut:
    """The error for a grade that takes too long."""
    return GradeTimedOut(
        f"grader {grader_key!r} gave no score within {seconds:g} s",
        hint="the `timeout` of a grader can be set, in seconds",
        grader=grader_key,
    )
