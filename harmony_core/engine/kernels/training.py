"""Kernels of training: AdamW in one pass over memory, and the softmax of the loss.

AdamW: moments, float32 weights and the half-precision weights that are their rounding. The softmax of rows of logits:
its statistics in one pass, its gradient in another. N rows, V columns: a rank's slice of the vocabulary; logits are
float32, and everything is computed in it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


# fmt: off
@triton.jit
def _update(
    gradients: tl.tensor, averages: tl.tensor, squares: tl.tensor, masters: tl.tensor, rounded: tl.tensor,
    scale: float, weight1: float, beta2: float, weight2: float, root_correction: float, eps: float,
    keep: float, step_size: float, count: int, ROUND: tl.constexpr, BLOCK: tl.constexpr,
) -> None:
    # fmt: on
    lanes = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = lanes < count
    gradient = tl.load(gradients + lanes, mask=real, other=0.0) * scale
    average = tl.load(averages + lanes, mask=real, other=0.0)
    square = tl.load(squares + lanes, mask=real, other=0.0)
    master = tl.load(masters + lanes, mask=real, other=0.0)
    average += (gradient - average) * weight1
    square = square * beta2 + gradient * gradient * weight2
    change = tl.div_rn(average, tl.div_rn(tl.sqrt_rn(square), root_correction) + eps)
    master = master * keep - step_size * change
    tl.store(averages + lanes, average, mask=real)
    tl.store(squares + lanes, square, mask=real)
    tl.store(masters + lanes, master, mask=real)
    if ROUND:
        tl.store(rounded + lanes, master.to(rounded.dtype.element_ty), mask=real)


def update_in_one_pass(
    gradients: Tensor,
    averages: Tensor,
    squares: Tensor,
    masters: Tensor,
    rounded: Tensor | None,
    *,
    scale: float,
    beta1: float,
    beta2: float,
    root_correction: float,
    eps: float,
    keep: float,
    step_size: float,
) -> None:
    """One step on N consecutive elements, in place except for `gradients`; all flat and contiguous.

    `rounded` receives the new weights in its own type. `scale` multiplies the gradients; `keep` the weights (decay);
    `root_correction` and `step_size` hold Adam's bias corrections.
    """
    count = gradients.numel()
    _update[(triton.cdiv(count, BLOCK),)](
        gradients,
        averages,
        squares,
        masters,
        masters if rounded is None else rounded,
        *(scale, 1 - beta1, beta2, 1 - beta2, root_correction, eps, keep, step_size),
        count,
        ROUND=rounded is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )


STATISTICS_BLOCK = 4096
GRADIENT_BLOCK = 4096


# fmt: off
@triton.jit
def _statistics(
    logits: tl.tensor, columns: tl.tensor, tops: tl.tensor, sums: tl.tensor, picked: tl.tensor,
    logits_row: int, COUNT: tl.constexpr, BLOCK: tl.constexpr,
) -> None:
    # fmt: on
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_row
    lanes = tl.arange(0, BLOCK)
    # Each lane keeps its own maximum and sum; they are combined after the last block.
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, COUNT, BLOCK):
        real = start + lanes < COUNT
        x = tl.load(logits + start + lanes, mask=real, other=float("-inf"))
        higher = tl.maximum(top, x)
        # A lane without finite logits so far has no maximum to subtract.
        shift = tl.where(higher > float("-inf"), higher, 0.0)
        total = total * tl.exp(top - shift) + tl.exp(x - shift)
        top = higher
    most = tl.max(top, 0)
    total = tl.sum(total * tl.exp(top - most), 0)
    column = tl.load(columns + row)
    mine = (column >= 0) & (column < COUNT)
    tl.store(tops + row, most)
    tl.store(sums + row, total)
    tl.store(picked + row, tl.load(logits + column, mask=mine, other=0.0))


# fmt: off
@triton.jit
def _gradient(
    logits: tl.tensor, columns: tl.tensor, tops: tl.tensor, scales: tl.tensor, coefficients: tl.tensor,
    gradient: tl.tensor, logits_row: int, gradient_row: int, COUNT: tl.constexpr, BLOCK: tl.constexpr,
) -> None:
    # fmt: on
    row = tl.program_id(1).to(tl.int64)
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = lanes < COUNT
    x = tl.load(logits + row * logits_row + lanes, mask=real, other=float("-inf"))
    value = tl.exp(x - tl.load(tops + row)) * tl.load(scales + row)
    value -= tl.where(lanes == tl.load(columns + row), tl.load(coefficients + row), 0.0)
    tl.store(gradient + row * gradient_row + lanes, value.to(gradient.dtype.element_ty), mask=real)


def softmax_statistics(logits: Tensor, columns: Tensor, tops: Tensor, sums: Tensor, picked: Tensor) -> None:
    """Fill, for each row of `logits` `[N, V]`, its maximum, `Σ exp(logit - maximum)` and the logit at `columns`.

    `columns` `[N]` long: a column outside the row gives 0. `tops`, `sums`, `picked`: `[N]` float32.
    """
    count, width = logits.shape
    assert logits.stride(1) == 1 and all(x.is_contiguous() for x in (columns, tops, sums, picked))
    _statistics[(count,)](
        logits, columns, tops, sums, picked, logits.stride(0), COUNT=width, BLOCK=STATISTICS_BLOCK, num_warps=8
    )


def softmax_gradient(
    logits: Tensor, columns: Tensor, tops: Tensor, scales: Tensor, coefficients: Tensor, gradient: Tensor
) -> None:
    """`gradient[n] = exp(logits[n] - tops[n]) * scales[n]`, less `coefficients[n]` at `columns[n]`, in its own type."""
    count, width = logits.shape
    assert logits.stride(1) == gradient.stride(1) == 1 and gradient.shape == logits.shape
    assert all(x.is_contiguous() for x in (columns, tops, scales, coefficients))
    _gradient[(triton.cdiv(width, GRADIENT_BLOCK), count)](
        logits,
        columns,
        tops,
        scales,
        coefficients,
        gradient,
        logits.stride(0),
        gradient.stride(0),
        COUNT=width,
        BLOCK=GRADIENT_BLOCK,
        num_warps=8,
    )
