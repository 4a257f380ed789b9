"""From logits to tokens, with the log-prob of each token in the raw distribution and in the one it was drawn from.

A token is drawn by inverse CDF: the lowest id whose cumulative probability, summed in float64 in the order of ids,
exceeds the row's random number. Every row is computed from its own logits alone. N rows, V ids, W the width of the
working copy: V rounded up to whole blocks, with probability 0 behind V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmony_core.engine.inference.sampling_parameters import FILTERED, GREEDY, PLAIN, SamplingParameters
from harmony_core.engine.models.heads import token_logprobs
from harmony_core.engine.models.model import CausalLM

BLOCK = 256
"""Ids whose probabilities are summed before any of them is looked at."""
COLDEST = 1e-30
"""Temperatures below this draw as this one does; it is greedy already, and in the range of float32."""


@dataclass(frozen=True)
class Sampled:
    """`[N]` each. A row whose logits are no distribution (NaN, infinite) has log-probs that are not finite."""

    tokens: Tensor
    logprobs: Tensor
    sampled_logprobs: Tensor


@dataclass(frozen=True)
class Settings:
    """How rows draw, on the device of their logits: `[N, 1]` float64 each."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor

    @staticmethod
    def of(draws: SamplingParameters, device: torch.device) -> Settings:
        """What a step plan says, on `device`."""
        values = (draws.temperature, draws.top_k, draws.top_p, draws.min_p, draws.uniform)
        return Settings(*put(np.stack(values), device)[:, :, None].unbind(0))

    @staticmethod
    def on_device(draws: Tensor) -> Settings:
        """From the rows of `SamplingParameters`, `[6, N]`."""
        return Settings(*draws[1:, :, None].unbind(0))

    def rows(self, which: Tensor) -> Settings:
        """Some of the rows."""
        return Settings(
            self.temperature[which], self.top_k[which], self.top_p[which], self.min_p[which], self.uniform[which]
        )


def put(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array as a tensor on `device`, without waiting for what is under way there."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def sample(
    logits: Tensor,
    draws: SamplingParameters,
    suppressed: dict[int, list[int]] | None = None,
    tokenless: Tensor | None = None,
) -> Sampled:
    """Draw one token for each row of `logits` `[N, V]`, float32 or float64.

    Settings apply in the order temperature, top-k, top-p, min-p. Temperature 0 takes the lowest of the most likely
    ids, whose log-prob in the distribution drawn from is 0. `suppressed` names ids that a row must not draw,
    `tokenless` `[K]` those that no row must, which are taken out of `logits` in place; raw log-probs ignore both.
    """
    lost = None if tokenless is None else hide(logits, tokenless)
    drawn = _sample(logits, draws, suppressed)
    if lost is None:
        return drawn
    chosen = logits.gather(-1, drawn.tokens[:, None])[:, 0]
    return Sampled(drawn.tokens, with_lost(drawn.logprobs, chosen, lost), drawn.sampled_logprobs)


def hide(logits: Tensor, ids: Tensor) -> Tensor:
    """Take `ids` `[K]` out of `logits` `[N, V]`, in place. The log of the mass that they had, `[N]` float64."""
    lost = logits.index_select(-1, ids).logsumexp(-1).double()
    logits.index_fill_(-1, ids, float("-inf"))
    return lost


def with_lost(logprobs: Tensor, chosen: Tensor, lost: Tensor) -> Tensor:
    """Log-probs `[N]` in the whole distribution, from those in what `hide` left; `chosen`: the tokens' logits."""
    chosen = chosen.double()
    return (chosen - torch.logaddexp(chosen - logprobs, lost)).to(logprobs.dtype)


