"""Attention on CUDA: torch's variable-length flash kernels for training and prefill, our own kernel for decode.

Decode has its lengths on the device, so that a CUDA graph can replay it; `reference` computes the same in plain torch
on any device, to compare the kernel with. T tokens, B sequences, H query heads, K key-value heads, D head width, S
tokens of the contexts of one call, M tokens of the longest context.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harmony_core.engine.models.context import DecodeAttention, ForwardContext, PagedAttention

DTYPES = (torch.bfloat16, torch.float16)
GATHERED_TOKENS = 65_536
"""Context tokens gathered from the KV cache in one call; a longer context is gathered whole."""


@dataclass(frozen=True)
class PastPlan:
    """One call for some sequences, rows `[start, stop)` of the step.

    `bounds`: cumulative lengths of queries and of keys, int32 `[n + 1]` each; `longest`: the maximum of either. `slots`
    `[S]`: slots of all their contexts.
    """

    start: int
    stop: int
    bounds: tuple[Tensor, Tensor]
    longest: tuple[int, int]
    slots: Tensor


@cache
def _varlen_options() -> dict[str, Any] | None:
    """Options for this torch's variable-length attention; None if this torch does not have it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def applies(q: Tensor) -> bool:
    """Whether `packed` supports this tensor of a CUDA device."""
    width = q.shape[2]
    return q.dtype in DTYPES and width <= 256 and width % 8 == 0 and _varlen_options() is not None


def packed(
    context: ForwardContext,
    lengths: tuple[int, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Causal attention within each sequence; `q` `[T, H, D]`, `k`, `v` `[T, K, D]` -> `[T, H, D]`."""
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
    """Attention of new tokens, already written to the KV cache, to their whole context; `[T, H, D]`."""
    if "past" not in context.prepared:
        context.prepared["past"] = plan_past(layout)
    outputs = []
    for call in context.prepared["past"]:
        k, v = keys.index_select(0, call.slots), values.index_select(0, call.slots)
        # The last query of a sequence is aligned with its last key.
        outputs.append(_varlen(q[call.start : call.stop], k, v, call.bounds, call.longest, scale, window))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def plan_past(layout: PagedAttention) -> list[PastPlan]:
    """Plan the calls of a step in which some sequence has a past: one call unless the contexts are long."""
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
    """Plan one call without waiting for the device."""
    assert layout.context_slots is not None, "a sequence with a past needs context_slots"
    read, lengths, contexts = layout.context_slots[members], layout.lengths[members], layout.context_lengths[members]
    bounds = _to(torch.tensor([[0, *accumulate(lengths)], [0, *accumulate(contexts)]]), read.device)
    row = torch.repeat_interleave(bounds[1].diff(), output_size=sum(contexts))
    slots = read[row, torch.arange(len(row), device=read.device) - bounds[1, row]]
    q_bounds, k_bounds = bounds.to(torch.int32)
    return PastPlan(start, start + sum(lengths), (q_bounds, k_bounds), (max(lengths), max(contexts)), slots)


def write(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Write the keys and values of new tokens to their slots."""
    from harmony_core.engine.kernels.paged_decode import write_kv

    write_kv(keys, values, slots, k, v)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    # A copy from pinned memory is queued; from other memory the host would wait for all work before it.
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


KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def decode(
    context: ForwardContext,
    layout: DecodeAttention,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Write the new keys and values `[B, K, D]`, then attend; `q` `[B, H, D]` -> `[B, H, D]`."""
    assert q.shape[0] == len(layout.contexts) == len(layout.rows)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if q.is_cuda and q.dtype in KERNEL_DTYPES:
        return _by_kernel(context, layout, layer, q, k, v, scale, window)
    return reference(layout, layer, q, k, v, scale, window)


def _by_kernel(
    context: ForwardContext,
    layout: DecodeAttention,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    from harmony_core.engine.kernels.paged_decode import list_work, make_scratch, paged_decode

    prepared = context.prepared
    if (name := f"work {window}") not in prepared:
        prepared[name] = list_work(layout.contexts, layout.rows, layout.capacity, window)
    if "scratch" not in prepared:
        # All layers use it in turn.
        prepared["scratch"] = make_scratch(layout.capacity, q)
    return paged_decode(
        q,
        k,
        v,
        layout.keys[layer],
        layout.values[layer],
        *(layout.block_table, prepared[name], prepared["scratch"]),
        scale=scale,
        window=window,
        page_size=layout.block_size,
    )


def reference(
    layout: DecodeAttention, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> Tensor:
    """Reference for `decode`, on any device and in any dtype. It waits for the device to read the longest context."""
    keys, values, size = layout.keys[layer], layout.values[layer], layout.block_size
    newest = layout.contexts.long() - 1
    blocks = layout.block_table.index_select(0, layout.rows).long()
    write = blocks.gather(1, newest[:, None] // size)[:, 0] * size + newest % size
    keys.index_copy_(0, write, k.to(keys.dtype))
    values.index_copy_(0, write, v.to(values.dtype))
    token = torch.arange(int(layout.contexts.max()), device=q.device)
    visible = token <= newest[:, None]
    if window is not None:
        visible &= token > newest[:, None] - window
    # Invisible slots may hold NaN, which a mask does not stop: read the row's own new token instead.
    slots = torch.where(visible, blocks[:, token // size] * size + token % size, write[:, None])
    # [B, M, K, D] -> [B, K, M, D]; all query heads of one key-value head become its query rows.
    seen_k, seen_v = keys[slots].transpose(1, 2), values[slots].transpose(1, 2)
    rows = q.reshape(len(q), keys.shape[1], -1, q.shape[2])
    output = F.scaled_dot_product_attention(rows, seen_k, seen_v, attn_mask=visible[:, None, None], scale=scale)
    return output.flatten(1, 2)
