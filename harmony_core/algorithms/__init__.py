"""Training classes: what to learn and from what. No tensors here."""

from harmony_core.algorithms.callbacks import RecipeCallback, invoke_callbacks
from harmony_core.algorithms.sft import SFT

__all__ = ["SFT", "RecipeCallback", "invoke_callbacks"]
