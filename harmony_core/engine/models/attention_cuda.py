"""Attention on CUDA through torch's variable-length flash kernels.

T tokens, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

import inspect
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from harmony_core.engine.models.context import ForwardContext

DTYPES = (torch.bfloat16, torch.float16)


@cache
def _varlen_options() -> dict[str, Any] | None:
    """What this torch's variable-length attention needs beside its tensors; None when there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def applies(q: Tensor) -> bool:
    """Whether `packed` can compute on this tensor."""
    return q.is_cuda and q.dtype in DTYPES and q.shape[2] <= 256 and _varlen_options() is not None


def packed(
    context: ForwardContext,
    lengths: tuple[int, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Each sequence causally with itself; `q` `[T, H, D]`, `k`, `v` `[T, K, D]` -> `[T, H, D]`."""
    if "cu_seqlens" not in context.prepared:
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        context.prepared["cu_seqlens"] = bounds.to(q.device)
    return _varlen(q, k, v, context.prepared["cu_seqlens"], max(lengths), scale, window)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None else window - 1
    options = _varlen_options() or {}
    output = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), bounds, bounds, longest, longest,
        scale=scale, window_size=(left, 0), **options,
    )  # fmt: skip
    assert isinstance(output, Tensor)
    return output
