"""Samples in a seeded random order."""

from harmony_core.data.datasets import (
    DataSet as DataSet,
    convert_sample_dict as convert_sample_dict,
    load_from_hf as load_from_hf,
)
