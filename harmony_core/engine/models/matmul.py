"""Matrix products of half-precision matrices with float32 results.

Rounding logits to half precision, or a gradient that many chunks add to, would lose what the comparison of two
log-probs, and the sum, depend on. On CUDA the product itself can give float32; elsewhere its operands are widened.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from harmony_core.engine.models import matmul_cpu

_BLOCK_ELEMENTS = 8 << 20
"""Of a product that cannot be added in place: small enough to stay in a device's cache until it is added."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over the vocabulary are taken in: float64 of float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide_matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`a @ b` in `wide(a.dtype)`, without gradient."""
    if a.dtype == wide(a.dtype):
        return plain_matmul(a, b, out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    product = torch.mm(a, b).float()
    return product if out is None else out.copy_(product)


def plain_matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`a @ b` in the factors' own type, without gradient."""
    if not matmul_cpu.applies(a.device, a.dtype):
        return torch.mm(a, b, out=out)
    product = matmul_cpu.product(a, b)
    return product if out is None else out.copy_(product)


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, with a float32 `total` for half-precision `a` and `b`."""
    if matmul_cpu.applies(a.device, a.dtype):
        matmul_cpu.add_matmul(total, a, b)
    elif a.dtype == total.dtype:
        total.addmm_(a, b)
    elif not a.is_cuda:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    elif _adds_in_place(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        rows = max(1, _BLOCK_ELEMENTS // total.shape[1])
        for start in range(0, len(total), rows):
            total[start : start + rows].add_(wide_matmul(a[start : start + rows], b))


@cache
def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `addmm` takes a float32 sum beside half-precision factors; not every torch that has `out_dtype` does."""
    total = torch.ones(16, 16, device=device)
    factor = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())