def _sample(logits: Tensor, draws: SamplingParameters, suppressed: dict[int, list[int]] | None) -> Sampled:
    allowed = _suppress(logits, suppressed) if suppressed else logits
    settings = Settings.of(draws, logits.device)
    # One working copy serves every pass: fresh memory costs more than arithmetic here.
    work = _work(logits)
    kinds = sorted({int(kind) for kind in draws.kind})
    if len(kinds) == 1:
        tokens, processed = _of_one_kind(kinds[0], allowed, settings, draws, work)
    else:
        tokens = torch.empty(len(draws), dtype=torch.long, device=logits.device)
        processed = logits.new_empty(len(draws))
        for kind in kinds:
            group = draws.kind == kind
            rows = put(np.flatnonzero(group), logits.device)
            tokens[rows], processed[rows] = _of_one_kind(
                kind, allowed[rows], settings.rows(rows), draws.rows(group), work[: len(rows)]
            )
    if allowed is logits and kinds == [PLAIN] and (draws.temperature == 1).all():
        return Sampled(tokens, processed, processed)
    return Sampled(tokens, _raw(logits, tokens, work), processed)


def _of_one_kind(
    kind: int, logits: Tensor, settings: Settings, draws: SamplingParameters, work: Tensor
) -> tuple[Tensor, Tensor]:
    """`_greedy` or `_draw` without the passes that these rows, known to the host as `draws`, do not need."""
    if kind == GREEDY:
        return _greedy(logits)
    heated = bool((draws.temperature != 1).any())
    ranked = bool(((draws.top_k > 0) | (draws.top_p < 1)).any())
    return _draw(logits, settings, work, heated=heated, filtered=kind == FILTERED, ranked=ranked)


def draw(logits: Tensor, settings: Settings, tail: int) -> Sampled:
    """`sample` for rows of any kinds up to `tail` (GREEDY < PLAIN < FILTERED), without a look at the device's numbers.

    It costs what the dearest kind costs, and a CUDA graph can hold it.
    """
    tokens, processed = _greedy(logits)
    work = _work(logits)
    if tail != GREEDY:
        warm = settings.temperature[:, 0] != 0
        drawn, logprobs = _draw(logits, settings, work, heated=True, filtered=tail == FILTERED, ranked=True)
        tokens, processed = torch.where(warm, drawn, tokens), torch.where(warm, logprobs, processed)
    return Sampled(tokens, _raw(logits, tokens, work), processed)


def _suppress(logits: Tensor, suppressed: dict[int, list[int]]) -> Tensor:
    """A copy in which each named row cannot draw its ids."""
    rows = [row for row, ids in suppressed.items() for _ in ids]
    places = put(np.array([rows, [id for ids in suppressed.values() for id in ids]], dtype=np.int64), logits.device)
    masked = logits.clone()
    masked[places[0], places[1]] = float("-inf")
    return masked


def keep(scaled: Tensor, draws: SamplingParameters) -> Tensor:
    """Which ids top-k, top-p and min-p leave, `[N, V]` bool, for logits already divided by the temperature.

    Each is a floor under the logits, so ids with equal logits are kept or dropped together.
    """
    scaled = scaled - scaled.amax(-1, keepdim=True)
    return scaled >= _floors(scaled, Settings.of(draws, scaled.device), ranked=True)


