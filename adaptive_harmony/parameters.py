"""Models, datasets and graders that a recipe's configuration names."""

from harmony_core.config.parameters import Dataset, Grader, Model, dataset_kinds, model_kinds

__all__ = ["Dataset", "Grader", "Model", "dataset_kinds", "model_kinds"]
