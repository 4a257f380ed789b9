"""What a grader returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Grade:
    """A thread's score, the key of the grader that gave it, and why, if the grader says."""

    value: float
    grader_key: str
    reasoning: str | None = None

    def __post_init__(self) -> None:
        self.value = float(self.value)
