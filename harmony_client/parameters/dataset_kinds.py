"""Kinds of datasets."""

from harmony_core.data import (
    Completion as Completion,
    DatasetKind as DatasetKind,
    Metric as Metric,
    Preference as Preference,
    Prompt as Prompt,
)
