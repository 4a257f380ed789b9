"""Metrics of losses, summed over the micro-batches of a step and then over the replicas."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harmony_core.engine.training.losses.terms import METRICS, Sums


class MetricSums:
    """Sum and count of every metric, on the device, so that no micro-batch waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2 * len(METRICS), dtype=torch.float64, device=device)

    def add(self, sums: Sums) -> None:
        """What one micro-batch adds."""
        for name, (total, count) in sums.items():
            place = 2 * METRICS.index(name)
            self.sums[place] += total
            self.sums[place + 1] += count

    def clear(self) -> None:
        """Forget everything."""
        self.sums.zero_()


def means(sums: Sequence[float]) -> dict[str, float]:
    """From `MetricSums.sums`: what a step reports; nothing of metrics that no loss gave."""
    pairs = zip(METRICS, sums[::2], sums[1::2], strict=True)
    return {name: total / count for name, total, count in pairs if count}
