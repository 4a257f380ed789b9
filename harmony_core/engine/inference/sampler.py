"""From logits to tokens, with the log-prob of each token in the raw distribution and in the one it was sampled from.

A token is drawn by inverse CDF: the lowest id whose cumulative probability, summed in float64 in the order of ids,
exceeds the row's random number. A row depends only on its own logits. N rows, V ids, W the width of the working copy: V
rounded up to whole chunks, with probability 0 beyond V.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmony_core.engine.inference.step import (
    FILTERED,
    GREEDY,
    KIND,
    MIN_P,
    PLAIN,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    UNIFORM,
    SamplingParameters,
)
from harmony_core.engine.models.allowed import AllowedTokens
from harmony_core.engine.models.heads import token_logprobs
from harmony_core.engine.models.model import CausalLM
from harmony_core.grammar import Limits, Mask

CHUNK = 256
"""Ids per chunk: the id is searched in the sums of chunks first, then within its chunk."""
FEW = 2048
"""Allowed tokens up to which a constrained row on CPU is sampled from them alone."""
COLDEST = 1e-30
"""Lower temperatures are raised to this one, which is greedy in effect and within the range of float32."""


class Sampled(NamedTuple):
    """`[N]` each. A row with NaN or infinite logits has log-probs that are not finite."""

    tokens: Tensor
    logprobs: Tensor
    sampled_logprobs: Tensor


def put(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a tensor on `device`, without waiting for work in flight there."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def sample(
    logits: Tensor,
    parameters: SamplingParameters,
    suppressed: dict[int, list[int]] | None = None,
    tokenless: Tensor | None = None,
) -> Sampled:
    """Sample one token for each row of `logits` `[N, V]`, float32 or float64.

    Settings apply in the order temperature, top-k, top-p, min-p. Temperature 0 takes the lowest of the most likely
    ids, whose log-prob in the processed distribution is 0. `suppressed`: ids that a row must not sample. `tokenless`
    `[K]`: ids that no row may sample; they are removed from `logits` in place. Raw log-probs ignore both.
    """
    lost = None if tokenless is None else hide(logits, tokenless)
    allowed = _suppress(logits, suppressed) if suppressed else logits
    settings = put(parameters.copy(), logits.device)
    # All passes share one working copy: allocating memory costs more than the arithmetic here.
    work = _work(logits)
    kinds = set(parameters[KIND].tolist())
    if len(kinds) == 1:
        tokens, processed = _sample_alike(allowed, parameters, settings, work)
    else:
        tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
        processed = logits.new_empty(len(logits))
        for kind in kinds:
            group = np.flatnonzero(parameters[KIND] == kind)
            rows = put(group, logits.device)
            tokens[rows], processed[rows] = _sample_alike(
                allowed[rows], parameters[:, group], settings[:, rows], work[: len(rows)]
            )
    logprobs = processed
    if suppressed or kinds != {PLAIN} or (parameters[TEMPERATURE] != 1).any():
        logprobs = _raw(logits, tokens, work)
    if lost is not None:
        logprobs = with_lost(logprobs, logits.gather(-1, tokens[:, None])[:, 0], lost)
    return Sampled(tokens, logprobs, processed)


def _sample_alike(
    logits: Tensor, parameters: SamplingParameters, settings: Tensor, work: Tensor
) -> tuple[Tensor, Tensor]:
    """`_greedy` or `_draw` for rows of one kind, skipping the passes that their `parameters` do not need."""
    if parameters[KIND, 0] == GREEDY:
        return _greedy(logits)
    heated = bool((parameters[TEMPERATURE] != 1).any())
    ranked = bool(((parameters[TOP_K] > 0) | (parameters[TOP_P] < 1)).any())
    return _draw(logits, settings, work, heated=heated, filtered=parameters[KIND, 0] == FILTERED, ranked=ranked)


def draw(
    model: CausalLM, hidden: Tensor, parameters: SamplingParameters, limits: Limits, tokenless: Tensor | None
) -> tuple[Tensor, ...]:
    """Sample a token for each row of `hidden` `[N, d]`. Returns `Sampled`, and log-probs over the allowed tokens."""
    if model.deterministic:
        return _sample_alone(model, hidden, parameters, limits, tokenless)
    logits = model.logits(hidden)
    if limits.allowed:
        return _sample_allowed(logits, parameters, limits, tokenless)
    sampled = sample(logits, parameters, limits.suppressed, tokenless)
    return *sampled, sampled.logprobs


def _sample_allowed(
    logits: Tensor, parameters: SamplingParameters, limits: Limits, tokenless: Tensor | None
) -> tuple[Tensor, ...]:
    """As `draw`. On CPU a row with few allowed tokens is sampled from these alone, which takes a fraction of the time.

    It depends on the row itself which way it goes, so that its neighbours do not change what is drawn.
    """
    masking = Masking(logits, limits.allowed)
    bits: dict[int, NDArray[np.bool_]] = {}
    if logits.is_cuda:
        masking.apply()
    else:
        bits = {place: _bits(mask, logits.shape[-1]) for place, mask in limits.allowed.items()}
    few = [place for place in bits if place not in limits.suppressed and np.count_nonzero(bits[place]) <= FEW]
    rest = sorted({*range(len(logits))}.difference(few))
    numbers = logits.new_zeros(4, len(logits), dtype=torch.float64)
    if few:
        ids, part = torch.zeros(len(few), FEW, dtype=torch.long), logits.new_full((len(few), FEW), float("-inf"))
        for row, place in enumerate(few):
            own = torch.from_numpy(np.flatnonzero(bits[place]))
            ids[row, : len(own)], part[row, : len(own)] = own, logits[place, own]
        found = sample(part, parameters[:, few])
        numbers[:3, few] = torch.stack([values.double() for values in found])
        numbers[0, few] = ids.gather(1, found.tokens[:, None])[:, 0].double()
    if rest:
        for place in bits.keys() & rest:
            logits[place].masked_fill_(torch.from_numpy(~bits[place]), float("-inf"))
        held = {row: limits.suppressed[place] for row, place in enumerate(rest) if place in limits.suppressed}
        found = sample(logits[rest] if few else logits, parameters[:, rest], held, tokenless)
        numbers[:3, rest] = torch.stack([values.double() for values in found])
    masking.record(numbers)
    return numbers[0].long(), *numbers[1:]


class Masking:
    """Limits samples of constrained rows of `logits` `[N, V]` to their allowed tokens, which raw log-probs ignore.

    `record` comes after sampling, `apply` before it, unless the rows are limited in another way.
    """

    def __init__(self, logits: Tensor, allowed: Mapping[int, Mask]) -> None:
        self._logits, self._allowed = logits, allowed
        self._rows = put(np.array(list(allowed), dtype=np.int64), logits.device)
        self._kernels = logits.is_cuda and logits.dtype == torch.float32
        if not self._kernels:
            # The places are in order.
            part = logits if len(allowed) == len(logits) else logits[self._rows]
            best = part.amax(-1, keepdim=True)
            self._total = best[:, 0].double() + (part - best).exp_().sum(-1).double().log()

    def apply(self, masks: Tensor | None = None) -> None:
        """Remove what is not allowed from the logits, in place. `masks`: the masks on the device, if they are there."""
        if masks is None:
            masks = put(np.stack(list(self._allowed.values())), self._logits.device)
        if self._kernels:
            from harmony_core.engine.kernels.sampling import mask_rows

            self._total = mask_rows(self._logits, self._rows, masks)
            return
        size, places = self._logits.shape[-1], torch.arange(32, dtype=torch.int32, device=masks.device)
        keeps = ((masks[:, :, None] >> places) & 1).flatten(1)[:, :size] != 0
        self._logits[self._rows] = self._logits[self._rows].masked_fill_(~keeps, float("-inf"))

    def record(self, numbers: Tensor) -> None:
        """Given tokens and log-probs at temperature 1 over the allowed ones in rows 0 and 1 of `numbers` `[4, N]`, move
        the latter to row 3, and set row 1 to the raw ones."""
        rows = self._rows
        if self._kernels:
            from harmony_core.engine.kernels.sampling import record_masked

            return record_masked(self._logits, rows, self._total, numbers)
        chosen = self._logits[rows, numbers[0, rows].long()].double()
        numbers[3, rows] = numbers[1, rows]
        numbers[1, rows] = chosen - self._total


def _bits(masks: NDArray[np.int32], size: int) -> NDArray[np.bool_]:
    """The first `size` bits of each mask."""
    return np.unpackbits(masks.view(np.uint8), axis=-1, count=size, bitorder="little").view(np.bool_)


def sample_on_device(logits: Tensor, settings: Tensor, kind: int) -> Sampled:
    """`sample` for rows of any kinds up to `kind` (GREEDY < PLAIN < FILTERED), with `settings` `[6, N]` on the device.

    It never reads values from the device, so a CUDA graph can hold it; all rows cost as much as kind `kind`.
    """
    tokens, processed = _greedy(logits)
    work = _work(logits)
    if kind != GREEDY:
        warm = settings[TEMPERATURE] != 0
        drawn, logprobs = _draw(logits, settings, work, heated=True, filtered=kind == FILTERED, ranked=True)
        tokens, processed = torch.where(warm, drawn, tokens), torch.where(warm, logprobs, processed)
    return Sampled(tokens, _raw(logits, tokens, work), processed)


def hide(logits: Tensor, ids: Tensor) -> Tensor:
    """Remove `ids` `[K]` from `logits` `[N, V]`, in place. Returns the log of their mass, `[N]` float64."""
    lost = logits.index_select(-1, ids).logsumexp(-1).double()
    logits.index_fill_(-1, ids, float("-inf"))
    return lost


def with_lost(logprobs: Tensor, chosen: Tensor, lost: Tensor) -> Tensor:
    """Convert log-probs `[N]` after `hide` to those in the whole distribution. `chosen`: the tokens' logits."""
    chosen = chosen.double()
    return (chosen - torch.logaddexp(chosen - logprobs, lost)).to(logprobs.dtype)


