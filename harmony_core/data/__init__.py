"""Datasets: the shapes in which people keep conversations, read and checked.

Here are the kinds of rows that a recipe may ask for, as a type argument: `Dataset[dataset_kinds.Prompt]`. A bare
`Dataset` takes the kind of its first row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import ValidationError

from harmony_core.data.samples import ROWS, DatasetPromptSample

Format = Literal["prompts", "completions", "feedbacks", "preference"]


class DatasetKind:
    """Base of the kinds. `kind` is the format that every row must have; None takes the format of the first row."""

    kind: ClassVar[Format | None] = None

    def __init__(self, kind: str | None = None, formats: Sequence[type] = ()) -> None:
        """The classes are the kinds: an instance, and so its arguments, has no use."""

    @classmethod
    def parse(cls, line: Mapping[str, Any]) -> DatasetPromptSample:
        """A row in the platform's format: of this kind, or without a kind of the first that fits. Raises ValueError."""
        for row in ROWS.values() if cls.kind is None else [ROWS[cls.kind]]:
            try:
                return row.model_validate(line)
            except ValidationError as error:
                reason = f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
        raise ValueError(f"not a row of {cls.__name__} in the platform's format: {reason}")


class Prompt(DatasetKind):
    """Conversations to be answered: no turn is weighted."""

    kind = "prompts"


class Completion(DatasetKind):
    """Conversations with the answer to learn."""

    kind = "completions"


class Metric(DatasetKind):
    """Answers with feedback values."""

    kind = "feedbacks"


class Preference(DatasetKind):
    """A prompt with a preferred and another answer, both in the thread's metadata."""

    kind = "preference"