def _work(logits: Tensor) -> Tensor:
    return logits.new_empty(len(logits), -(-logits.shape[-1] // BLOCK) * BLOCK)


def _greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    # Zero, unless the row holds something that is not a number.
    best, tokens = logits.max(-1)
    return tokens, best - best


def _raw(logits: Tensor, tokens: Tensor, work: Tensor) -> Tensor:
    """Log-probs `[N]` of `tokens` at temperature 1. `work` is overwritten."""
    best = logits.amax(-1, keepdim=True)
    total = torch.sub(logits, best, out=work[:, : logits.shape[-1]]).exp_().sum(-1, dtype=torch.float64)
    chosen = logits.gather(-1, tokens[:, None]) - best
    return chosen[:, 0] - total.log().to(logits.dtype)


def _draw(
    logits: Tensor, settings: Settings, work: Tensor, *, heated: bool, filtered: bool, ranked: bool
) -> tuple[Tensor, Tensor]:
    """Ids and log-probs in the processed distribution, `[N]` each. `work` `[N, W]` is overwritten.

    `heated`: some temperature is not 1; `filtered`: some row has a filter; `ranked`: one of them top-k or top-p.
    """
    # The maximum goes first, so that a tiny temperature cannot overflow: the best id stays at 0.
    best = logits.amax(-1, keepdim=True)
    size = logits.shape[-1]
    torch.sub(logits, best, out=work[:, :size])
    work[:, size:] = float("-inf")
    heat = settings.temperature.clamp(min=COLDEST).to(logits.dtype)
    if heated:
        work /= heat
    if filtered:
        work.masked_fill_(work < _floors(work, settings, ranked), float("-inf"))
    tokens, total = _invert(work.exp_(), settings.uniform)
    # The clamp matters only for rows that are no distribution; their log-probs say so.
    tokens.clamp_(max=size - 1)
    chosen = logits.gather(-1, tokens) - best
    if heated:
        chosen /= heat
    return tokens[:, 0], (chosen - total.log())[:, 0].to(logits.dtype)


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Ids at `uniform` `[N, 1]` of the cumulative `weights` `[N, W]`, and the weights' sums, `[N, 1]` each.

    In a large vocabulary the block is found by the blocks' sums, then the id within it. An id of weight 0 is never
    found.
    """
    if weights.shape[-1] <= 8 * BLOCK:
        ends = weights.cumsum(-1, dtype=torch.float64)
        return torch.searchsorted(ends, uniform * ends[:, -1:], right=True), ends[:, -1:]
    blocks = weights.view(len(weights), -1, BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    total = ends[:, -1:]
    target = uniform * total
    block = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[1] - 1)
    start = torch.where(block > 0, ends.gather(-1, (block - 1).clamp_(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    # The two sums of a block may differ in the last bit: never step over its last id.
    last = torch.searchsorted(inside, inside[:, -1:].contiguous())
    found = torch.minimum(torch.searchsorted(inside, target - start, right=True), last)
    return block * BLOCK + found, total


def _floors(scaled: Tensor, settings: Settings, ranked: bool) -> Tensor:
    """The lowest logit each row keeps, `[N, 1]`; `scaled` has its maximum at 0."""
    floors = settings.min_p.log().to(scaled.dtype)
    if not ranked:
        return floors
    size = scaled.shape[-1]
    best_first = _descending(scaled)
    ranks = torch.where(settings.top_k > 0, settings.top_k.clamp(max=size), float(size)).long()
    by_k = best_first.gather(-1, ranks - 1)
    # The nucleus is taken from what top-k left: the first ids whose probabilities reach its share of theirs.
    ends = best_first.exp().masked_fill_(best_first < by_k, 0).cumsum(-1, dtype=torch.float64)
    last = torch.searchsorted(ends, settings.top_p * ends[:, -1:]).clamp_(max=size - 1)
    by_p = torch.where(settings.top_p < 1, best_first.gather(-1, last), by_k)
    return torch.maximum(floors, torch.maximum(by_k, by_p))


def _descending(values: Tensor) -> Tensor:
    if values.is_cpu:
        # numpy sorts with vector instructions, tens of times as fast as torch does here.
        return torch.from_numpy(np.sort(-values.numpy(), axis=-1)).neg_()
    return values.sort(dim=-1, descending=True).values


def sample_alone(
    model: CausalLM,
    hidden: Tensor,
    draws: SamplingParameters,
    suppressed: dict[int, list[int]],
    tokenless: Tensor | None = None,
) -> Sampled:
    """As `sample(model.logits(hidden), ...)`, with bits that depend on a row's own `hidden` only; `hidden` `[N, d]`."""
    logits = model.logits(hidden)
    rows = [
        sample(
            logits[i : i + 1], draws.rows(slice(i, i + 1)), {0: suppressed[i]} if i in suppressed else None, tokenless
        )
        for i in range(len(draws))
    ]
    tokens = torch.cat([row.tokens for row in rows])
    logprobs = token_logprobs(model, hidden, tokens)
    raw = (draws.kind == PLAIN) & (draws.temperature == 1) & (tokenless is None)
    raw[list(suppressed)] = False
    processed = torch.cat([row.sampled_logprobs for row in rows])
    # Drawn from the raw distribution itself: one number, not two that differ in the last bit.
    return Sampled(tokens, logprobs, torch.where(torch.from_numpy(np.asarray(raw)), logprobs, processed))