def _suppress(logits: Tensor, suppressed: dict[int, list[int]]) -> Tensor:
    """A copy of the logits in which each row in `suppressed` cannot sample its ids."""
    rows = [row for row, ids in suppressed.items() for _ in ids]
    places = put(np.array([rows, [id for ids in suppressed.values() for id in ids]], dtype=np.int64), logits.device)
    masked = logits.clone()
    masked[places[0], places[1]] = float("-inf")
    return masked


def keep(scaled: Tensor, parameters: SamplingParameters) -> Tensor:
    """Mask `[N, V]` of the ids that top-k, top-p and min-p keep, for logits already divided by the temperature.

    Each filter is a floor under the logits, so ids with equal logits are kept or dropped together.
    """
    scaled = scaled - scaled.amax(-1, keepdim=True)
    return scaled >= _floors(scaled, put(parameters.copy(), scaled.device), ranked=True)


def _work(logits: Tensor) -> Tensor:
    return logits.new_empty(len(logits), -(-logits.shape[-1] // CHUNK) * CHUNK)


def _greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    # Zero, unless the row holds a NaN.
    best, tokens = logits.max(-1)
    return tokens, best - best


def _raw(logits: Tensor, tokens: Tensor, work: Tensor) -> Tensor:
    """Log-probs `[N]` of `tokens` at temperature 1. `work` is overwritten."""
    best = logits.amax(-1, keepdim=True)
    total = torch.sub(logits, best, out=work[:, : logits.shape[-1]]).exp_().sum(-1, dtype=torch.float64)
    chosen = logits.gather(-1, tokens[:, None]) - best
    return chosen[:, 0] - total.log().to(logits.dtype)


def _draw(
    logits: Tensor, settings: Tensor, work: Tensor, *, heated: bool, filtered: bool, ranked: bool
) -> tuple[Tensor, Tensor]:
    """Ids and log-probs in the processed distribution, `[N]` each. `work` `[N, W]` is overwritten.

    `heated`: some temperature is not 1; `filtered`: some row has a filter; `ranked`: one of them top-k or top-p.
    """
    # Subtract the maximum first, so that a tiny temperature cannot overflow: the best id stays at 0.
    best = logits.amax(-1, keepdim=True)
    size = logits.shape[-1]
    torch.sub(logits, best, out=work[:, :size])
    work[:, size:] = float("-inf")
    heat = settings[TEMPERATURE, :, None].clamp(min=COLDEST).to(logits.dtype)
    if heated:
        work /= heat
    if filtered:
        work.masked_fill_(work < _floors(work, settings, ranked), float("-inf"))
    tokens, total = _invert(work.exp_(), settings[UNIFORM, :, None])
    # The clamp matters only for rows with NaN or infinite logits, whose log-probs are not finite.
    tokens.clamp_(max=size - 1)
    chosen = logits.gather(-1, tokens) - best
    if heated:
        chosen /= heat
    return tokens[:, 0], (chosen - total.log())[:, 0].to(logits.dtype)


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Ids at `uniform` `[N, 1]` of the cumulative `weights` `[N, W]`, and the weights' sums, `[N, 1]` each.

    In a large vocabulary, find the chunk by the chunks' sums, then the id within it. An id of weight 0 is never found.
    """
    if weights.shape[-1] <= 8 * CHUNK:
        ends = weights.cumsum(-1, dtype=torch.float64)
        return torch.searchsorted(ends, uniform * ends[:, -1:], right=True), ends[:, -1:]
    chunks = weights.view(len(weights), -1, CHUNK)
    ends = chunks.sum(-1, dtype=torch.float64).cumsum(-1)
    total = ends[:, -1:]
    target = uniform * total
    chunk = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[1] - 1)
    start = torch.where(chunk > 0, ends.gather(-1, (chunk - 1).clamp_(min=0)), 0.0)
    inside = chunks.gather(1, chunk[:, :, None].expand(-1, -1, CHUNK))[:, 0].cumsum(-1, dtype=torch.float64)
    # The two sums of a chunk may differ in the last bit: never step over its last id.
    last = torch.searchsorted(inside, inside[:, -1:].contiguous())
    found = torch.minimum(torch.searchsorted(inside, target - start, right=True), last)
    return chunk * CHUNK + found, total


def _floors(scaled: Tensor, settings: Tensor, ranked: bool) -> Tensor:
    """The lowest logit each row keeps, `[N, 1]`; `scaled` has its maximum at 0."""
    top_k, top_p, min_p = settings[TOP_K : MIN_P + 1, :, None].unbind(0)
    floors = min_p.log().to(scaled.dtype)
    if not ranked:
        return floors
    size = scaled.shape[-1]
    best_first = _descending(scaled)
    ranks = torch.where(top_k > 0, top_k.clamp(max=size), float(size)).long()
    by_k = best_first.gather(-1, ranks - 1)
    # top-p applies to the ids that top-k keeps: the first ids whose probabilities reach its share of theirs.
    ends = best_first.exp().masked_fill_(best_first < by_k, 0).cumsum(-1, dtype=torch.float64)
    last = torch.searchsorted(ends, top_p * ends[:, -1:]).clamp_(max=size - 1)
    by_p = torch.where(top_p < 1, best_first.gather(-1, last), by_k)
    return torch.maximum(floors, torch.maximum(by_k, by_p))


def _descending(values: Tensor) -> Tensor:
    if values.is_cpu:
        # numpy sorts with vector instructions, tens of times as fast as torch does here.
        return torch.from_numpy(np.sort(-values.numpy(), axis=-1)).neg_()
    return values.sort(dim=-1, descending=True).values


def _sample_alone(
    model: CausalLM, hidden: Tensor, parameters: SamplingParameters, limits: Limits, tokenless: Tensor | None
) -> tuple[Tensor, ...]:
    """As `draw`, with bits that depend on a row's own `hidden` only."""
    logits, suppressed, allowed = model.logits(hidden), limits.suppressed, limits.allowed
    for i, mask in allowed.items():
        Masking(logits[i : i + 1], {0: mask}).apply()
    rows = [
        sample(logits[i : i + 1], parameters[:, i : i + 1], {0: suppressed[i]} if i in suppressed else None, tokenless)
        for i in range(len(logits))
    ]
    tokens, _, processed = map(torch.cat, zip(*rows, strict=True))
    logprobs = token_logprobs(model, hidden, tokens)
    raw = (parameters[KIND] == PLAIN) & (parameters[TEMPERATURE] == 1) & (tokenless is None)
    raw[[*suppressed, *allowed]] = False
    masked = logprobs
    if allowed:  # as the trainer computes them
        masks = [np.full_like(next(iter(allowed.values())), -1), *allowed.values()]
        index = torch.zeros_like(tokens)
        index[list(allowed)] = torch.arange(1, len(masks))
        places = AllowedTokens(index, torch.from_numpy(np.stack(masks).view(np.uint8)))
        masked = token_logprobs(model, hidden, tokens, allowed=places)
    # Rows sampled from the raw distribution get the same number for both, not two that differ in the last bit.
    return tokens, logprobs, torch.where(torch.from_numpy(raw), logprobs, processed), masked
