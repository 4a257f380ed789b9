"""AdamW in one pass over memory: moments, float32 weights and the half-precision weights that are their rounding."""

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
    """One step on N consecutive elements, all but `gradients` in place; all flat and contiguous.

    `rounded` takes the new weights in its own type. `scale` multiplies the gradients; `keep` the weights (decay);
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
