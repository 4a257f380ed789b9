"""The topology of a rank: its number, its device, and the timeouts of its collectives."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from harmony_core.options import RunOptions

if TYPE_CHECKING:
    import torch

OPTIONS = RunOptions.of_rank()

COLLECTIVE_TIMEOUT = timedelta(seconds=3 * OPTIONS.hang_timeout or 365 * 86400)
"""For collectives that all members have started or will start soon: torch aborts after this time. The driver gives up
sooner, and names the missing rank."""

IDLE_TIMEOUT = timedelta(days=365)
"""For gloo groups on which ranks wait for the next announcement, which may come at any time."""


@dataclass(frozen=True)
class Topology:
    """One rank of `world_size`, and the device that it computes on."""

    rank: int
    world_size: int
    device: torch.device
    deterministic: bool = False
    """Whether every model here runs in the deterministic mode."""
