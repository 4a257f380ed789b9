"""Models, datasets and graders that a recipe's configuration names."""

from harmony_core.config.parameters import Dataset, Model, dataset_kinds, model_kinds
from harmony_core.graders import Grader

__all__ = ["Dataset", "Grader", "Model", "dataset_kinds", "model_kinds"]
