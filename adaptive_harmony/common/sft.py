"""Supervised fine-tuning."""

from harmony_core.algorithms.sft import SFT

__all__ = ["SFT"]
