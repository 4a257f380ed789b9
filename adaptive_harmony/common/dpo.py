"""DPO."""

from harmony_core.algorithms import DPO as DPO
