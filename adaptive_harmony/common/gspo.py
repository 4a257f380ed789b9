"""Group sequence policy optimisation."""

from harmony_core.algorithms.gspo import GSPO

__all__ = ["GSPO"]
