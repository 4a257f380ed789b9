"""From logits to tokens, with the log-prob of each token in the raw distribution and in the one it was drawn from.

A token is drawn by inverse CDF: the lowest id whose cumulative probability, summed in float64 in the order of ids,
exceeds the row's random number. Every row is computed from its own logits alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmony_core.engine.inference.draws import Draws

_CANDIDATES = 256
"""Highest logits that are looked at first for top-k and top-p; grown for rows that need more."""
_COLDEST = 1e-30
"""Temperatures below this draw as this one does; it is greedy already, and in the range of float32."""


@dataclass(frozen=True)
class Sampled:
    """`[N]` each. A row whose logits are no distribution (NaN, infinite) has log-probs that are not finite."""

    tokens: Tensor
    logprobs: Tensor
    sampled_logprobs: Tensor


def sample(logits: Tensor, draws: Draws, suppressed: dict[int, list[int]] | None = None) -> Sampled:
    """Draw one token for each row of `logits` `[N, V]`, float32 or float64.

    Settings apply in the order temperature, top-k, top-p, min-p. Temperature 0 takes the lowest of the most likely
    ids, whose log-prob in the distribution drawn from is 0. `suppressed` names ids that a row must not draw; the raw
    log-prob ignores that.
    """
    allowed = _suppress(logits, suppressed) if suppressed else logits
    kinds = draws.kinds
    present = np.unique(kinds)
    if len(present) == 1:
        tokens, processed = _METHODS[present[0]](allowed, draws)
    else:
        tokens = torch.empty(len(draws), dtype=torch.long, device=logits.device)
        processed = logits.new_empty(len(draws))
        for kind in present:
            group = kinds == kind
            rows = torch.from_numpy(np.flatnonzero(group)).to(logits.device)
            tokens[rows], processed[rows] = _METHODS[kind](allowed[rows], draws.rows(group))
    raw = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    return Sampled(tokens, raw, processed)


def keep(scaled: Tensor, draws: Draws) -> Tensor:
    """Which ids top-k, top-p and min-p leave, `[N, V]` bool, for logits already divided by the temperature.

    Each is a floor under the logits, so ids with equal logits are kept or dropped together.
    """
    scaled = scaled - scaled.amax(-1, keepdim=True)
    return scaled >= _floors(scaled, draws)


def _suppress(logits: Tensor, suppressed: dict[int, list[int]]) -> Tensor:
    masked = logits.clone()
    for row, ids in suppressed.items():
        masked[row, ids] = float("-inf")
    return masked


def _column(values: NDArray[np.float64], like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values[:, None], dtype=dtype, device=like.device)


def _greedy(logits: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    # Zero, unless the row holds something that is not a number.
    best, tokens = logits.max(-1)
    return tokens, best - best


def _filtered(logits: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    return _draw(logits, draws, filters=True)


def _draw(logits: Tensor, draws: Draws, filters: bool = False) -> tuple[Tensor, Tensor]:
    """Ids and log-probs in the processed distribution, `[N]` each."""
    # The maximum goes first, so that a tiny temperature cannot overflow: the best id stays at 0.
    scaled = logits - logits.amax(-1, keepdim=True)
    if (draws.temperature != 1).any():
        scaled /= _column(np.maximum(draws.temperature, _COLDEST), logits, logits.dtype)
    if filters:
        scaled.masked_fill_(scaled < _floors(scaled, draws), float("-inf"))
    cumulative = scaled.exp().cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    target = _column(draws.uniform, logits, torch.float64) * total
    # The clamp matters only for rows that are no distribution; their log-probs say so.
    tokens = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[-1] - 1)
    logprobs = scaled.gather(-1, tokens) - total.log()
    return tokens[:, 0], logprobs[:, 0].to(logits.dtype)


_METHODS = (_greedy, _draw, _filtered)
"""By `Draws.kinds`."""


def _floors(scaled: Tensor, draws: Draws) -> Tensor:
    """The lowest logit each row keeps, `[N, 1]`; `scaled` has its maximum at 0."""
    with np.errstate(divide="ignore"):
        floors = _column(np.log(draws.min_p), scaled, scaled.dtype)
    size = scaled.shape[-1]
    top_k, top_p = draws.top_k, draws.top_p
    pending = np.flatnonzero((top_k > 0) | (top_p < 1))
    count = min(size, max(_CANDIDATES, int(min(top_k.max(initial=0), size))))
    while len(pending):
        found, certain = _nucleus(scaled[pending], top_k[pending], top_p[pending], count)
        done = pending[certain]
        floors[done] = torch.maximum(floors[done], found[certain])
        pending = pending[~certain]
        count = min(size, count * 8)
    return floors


def _nucleus(
    scaled: Tensor, top_k: NDArray[np.float64], top_p: NDArray[np.float64], count: int
) -> tuple[Tensor, NDArray[np.bool_]]:
    """Floors by top-k, then top-p over what top-k left, from the `count` highest logits; and which are certain.

    An uncertain floor is too high: the nucleus reaches past the candidates.
    """
    size = scaled.shape[-1]
    highest = scaled.topk(count, dim=-1).values
    last = np.where(top_k > 0, np.minimum(top_k, size), size).astype(np.int64) - 1
    floor = highest.gather(-1, torch.from_numpy(np.minimum(last, count - 1)[:, None]).to(scaled.device))
    floor = torch.where(_column(top_k, scaled, torch.float64) > 0, floor, float("-inf"))
    mass = scaled.exp().masked_fill_(scaled < floor, 0).sum(-1, keepdim=True, dtype=torch.float64)
    weights = highest.exp().masked_fill_(highest < floor, 0)
    before = weights.cumsum(-1, dtype=torch.float64) - weights
    wanted = (before < _column(top_p, scaled, torch.float64) * mass) & (weights > 0)
    kept = wanted.sum(-1, keepdim=True).clamp_(min=1)
    by_p = highest.gather(-1, kept - 1)
    off = _column(top_p, scaled, torch.float64) >= 1
    certain = off | (kept < count) | (count == size)
    return torch.where(off, floor, torch.maximum(floor, by_p)), certain[:, 0].cpu().numpy()
