"""What a recipe's configuration may name."""

from harmony_core.config.parameters import Dataset, Grader, Model, dataset_kinds, model_kinds

__all__ = ["Dataset", "Grader", "Model", "dataset_kinds", "model_kinds"]
