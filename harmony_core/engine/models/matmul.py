"""Matrix products: in float32 of half-precision factors, and by oneDNN where torch's own are slow.

Half precision is too coarse for logits, whose log-probs are compared, and for a gradient that many chunks add to. On
CUDA the product itself can return float32; elsewhere its operands are widened.

For float32 on CPUs torch calls MKL, which runs its AVX-512 kernels only on Intel processors; oneDNN, which torch also
ships, checks the processor's features, and is about twice as fast on others. Small products stay with MKL: oneDNN
compiles a kernel for each shape, and its calls cost more.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harmony_core.rpc.platform import processor_vendor

_BLOCK_ELEMENTS = 8 << 20
"""Elements of a product that cannot be added in place; it stays in the device's cache until it is added."""
_BLOCK_ROWS = 4096
"""Rows of such a product, for a CPU's cache."""
_FEWEST_WEIGHTS = 1 << 17
_FEWEST_PRODUCTS = 1 << 20
"""Smaller matrices, and smaller products, are computed by MKL."""


wide = partial(torch.promote_types, torch.float32)
"""Type of sums over the vocabulary: float64 for float64, else float32."""


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
    if not (onednn_is_faster(a.device, a.dtype) and _is_large(a, b)):
        return torch.mm(a, b, out=out)
    product = _onednn(a, b.t())
    return product if out is None else out.copy_(product)


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, with a float32 `total` for half-precision `a` and `b`."""
    if onednn_is_faster(a.device, a.dtype) and _is_large(a, b):
        for start in range(0, len(total), _BLOCK_ROWS):
            total[start : start + _BLOCK_ROWS].add_(plain_matmul(a[start : start + _BLOCK_ROWS], b))
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
    """Whether `addmm` accepts a float32 sum with half-precision factors; not all torch versions with `out_dtype` do."""
    total = torch.ones(16, 16, device=device)
    factor = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


@cache
def onednn_is_faster(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN is faster than torch's own choice for large products of this kind."""
    if device.type != "cpu" or dtype != torch.float32:
        return False
    # Inductor's own product; torch has no public name for it.
    there = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return bool(there) and avx512 and processor_vendor() not in ("", "GenuineIntel")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for float32 on CPU, with gradients: `[..., in]`, `[out, in]` -> `[..., out]`."""
    if not _is_large(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        output: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return output
    return _onednn(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = grads[0].reshape(-1, len(weight))
        rows = x.reshape(-1, x.shape[-1])
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            plain_matmul(gradient, weight).view(x.shape) if for_x else None,
            plain_matmul(gradient.t(), rows) if for_weight else None,
            gradient.sum(0) if for_bias else None,
        )


def _is_large(x: Tensor, weight: Tensor) -> bool:
    size = weight.numel()
    return size >= _FEWEST_WEIGHTS and size * (x.numel() // x.shape[-1]) >= _FEWEST_PRODUCTS


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, weight = (t if 1 in t.stride() else t.contiguous() for t in (x, weight))
    output: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return output
