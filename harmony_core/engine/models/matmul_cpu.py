"""Matrix products on CPUs that torch's own products do not use in full, for training and sampling.

For float32 torch calls MKL, which runs its AVX-512 kernels on its maker's processors only; oneDNN, which torch ships as
well, goes by what a processor can do, and is about twice as fast on the others. Small products stay with MKL: oneDNN
compiles a kernel for each shape, and a call costs it more. `[N, in]` times `[out, in]` transposed is `[N, out]`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harmony_core.rpc.platform import processor_vendor

_FEWEST_WEIGHTS = 1 << 17
_FEWEST_PRODUCTS = 1 << 20
"""Smaller matrices, and smaller products, are computed by MKL."""
_BLOCK = 4096
"""Rows of a sum that are computed at once before they are added: it stays in cache."""


def applies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this module's products are the faster ones here."""
    return device.type == "cpu" and dtype == torch.float32 and _faster_here()


@cache
def _faster_here() -> bool:
    # Inductor's own product; torch has no public name for it.
    there = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return bool(there) and wide and processor_vendor() not in ("", "GenuineIntel")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, with gradients."""
    if not _worth(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        output: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return output
    return _product(x, weight, bias)


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, without gradient."""
    if not _worth(a, b):
        total.addmm_(a, b)
        return
    for start in range(0, len(total), _BLOCK):
        total[start : start + _BLOCK].add_(product(a[start : start + _BLOCK], b))


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of two matrices, without gradient."""
    return _product(a, b.t()) if _worth(a, b) else a @ b


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = grads[0].reshape(-1, len(weight))
        rows = x.reshape(-1, x.shape[-1])
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            product(gradient, weight).view(x.shape) if for_x else None,
            product(gradient.t(), rows) if for_weight else None,
            gradient.sum(0) if for_bias else None,
        )


def _worth(x: Tensor, weight: Tensor) -> bool:
    size = weight.numel()
    return size >= _FEWEST_WEIGHTS and size * (x.numel() // x.shape[-1]) >= _FEWEST_PRODUCTS


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, weight = (t if 1 in t.stride() else t.contiguous() for t in (x, weight))
    output: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return output
