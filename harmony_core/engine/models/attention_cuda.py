"""Attention on CUDA through torch's variable-length flash kernels.

T tokens, H query heads, K key-value heads, D head width, S tokens of the contexts of one call.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from harmony_core.engine.models.context import ForwardContext, PagedAttention

DTYPES = (torch.bfloat16, torch.float16)
GATHERED_TOKENS = 65_536
"""Context tokens whose keys and values are copied out of the pages at a time, unless one context has more."""


@dataclass(frozen=True)
class PastPlan:
    """One call for some sequences, rows `[start, stop)` of the step.

    `bounds`: where queries and keys of each of them begin, int32 `[n + 1]`; `longest`: the most of either. `slots`
    `[S]`: of all their contexts.
    """

    start: int
    stop: int
    bounds: tuple[Tensor, Tensor]
    longest: tuple[int, int]
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
    """New tokens, already written to the pages, against their whole context; `[T, H, D]`."""
    if "past" not in context.prepared:
        context.prepared["past"] = plan_past(layout)
    outputs = []
    for call in context.prepared["past"]:
        k, v = keys.index_select(0, call.slots), values.index_select(0, call.slots)
        # The last query of a sequence is aligned with its last key.
        outputs.append(_varlen(q[call.start : call.stop], k, v, call.bounds, call.longest, scale, window))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def plan_past(layout: PagedAttention) -> list[PastPlan]:
    """The calls of a step in which some sequence has a past: one unless the contexts are long."""
    edges, gathered = [0], 0
    for index, context in enumerate(layout.context_lengths):
        if gathered and gathered + context > GATHERED_TOKENS:
            edges.append(index)
            gathered = 0
        gathered += context
    edges.append(len(layout.context_lengths))
    starts = [0, *accumulate(layout.lengths)]
    return [_plan_call(layout, slice(first, stop), starts[first]) for first, stop in pairwise(edges)]


def _plan_call(layout: PagedAttention, members: slice, start: int) -> PastPlan:
    """Made without waiting for the device."""
    assert layout.read_slots is not None, "a sequence with a past needs read_slots"
    read, lengths, contexts = layout.read_slots[members], layout.lengths[members], layout.context_lengths[members]
    bounds = _to(torch.tensor([[0, *accumulate(lengths)], [0, *accumulate(contexts)]]), read.device)
    row = torch.repeat_interleave(bounds[1].diff(), output_size=sum(contexts))
    slots = read[row, torch.arange(len(row), device=read.device) - bounds[1, row]]
    q_bounds, k_bounds = bounds.to(torch.int32)
    return PastPlan(start, start + sum(lengths), (q_bounds, k_bounds), (max(lengths), max(contexts)), slots)


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
