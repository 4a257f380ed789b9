"""Sampling on CUDA by Triton kernels: one pass over the logits sums every chunk of a row, another finds the id.

The algorithm is that of `inference.sampler`: inverse CDF over ids at a given number, sums in float64, equal logits
kept or dropped together; results differ from it only by rounding. top-k and top-p need no sorting: the lowest logit
that they keep is found four bits at a time. N rows, V ids, C chunks of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 4096
_BLOCK = 256
"""Ids per block, a part of a chunk; the id is searched in the sums of blocks first."""
_SETTINGS = ["temperature", "uniform", "wanted"]
"""Rows of one matrix. Their alignment depends on the number of rows, and the compiled code should not."""


@triton.jit
def _divide(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    return tl.math.div_rn(x, y)


@triton.jit
def _heat(temperature: tl.tensor, row: tl.tensor) -> tl.tensor:
    # `COLDEST` of the sampler.
    return tl.maximum(tl.load(temperature + row), 1e-30).to(tl.float32)


# fmt: off
@triton.jit(do_not_specialize_on_alignment=_SETTINGS)
def _summarise(
    logits: tl.tensor, temperature: tl.tensor, tops: tl.tensor, floors: tl.tensor, maxima: tl.tensor, ids: tl.tensor,
    raw: tl.tensor, sums: tl.tensor, stride: int, size: int, DRAWS: tl.constexpr, FILTERED: tl.constexpr,
    SCORES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
) -> None:
    # fmt: on
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    place = row * tl.num_programs(1) + chunk
    part = tl.arange(0, CHUNK // BLOCK)
    index = chunk * CHUNK + part[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(logits + row * stride + index, mask=index < size, other=-float("inf"))
    top = tl.max(tl.max(x, 1), 0)
    # In a chunk of minus infinities all weights are 0; subtracting the maximum would give NaN.
    base = tl.where(top == -float("inf"), 0.0, top)
    if SCORES:
        tl.store(maxima + place, top)
        tl.store(ids + place, tl.min(tl.min(tl.where(x == top, index, size), 1), 0))
        tl.store(raw + place, tl.sum(tl.sum(tl.exp(x - base).to(tl.float64), 1), 0))
    if DRAWS:
        heat = _heat(temperature, row)
        if FILTERED:
            scaled = _divide(x - tl.load(tops + row), heat)
            weights = tl.where(scaled < tl.load(floors + row), 0.0, tl.exp(scaled))
        else:
            weights = tl.exp(_divide(x - base, heat))
        tl.store(sums + place * (CHUNK // BLOCK) + part, tl.sum(weights.to(tl.float64), 1))


# fmt: off
@triton.jit(do_not_specialize_on_alignment=_SETTINGS)
def _pick(
    logits: tl.tensor, temperature: tl.tensor, uniform: tl.tensor, floors: tl.tensor, maxima: tl.tensor,
    ids: tl.tensor, raw: tl.tensor, sums: tl.tensor, slots: tl.tensor, last: tl.tensor, outputs: tl.tensor,
    stride: int, size: int, chunks: int, DRAWS: tl.constexpr, FILTERED: tl.constexpr, CHUNKS_PADDED: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:
    # fmt: on
    row = tl.program_id(0).to(tl.int64)
    values = logits + row * stride
    chunk = tl.arange(0, CHUNKS_PADDED)
    known = chunk < chunks
    highest = tl.load(maxima + row * chunks + chunk, mask=known, other=-float("inf"))
    top = tl.max(highest, 0)
    best = tl.load(ids + row * chunks + chunk, mask=known, other=size)
    token = tl.minimum(tl.min(tl.where(highest == top, best, size), 0), size - 1)
    mass = tl.load(raw + row * chunks + chunk, mask=known, other=0.0)
    total_raw = tl.sum(mass * tl.exp(highest - top).to(tl.float64), 0)
    # Zero, unless the row holds a NaN.
    processed = total_raw - total_raw
    if DRAWS:
        heat = _heat(temperature, row)
        block = tl.arange(0, CHUNKS_PADDED * PARTS)
        real = block < chunks * PARTS
        weight = tl.load(sums + row * chunks * PARTS + block, mask=real, other=0.0)
        base = tl.load(maxima + row * chunks + block // PARTS, mask=real, other=-float("inf"))
        if not FILTERED:
            weight = weight * tl.exp(_divide(base - top, heat)).to(tl.float64)
        ends = tl.cumsum(weight, 0)
        total = tl.sum(tl.where(block == chunks * PARTS - 1, ends, 0.0), 0)
        target = tl.load(uniform + row) * total
        found = tl.minimum(tl.sum((real & (ends <= target)).to(tl.int32), 0), chunks * PARTS - 1)
        start = tl.sum(tl.where(block == found - 1, ends, 0.0), 0)
        lane = tl.arange(0, BLOCK)
        x = tl.load(values + found * BLOCK + lane, mask=found * BLOCK + lane < size, other=-float("inf"))
        if FILTERED:
            scaled = _divide(x - top, heat)
            inside = tl.where(scaled < tl.load(floors + row), 0.0, tl.exp(scaled)).to(tl.float64)
        else:
            mine = tl.sum(tl.where(block == found, base, 0.0), 0)
            share = tl.exp(_divide(mine - top, heat)).to(tl.float64)
            inside = tl.exp(_divide(x - tl.where(mine == -float("inf"), 0.0, mine), heat)).to(tl.float64) * share
        inside = tl.cumsum(inside, 0)
        whole = tl.sum(tl.where(lane == BLOCK - 1, inside, 0.0), 0)
        # The two sums of a block may differ in the last bit: never step over its last id.
        place = tl.sum((inside <= target - start).to(tl.int32), 0)
        place = tl.minimum(place, tl.sum((inside < whole).to(tl.int32), 0))
        drawn = tl.minimum(found * BLOCK + place, size - 1)
        logprob = _divide(tl.load(values + drawn) - top, heat).to(tl.float64) - tl.log(total)
        warm = tl.load(temperature + row) != 0
        token = tl.where(warm, drawn, token)
        processed = tl.where(warm, logprob, processed)
    rows = tl.num_programs(0)
    tl.store(outputs + row, token.to(tl.float64))
    tl.store(outputs + rows + row, (tl.load(values + token) - top).to(tl.float64) - tl.log(total_raw))
    tl.store(outputs + 2 * rows + row, processed)
    tl.store(last + tl.load(slots + row), token.to(tl.int64))


# fmt: off
@triton.jit(do_not_specialize=["shift"], do_not_specialize_on_alignment=_SETTINGS)
def _count_keys(
    logits: tl.tensor, temperature: tl.tensor, wanted: tl.tensor, tops: tl.tensor, found: tl.tensor,
    limits: tl.tensor, counts: tl.tensor, stride: int, size: int, shift: int, MASS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # fmt: on
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    wish = tl.load(wanted + row)
    if (wish < 1) if MASS else (wish > 0):
        index = chunk * CHUNK + tl.arange(0, CHUNK // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        x = tl.load(logits + row * stride + index, mask=index < size, other=-float("inf"))
        # Bits of the distance below the row's maximum: they grow as logits fall.
        below = tl.abs(_divide(x - tl.load(tops + row), _heat(temperature, row)))
        key = below.to(tl.int32, bitcast=True)
        # Two shifts: shifting by all bits of a number at once is undefined.
        inside = (key <= tl.load(limits + row)) & (((key >> shift) >> 4) == ((tl.load(found + row) >> shift) >> 4))
        into = counts + (row * tl.num_programs(1) + chunk) * 16
        if tl.max(tl.max(inside.to(tl.int32), 1), 0) > 0:
            amount = tl.where(inside, 1.0, 0.0)
            if MASS:
                amount = tl.where(inside, tl.exp(-below), 0.0)
            amount = amount.to(tl.float64)
            for digit in range(16):
                mine = tl.where(((key >> shift) & 15) == digit, amount, 0.0)
                tl.store(into + digit, tl.sum(tl.sum(mine, 1), 0))
        else:
            tl.store(into + tl.arange(0, 16), tl.zeros((16,), tl.float64))


# fmt: off
@triton.jit(do_not_specialize=["shift"], do_not_specialize_on_alignment=_SETTINGS)
def _choose_digit(
    wanted: tl.tensor, found: tl.tensor, needed: tl.tensor, limits: tl.tensor, counts: tl.tensor, size: int,
    chunks: int, shift: int, MASS: tl.constexpr, CHUNKS_PADDED: tl.constexpr,
) -> None:
    # fmt: on
    row = tl.program_id(0).to(tl.int64)
    wish = tl.load(wanted + row)
    if (wish < 1) if MASS else (wish > 0):
        digit = tl.arange(0, 16)
        chunk = tl.arange(0, CHUNKS_PADDED)[:, None]
        parts = tl.load(counts + (row * chunks + chunk) * 16 + digit[None, :], mask=chunk < chunks, other=0.0)
        sums = tl.sum(parts, 0)
        left = tl.load(needed + row)
        if shift == 28:
            left = wish * tl.sum(sums, 0) if MASS else tl.minimum(wish, size)
        ends = tl.cumsum(sums, 0)
        step = tl.minimum(tl.sum((ends < left).to(tl.int32), 0), 15)
        tl.store(needed + row, left - tl.sum(tl.where(digit == step - 1, ends, 0.0), 0))
        key = tl.load(found + row) | (step << shift)
        if shift == 0:
            tl.store(limits + row, tl.minimum(tl.load(limits + row), key))
            key = key * 0
        tl.store(found + row, key)


# fmt: off
@triton.jit
def _mask(
    logits: tl.tensor, rows: tl.tensor, masks: tl.tensor, totals: tl.tensor, stride: int, size: int, words: int,
    BLOCK: tl.constexpr,
) -> None:
    # fmt: on
    place = tl.program_id(0).to(tl.int64)
    values = logits + tl.load(rows + place) * stride
    lane = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        index = start + lane
        x = tl.load(values + index, mask=index < size, other=-float("inf"))
        word = tl.load(masks + place * words + index // 32, mask=index < size, other=0)
        higher = tl.maximum(top, x)
        base = tl.where(higher == -float("inf"), 0.0, higher)
        mass = mass * tl.exp(top - base).to(tl.float64) + tl.exp(x - base).to(tl.float64)
        top = higher
        tl.store(values + index, tl.where((word >> (index % 32)) & 1 != 0, x, -float("inf")), mask=index < size)
    best = tl.max(top, 0)
    base = tl.where(best == -float("inf"), 0.0, best)
    tl.store(totals + place, base.to(tl.float64) + tl.log(tl.sum(mass * tl.exp(top - base).to(tl.float64), 0)))


@triton.jit
def _record_masked(
    logits: tl.tensor, rows: tl.tensor, totals: tl.tensor, outputs: tl.tensor, stride: int, size: int
) -> None:
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place)
    chosen = tl.load(logits + row * stride + tl.load(outputs + row).to(tl.int64)).to(tl.float64)
    tl.store(outputs + 3 * size + row, tl.load(outputs + size + row))
    tl.store(outputs + size + row, chosen - tl.load(totals + place))


def mask_rows(logits: Tensor, rows: Tensor, masks: Tensor) -> Tensor:
    """Set the logits that `masks` do not allow to minus infinity, in `rows` of `logits` `[N, V]` float32, in place.

    `rows` `[R]` int64; `masks` `[R, words]` int32, bit i of word w for id 32 w + i. Returns the logs of the rows' sums
    of exponentials before, `[R]` float64.
    """
    assert logits.stride(1) == 1 and masks.is_contiguous()
    totals = torch.empty(len(rows), dtype=torch.float64, device=logits.device)
    sizes = (logits.stride(0), logits.shape[1], masks.shape[1])
    _mask[(len(rows),)](logits, rows, masks, totals, *sizes, BLOCK=_CHUNK, num_warps=8)
    return totals


def record_masked(logits: Tensor, rows: Tensor, totals: Tensor, outputs: Tensor) -> None:
    """In `outputs` `[4, N]` float64, move row 1, log-probs over allowed ids, to row 3, and set it to the raw ones."""
    _record_masked[(len(rows),)](logits, rows, totals, outputs, logits.stride(0), outputs.shape[1])


def _find_floors(logits: Tensor, draws: Tensor, maxima: Tensor, tops: Tensor, floors: Tensor) -> None:
    """Find the lowest scaled logit that each row keeps, `[N]`, after top-k, then top-p, and min-p.

    Its bits are found four at a time from the highest, by counting ids or summing mass up to each digit.
    """
    rows, size = logits.shape
    chunks, device = maxima.shape[1], logits.device
    temperature, top_k, top_p, min_p, _ = draws[1:].unbind(0)
    torch.amax(maxima, 1, out=tops)
    found = torch.zeros(rows, dtype=torch.int32, device=device)
    needed = torch.zeros(rows, dtype=torch.float64, device=device)
    # Infinity: no logit is too low.
    limits = torch.full((rows,), 0x7F800000, dtype=torch.int32, device=device)
    counts = torch.empty((rows, chunks, 16), dtype=torch.float64, device=device)
    for wanted, mass in ((top_k, False), (top_p, True)):
        for shift in range(28, -1, -4):
            _count_keys[(rows, chunks)](
                *(logits, temperature, wanted, tops, found, limits, counts, logits.stride(0), size, shift),
                MASS=mass,
                CHUNK=_CHUNK,
                BLOCK=_BLOCK,
                num_warps=8,
            )
            _choose_digit[(rows,)](
                *(wanted, found, needed, limits, counts, size, chunks, shift),
                MASS=mass,
                CHUNKS_PADDED=triton.next_power_of_2(chunks),
                num_warps=4,
            )
    torch.maximum(-limits.view(torch.float32), min_p.log().float(), out=floors)


def draw_tokens(
    logits: Tensor, draws: Tensor, slots: Tensor, last: Tensor, outputs: Tensor, *, warm: bool, filtered: bool
) -> None:
    """Sample a token for each row: `outputs` `[3, N]` float64 get ids, raw and processed log-probs, `last[slots]` ids.

    `logits` `[N, V]` float32; `draws` `[6, N]` float64 are `SamplingParameters`; `slots` `[N]` int64. `warm`: some
    temperature is not 0; `filtered`: some row has top-k, top-p or min-p.
    """
    rows, size = logits.shape
    assert logits.stride(1) == 1 and draws.is_contiguous() and outputs.is_contiguous()
    chunks, device = triton.cdiv(size, _CHUNK), logits.device
    maxima = torch.empty((rows, chunks), dtype=torch.float32, device=device)
    ids = torch.empty((rows, chunks), dtype=torch.int32, device=device)
    raw = torch.empty((rows, chunks), dtype=torch.float64, device=device)
    sums = torch.empty((rows, chunks * (_CHUNK // _BLOCK)), dtype=torch.float64, device=device)
    floors, tops = torch.empty((2, rows), dtype=torch.float32, device=device)
    temperature, uniform = draws[1], draws[5]
    padded = triton.next_power_of_2(chunks)
    sizes = (logits.stride(0), size)

    def summarise(draws: bool, filtered: bool, scores: bool) -> None:
        _summarise[(rows, chunks)](
            *(logits, temperature, tops, floors, maxima, ids, raw, sums, *sizes),
            DRAWS=draws,
            FILTERED=filtered,
            SCORES=scores,
            CHUNK=_CHUNK,
            BLOCK=_BLOCK,
            num_warps=8,
        )

    summarise(warm and not filtered, False, True)
    if filtered:
        _find_floors(logits, draws, maxima, tops, floors)
        summarise(True, True, False)
    _pick[(rows,)](
        *(logits, temperature, uniform, floors, maxima, ids, raw, sums, slots, last, outputs, *sizes, chunks),
        DRAWS=warm or filtered,
        FILTERED=filtered,
        CHUNKS_PADDED=padded,
        PARTS=_CHUNK // _BLOCK,
        BLOCK=_BLOCK,
        num_warps=4,
    )
