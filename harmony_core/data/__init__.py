"""What a recipe needs of a dataset's lines, named as a type argument: `Dataset[dataset_kinds.Prompt]`.

Each kind names the line format that is read; a bare `Dataset` lets the first line decide.
"""

from __future__ import annotations

from typing import ClassVar, Literal

Format = Literal["prompts", "completions", "feedbacks", "preference"]


class DatasetKind:
    """Base of the kinds; `kind` is the format that every line must have, None for the first line's."""

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
