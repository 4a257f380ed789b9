"""Training classes: what to learn and from what. No tensors here."""

from harmony_core.algorithms.callbacks import RecipeCallback, invoke_callbacks
from harmony_core.algorithms.sft import SFT
from harmony_core.algorithms.showing import show_sample

__all__ = ["SFT", "RecipeCallback", "invoke_callbacks", "show_sample"]
