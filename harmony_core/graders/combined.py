"""A grader that combines the grades of several."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

from harmony_core.config.argument_kinds import checked
from harmony_core.errors import GradeFailed, IgnoreGradeException, UsageError
from harmony_core.graders.base import BaseGrader, Grade, grade_or_refuse
from harmony_core.text.threads import StringThread

log = logging.getLogger(__name__)

_ENOUGH = 20
"""Grades of a part before its failure rate means something."""


class CombinedGrader(BaseGrader[dict[str, Any]]):
    """The weighted mean or sum of the grades of several graders, which grade at the same time.

    If one of them ignores the sample, fails on it or is too slow, the sample is unscored, with that grader's key and
    reason: a mean over the others would be another quantity. Empty `weights` are all 1. A warning is logged once for
    each grader that leaves more than `failure_rate_warning_threshold` of its samples unscored.

    Raises UsageError without graders, for two of one key, for a number of weights other than that of the graders, for
    weights that are not finite, and for a mean whose weights sum to 0.
    """

    keeps_time = True

    @checked
    def __init__(
        self,
        grader_key: str,
        graders: Sequence[BaseGrader[Any]],
        weights: Sequence[float] | None = None,
        aggregation_method: Literal["sum", "mean"] = "mean",
        failure_rate_warning_threshold: float = 0.2,
    ) -> None:
        super().__init__(grader_key)
        keys = [grader.grader_key for grader in graders]
        if not keys or len(set(keys)) < len(keys):
            raise UsageError(f"grader {grader_key!r} needs graders with different keys, got {keys}")
        self.weights = list(map(float, weights or [1.0] * len(keys)))
        if len(self.weights) != len(keys):
            raise UsageError(f"grader {grader_key!r} has {len(keys)} graders and {len(self.weights)} weights")
        if not all(map(math.isfinite, self.weights)):
            raise UsageError(f"the weights of grader {grader_key!r} must be finite, not {self.weights}")
        if aggregation_method == "mean" and sum(self.weights) == 0:
            raise UsageError(f"the weights of grader {grader_key!r} sum to 0", hint="aggregation_method='sum'")
        self.graders, self.aggregation_method = list(graders), aggregation_method
        self.failure_rate_warning_threshold = failure_rate_warning_threshold
        self._calls = 0
        self._failures = dict.fromkeys(keys, 0)
        self._warned: set[str] = set()

    async def grade(self, sample: StringThread) -> Grade:
        """The combined grade; its reasoning has a line for each grader. Raises the first grader's failure."""
        calls = [grade_or_refuse(grader, sample) for grader in self.graders]
        found = await asyncio.gather(*calls, return_exceptions=True)
        self._calls += 1
        grades: list[Grade] = []
        failure: BaseException | None = None
        for grader, result in zip(self.graders, found, strict=True):
            if isinstance(result, Grade):
                grades.append(result)
                continue
            if not isinstance(result, GradeFailed | IgnoreGradeException):
                raise result
            self._note(grader.grader_key)
            failure = failure or self._named(grader.grader_key, result)
        if failure is not None:
            raise failure
        value = sum(weight * grade.value for weight, grade in zip(self.weights, grades, strict=True))
        value /= sum(self.weights) if self.aggregation_method == "mean" else 1.0
        self.add_log({"score": value})
        pairs = zip(self.graders, grades, strict=True)
        lines = [f"{g.grader_key}: {grade.value:g} {grade.reasoning or ''}".rstrip() for g, grade in pairs]
        return Grade(value, self.grader_key, "\n".join(lines))

    def _named(self, key: str, failure: GradeFailed | IgnoreGradeException) -> GradeFailed | IgnoreGradeException:
        """The failure under this grader's key; one that ignores names the part."""
        message = failure.message if repr(key) in failure.message else f"grader {key!r}: {failure.message}"
        return type(failure)(message, hint=failure.hint, grader=key)

    def _note(self, key: str) -> None:
        self._failures[key] += 1
        rate = self._failures[key] / self._calls
        if self._calls >= _ENOUGH and rate > self.failure_rate_warning_threshold and key not in self._warned:
            self._warned.add(key)
            log.warning("grader %r of %r leaves %.0f %% of its samples unscored", key, self.grader_key, 100 * rate)

    def get_logs(self, clear: bool = False, log_all_samples: bool = False) -> dict[str, Any]:
        """Its own `score/*`; of each grader `<key>/failure_rate` and `<key>/<log of that grader>`."""
        logs: dict[str, Any] = super().get_logs(log_all_samples=log_all_samples)
        for grader in self.graders:
            key = grader.grader_key
            if self._calls:
                logs[f"{key}/failure_rate"] = self._failures[key] / self._calls
            logs |= {f"{key}/{name}": value for name, value in grader.get_logs(False, log_all_samples).items()}
        if clear:
            self.clear_logs()
        return logs

    def clear_logs(self) -> None:
        """Forget the entries and the failures, also those of the graders."""
        super().clear_logs()
        self._calls, self._failures = 0, dict.fromkeys(self._failures, 0)
        for grader in getattr(self, "graders", ()):
            grader.clear_logs()
