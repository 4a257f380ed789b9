"""Attention on CUDA through torch's variable-length flash kernels.

T tokens, H query heads, K key-value heads, D head width, S tokens of all contexts of a step together.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from harmony_core.engine.models.context import ForwardContext, PagedAttention

DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PastPlan:
    """Where queries and keys of each sequence begin, int32 `[B + 1]`, and the slots of all contexts, `[S]`."""

    q_bounds: Tensor
    k_bounds: Tensor
    slots: Tensor


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
    width = q.shape[2]
    return q.is_cuda and q.dtype in DTYPES and width <= 256 and width % 8 == 0 and _varlen_options() is not None


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
        context.prepared["cu_seqlens"] = _to(bounds, q.device)
    bounds = context.prepared["cu_seqlens"]
    return _varlen(q, k, v, (bounds, bounds), (max(lengths), max(lengths)), scale, window)


def paged(
    context: ForwardContext,
    layout: PagedAttention,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """New tokens, already written to the pages, against their whole context, in one call; `[T, H, D]`."""
    if "past" not in context.prepared:
        context.prepared["past"] = plan_past(layout)
    plan: PastPlan = context.prepared["past"]
    k, v = keys.index_select(0, plan.slots), values.index_select(0, plan.slots)
    # The last query of a sequence is aligned with its last key.
    longest = max(layout.lengths), max(layout.context_lengths)
    return _varlen(q, k, v, (plan.q_bounds, plan.k_bounds), longest, scale, window)


def plan_past(layout: PagedAttention) -> PastPlan:
    """Index tensors of a step in which some sequence has a past; made without waiting for the device."""
    assert layout.read_slots is not None, "a sequence with a past needs read_slots"
    device, width, total = layout.read_slots.device, layout.read_slots.shape[1], sum(layout.context_lengths)
    bounds = torch.tensor([[0, *accumulate(layout.lengths)], [0, *accumulate(layout.context_lengths)]])
    bounds = _to(bounds, device)
    starts = bounds[1, :-1]
    row = torch.repeat_interleave(bounds[1].diff(), output_size=total)
    place = torch.arange(total, device=device) - starts[row]
    slots = layout.read_slots.reshape(-1)[row * width + place]
    q_bounds, k_bounds = bounds.to(torch.int32)
    return PastPlan(q_bounds, k_bounds, slots)


def write(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """The keys and values of new tokens to their slots."""
    from harmony_core.engine.kernels.kv_write import write_kv

    write_kv(keys, values, slots, k, v)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    # From pinned memory the copy is queued; from any other the host would wait for all work before it.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float | None,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None else window - 1
    output = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), *bounds, *longest,
        scale=scale, window_size=(left, 0), **(_varlen_options() or {}),
    )  # fmt: skip
    assert isinstance(output, Tensor)
    return output
