"""Work that a training class does beside training, every so often: sampling, validation, whatever a recipe adds."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from harmony_core.errors import UsageError
from harmony_core.journal import phase


class RecipeCallback(ABC):
    """Runs at 0 %, whenever a multiple of `frequency` (a fraction of the run) has been passed, and at 100 %.

    Each multiple counts once, at the first report at or past it; with `force_run_on_exit` the end counts too.
    """

    def __init__(self, frequency: float, force_run_on_exit: bool = True, log_key_prefix: str | None = None) -> None:
        if frequency <= 0:
            raise UsageError(f"a callback's frequency must be above 0, got {frequency}")
        self.frequency = frequency
        self.force_run_on_exit = force_run_on_exit
        self.log_key_prefix = log_key_prefix
        self.last_call = -1.0
        """The fraction of the run at the last call; below 0 before the first."""

    def _multiples(self, fraction: float) -> int:
        # Progress arrives as a quotient such as 3 * 0.1: a multiple missed by rounding alone counts as reached.
        return math.floor(fraction / self.frequency + 1e-9)

    def is_due(self, current_percentage: float) -> bool:
        """Whether a call is owed when this fraction of the run is done."""
        if self.last_call < 0:
            return True
        if current_percentage >= 1.0 and self.force_run_on_exit:
            return self.last_call < 1.0
        return self._multiples(current_percentage) > self._multiples(self.last_call)

    async def maybe_call(self, current_percentage: float) -> dict[str, Any]:
        """Run the callback if it is due. Returns what it has to log, under its prefix."""
        if not self.is_due(current_percentage):
            return {}
        with phase("callbacks"):
            logs = await self.callback(current_percentage)
        self.last_call = current_percentage
        prefix = f"{self.log_key_prefix}/" if self.log_key_prefix else ""
        return {f"{prefix}{key}": value for key, value in logs.items()}

    @abstractmethod
    async def callback(self, current_percentage: float) -> dict[str, Any]:
        """The work; returns metrics."""


async def invoke_callbacks(callbacks: Sequence[RecipeCallback], current_percentage: float) -> Mapping[str, Any]:
    """Run those that are due, in order. Returns all they have to log, with the run's completion if there is any."""
    logs: dict[str, Any] = {}
    for callback in callbacks:
        logs |= await callback.maybe_call(current_percentage)
    if logs:
        logs["training/completion_percentage"] = logs["completion_percentage"] = current_percentage
    return logs
