"""GSPO."""

from harmony_core.algorithms.grpo import GSPO as GSPO
