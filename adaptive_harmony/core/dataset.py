"""Samples in a seeded random order."""

from harmony_core.data.datasets import DataSet, convert_sample_dict, load_from_hf

__all__ = ["DataSet", "convert_sample_dict", "load_from_hf"]
