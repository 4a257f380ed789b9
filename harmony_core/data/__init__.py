"""Datasets: the shapes in which people keep conversations, read and checked.

Here are the kinds of rows that a recipe may ask for, as a type argument: `Dataset[dataset_kinds.Prompt]`. A bare
`Dataset` takes the kind of its first row.
"""

from __future__ import annotations

from typing import ClassVar, Literal

Format = Literal["prompts", "completions", "feedbacks", "preference"]


class DatasetKind:
    """Base of the kinds. `kind` is the format that every row must have; None takes the format of the first row."""

    kind: ClassVar[Format | None] = None


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
