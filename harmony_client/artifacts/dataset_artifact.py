"""Datasets."""

from harmony_core.artifacts import DatasetArtifact as DatasetArtifact
from harmony_core.data.samples import AdaptiveDatasetKind as AdaptiveDatasetKind, DatasetSampleType as DatasetSampleType
from harmony_core.notifiers import logger as logger
