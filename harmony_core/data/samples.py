"""The platform's format of rows, as recipes build them: one class for each kind. `Dataset.load` reads their JSON."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple
from uuid import UUID, uuid4

from pydantic import BaseModel, Field


class AdaptiveDatasetKind(StrEnum):
    """What the rows of a dataset are; Mixed: any of the others."""

    Prompt = "PROMPT"
    Completion = "PROMPT_COMPLETION"
    Metric = "PROMPT_COMPLETION_SCORE"
    Preference = "PREFERENCE"
    Mixed = "MIXED"


class SampleMetadata(BaseModel):
    """Where a row comes from; `external_data` becomes the thread's metadata."""

    id: UUID = Field(default_factory=uuid4)
    created_at: int = Field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""
    model_id: UUID | None = None
    external_data: Any = None
    labels: dict[str, Any] | None = None


class TurnTuple(NamedTuple):
    """One turn, written as [role, content]; the content is text or a list of fragments."""

    role: str
    content: str | list[dict[str, Any]]


class DatasetPromptSample(BaseModel):
    """A conversation to be answered."""

    KIND: ClassVar = AdaptiveDatasetKind.Prompt
    prompt: list[TurnTuple]
    metadata: SampleMetadata = Field(default_factory=SampleMetadata)
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Variables for the chat template, such as `tools`."""


class DatasetSample(DatasetPromptSample):
    """A conversation and its answer."""

    KIND: ClassVar = AdaptiveDatasetKind.Completion
    completion: TurnTuple


class DatasetMetricSample(DatasetSample):
    """An answer with feedback values."""

    KIND: ClassVar = AdaptiveDatasetKind.Metric
    metrics: dict[str, float]


class DatasetPreferenceSample(DatasetPromptSample):
    """A better and a worse answer."""

    KIND: ClassVar = AdaptiveDatasetKind.Preference
    good_completion: TurnTuple
    bad_completion: TurnTuple
    metric: str = "preference"


DatasetSampleType = DatasetPromptSample | DatasetSample | DatasetMetricSample | DatasetPreferenceSample
ROWS: dict[str, type[DatasetPromptSample]] = {
    "preference": DatasetPreferenceSample,
    "feedbacks": DatasetMetricSample,
    "completions": DatasetSample,
    "prompts": DatasetPromptSample,
}
"""The class of a row by the format's name, the one with the most fields first."""
