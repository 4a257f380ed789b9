"""Records of samples."""

from harmony_core.data.samples import (
    DatasetMetricSample as DatasetMetricSample,
    DatasetPreferenceSample as DatasetPreferenceSample,
    DatasetPromptSample as DatasetPromptSample,
    DatasetSample as DatasetSample,
    SampleMetadata as SampleMetadata,
    TurnTuple as TurnTuple,
)
