"""What scores say about completions, and values about returns. Plain lists of numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def group_advantages(scores: Sequence[float]) -> list[float]:
    """(r - mean) / (std + 1e-8) over one prompt's completions; std is the population's (GRPO, arXiv 2402.03300, 4.1.2).

    Scores that are all equal give exactly 0.
    """
    mean = statistics.fmean(scores)
    if all(score == scores[0] for score in scores):
        return [0.0] * len(scores)
    std = statistics.pstdev(scores, mean)
    return [(score - mean) / (std + 1e-8) for score in scores]


def explained_variance(values: Sequence[float], returns: Sequence[float]) -> float:
    """1 - mean((V - R)^2) / (var(R) + 1e-8): 1 for a perfect value model, 0 for one that knows the mean only."""
    error = statistics.fmean((value - target) ** 2 for value, target in zip(values, returns, strict=True))
    return 1.0 - error / (statistics.pvariance(returns) + 1e-8)
