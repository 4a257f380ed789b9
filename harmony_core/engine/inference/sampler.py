"""From logits to tokens, with the log-prob of each token in the raw distribution and in the one it was drawn from.

A token is drawn by inverse CDF: the lowest id whose cumulative probability, summed in float64 in the order of ids,
exceeds the row's random number. Every row is computed from its own logits alone. N rows, V ids, W the width of the
working copy: V rounded up to whole blocks, with probability 0 behind V.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmony_core.engine.inference.draws import FILTERED, GREEDY, PLAIN, Draws

_BLOCK = 256
"""Ids whose probabilities are summed before any of them is looked at."""
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
    size = logits.shape[-1]
    # One working copy serves every pass: fresh memory costs more than arithmetic here.
    work = logits.new_empty(len(logits), -(-size // _BLOCK) * _BLOCK)
    kinds = sorted({int(kind) for kind in draws.kind})
    if len(kinds) == 1:
        tokens, processed = _METHODS[kinds[0]](allowed, draws, work)
    else:
        tokens = torch.empty(len(draws), dtype=torch.long, device=logits.device)
        processed = logits.new_empty(len(draws))
        for kind in kinds:
            group = draws.kind == kind
            rows = torch.from_numpy(np.flatnonzero(group)).to(logits.device)
            tokens[rows], processed[rows] = _METHODS[kind](allowed[rows], draws.rows(group), work[: len(rows)])
    if allowed is logits and kinds == [PLAIN] and (draws.temperature == 1).all():
        return Sampled(tokens, processed, processed)
    best = logits.amax(-1, keepdim=True)
    total = torch.sub(logits, best, out=work[:, :size]).exp_().sum(-1, dtype=torch.float64)
    chosen = logits.gather(-1, tokens[:, None]) - best
    return Sampled(tokens, chosen[:, 0] - total.log().to(logits.dtype), processed)


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


def _greedy(logits: Tensor, draws: Draws, work: Tensor) -> tuple[Tensor, Tensor]:
    # Zero, unless the row holds something that is not a number.
    best, tokens = logits.max(-1)
    return tokens, best - best


def _filtered(logits: Tensor, draws: Draws, work: Tensor) -> tuple[Tensor, Tensor]:
    return _draw(logits, draws, work, filters=True)


def _draw(logits: Tensor, draws: Draws, work: Tensor, filters: bool = False) -> tuple[Tensor, Tensor]:
    """Ids and log-probs in the processed distribution, `[N]` each. `work` `[N, W]` is overwritten."""
    # The maximum goes first, so that a tiny temperature cannot overflow: the best id stays at 0.
    best = logits.amax(-1, keepdim=True)
    size = logits.shape[-1]
    torch.sub(logits, best, out=work[:, :size])
    work[:, size:] = float("-inf")
    heat = None
    if (draws.temperature != 1).any():
        heat = _column(np.maximum(draws.temperature, _COLDEST), logits, logits.dtype)
        work /= heat
    if filters:
        work.masked_fill_(work < _floors(work, draws), float("-inf"))
    tokens, total = _invert(work.exp_(), _column(draws.uniform, logits, torch.float64))
    # The clamp matters only for rows that are no distribution; their log-probs say so.
    tokens.clamp_(max=size - 1)
    chosen = logits.gather(-1, tokens) - best
    if heat is not None:
        chosen /= heat
    return tokens[:, 0], (chosen - total.log())[:, 0].to(logits.dtype)


_METHODS = {GREEDY: _greedy, PLAIN: _draw, FILTERED: _filtered}


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Ids at `uniform` `[N, 1]` of the cumulative `weights` `[N, W]`, and the weights' sums, `[N, 1]` each.

    In a large vocabulary the block is found by the blocks' sums, then the id within it. An id of weight 0 is never
    found.
    """
    if weights.shape[-1] <= 8 * _BLOCK:
        ends = weights.cumsum(-1, dtype=torch.float64)
        return torch.searchsorted(ends, uniform * ends[:, -1:], right=True), ends[:, -1:]
    blocks = weights.view(len(weights), -1, _BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    total = ends[:, -1:]
    target = uniform * total
    block = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[1] - 1)
    start = torch.where(block > 0, ends.gather(-1, (block - 1).clamp_(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    # The two sums of a block may differ in the last bit: never step over its last id.
    last = torch.searchsorted(inside, inside[:, -1:].contiguous())
    found = torch.minimum(torch.searchsorted(inside, target - start, right=True), last)
    return block * _BLOCK + found, total


def _floors(scaled: Tensor, draws: Draws) -> Tensor:
    """The lowest logit each row keeps, `[N, 1]`; `scaled` has its maximum at 0."""
    with np.errstate(divide="ignore"):
        floors = _column(np.log(draws.min_p), scaled, scaled.dtype)
    rows = np.flatnonzero((draws.top_k > 0) | (draws.top_p < 1))
    if not len(rows):
        return floors
    best_first = _descending(scaled if len(rows) == len(draws) else scaled[rows])
    ranks = np.where(draws.top_k > 0, np.minimum(draws.top_k, scaled.shape[-1]), scaled.shape[-1])[rows]
    by_k = best_first.gather(-1, _column(ranks - 1, scaled, torch.long))
    # The nucleus is taken from what top-k left: the first ids whose probabilities reach its share of theirs.
    ends = best_first.exp().masked_fill_(best_first < by_k, 0).cumsum(-1, dtype=torch.float64)
    share = _column(draws.top_p[rows], scaled, torch.float64)
    last = torch.searchsorted(ends, share * ends[:, -1:]).clamp_(max=scaled.shape[-1] - 1)
    by_p = torch.where(share < 1, best_first.gather(-1, last), by_k)
    floors[rows] = torch.maximum(floors[rows], torch.maximum(by_k, by_p))
    return floors


def _descending(values: Tensor) -> Tensor:
    if values.is_cpu:
        # numpy sorts with vector instructions, tens of times as fast as torch does here.
        return torch.from_numpy(np.sort(-values.numpy(), axis=-1)).neg_()
    return values.sort(dim=-1, descending=True).values
