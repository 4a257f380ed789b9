"""Direct preference optimisation."""

from harmony_core.algorithms.dpo import DPO

__all__ = ["DPO"]
