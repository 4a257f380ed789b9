"""Where a rank stands: its number, its device, and how long its collectives may take."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""For collectives whose members are all under way: torch gives up on one that takes longer."""

IDLE_TIMEOUT = timedelta(days=365)
"""For gloo groups on which ranks wait for the next announcement, which comes when the recipe wants it."""


@dataclass(frozen=True)
class Topology:
    """One rank of `world_size`, and the device that it computes on."""

    rank: int
    world_size: int
    device: torch.device
    deterministic: bool = False
    """Whether every model here runs in the deterministic mode."""
