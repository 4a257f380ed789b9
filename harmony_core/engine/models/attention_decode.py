"""Attention of a decode step whose lengths are on the device: one new token of each sequence against its pages.

On CUDA our own kernel; elsewhere a plain computation of the same layout, which is what the kernel is compared with.
B sequences, H query heads, K key-value heads, D head width, M tokens of the longest context.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harmony_core.engine.models.context import DecodeAttention, ForwardContext

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
        # One layer after the other uses it.
        prepared["scratch"] = make_scratch(layout.capacity, q)
    return paged_decode(
        q,
        k,
        v,
        layout.keys[layer],
        layout.values[layer],
        *(layout.table, prepared[name], prepared["scratch"]),
        scale=scale,
        window=window,
        page_size=layout.page_size,
    )


def reference(
    layout: DecodeAttention, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> Tensor:
    """What `decode` computes, on any device and in any dtype; it waits for the longest context."""
    keys, values, size = layout.keys[layer], layout.values[layer], layout.page_size
    newest = layout.contexts.long() - 1
    pages = layout.table.index_select(0, layout.rows).long()
    write = pages.gather(1, newest[:, None] // size)[:, 0] * size + newest % size
    keys.index_copy_(0, write, k.to(keys.dtype))
    values.index_copy_(0, write, v.to(values.dtype))
    token = torch.arange(int(layout.contexts.max()), device=q.device)
    visible = token <= newest[:, None]
    if window is not None:
        visible &= token > newest[:, None] - window
    # What is not in sight may hold a NaN, which a mask would not stop: read the row's own new token in its place.
    slots = torch.where(visible, pages[:, token // size] * size + token % size, write[:, None])
    # [B, M, K, D] -> [B, K, M, D]; all query heads of one key-value head become its query rows.
    seen_k, seen_v = keys[slots].transpose(1, 2), values[slots].transpose(1, 2)
    rows = q.reshape(len(q), keys.shape[1], -1, q.shape[2])
    output = F.scaled_dot_product_attention(rows, seen_k, seen_v, attn_mask=visible[:, None, None], scale=scale)
    return output.flatten(1, 2)
