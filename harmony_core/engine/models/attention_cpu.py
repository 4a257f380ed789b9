"""Attention through `scaled_dot_product_attention` and gathered pages: any device, any dtype, made for CPUs.

T tokens, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harmony_core.engine.models.attention_plan import (
    ChunkPlan,
    DecodePlan,
    PackedPlan,
    PagedPlan,
    plan_packed,
    plan_paged,
)
from harmony_core.engine.models.context import ForwardContext, PackedAttention, PagedAttention


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
    if "packed" not in context.prepared:
        context.prepared["packed"] = plan_packed(PackedAttention(lengths), q.device)
    return _by_groups(context, context.prepared["packed"], q, k, v, scale, window)


def paged(
    context: ForwardContext,
    layout: PagedAttention,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """New tokens, already written to the pages, against their whole context; `[T, H, D]`."""
    keys, values = layout.keys[layer], layout.values[layer]
    if "paged" not in context.prepared:
        context.prepared["paged"] = plan_paged(layout, q.device)
    plan: PagedPlan = context.prepared["paged"]
    parts = []
    if plan.fresh is not None:
        assert plan.fresh_rows is not None
        fresh_q, fresh_k, fresh_v = (x.index_select(0, plan.fresh_rows) for x in (q, k, v))
        parts.append(_by_groups(context, plan.fresh, fresh_q, fresh_k, fresh_v, scale, window))
    if plan.decodes:
        mask_name = f"decode masks {window}"
        if mask_name not in context.prepared:
            context.prepared[mask_name] = [_decode_mask(decode.visible, window, q.dtype) for decode in plan.decodes]
            # Every layer gathers as much: one pair of buffers serves them all, and every group in turn.
            size = (max(len(decode.slots) for decode in plan.decodes), *keys.shape[1:])
            context.prepared.setdefault("gathered", (keys.new_empty(size), values.new_empty(size)))
        for decode, mask in zip(plan.decodes, context.prepared[mask_name], strict=True):
            rows_q = q if decode.rows is None else q.index_select(0, decode.rows)
            parts.append(_decode(decode, mask, context.prepared["gathered"], rows_q, (keys, values), scale))
    for chunk in plan.chunks:
        parts.append(_chunk(context, chunk, q, keys, values, scale, window))
    output = parts[0] if len(parts) == 1 else torch.cat(parts)
    return output if plan.restore is None else output.index_select(0, plan.restore)


def _by_groups(
    context: ForwardContext,
    plan: PackedPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
) -> Tensor:
    if plan.order is not None:
        q, k, v = (x.index_select(0, plan.order) for x in (q, k, v))
    outputs = []
    for group in plan.groups:
        size = group.batch * group.length
        # [B * L, heads, D] -> [B, heads, L, D], views.
        qg, kg, vg = (
            x.narrow(0, group.start, size).view(group.batch, group.length, *x.shape[1:]).transpose(1, 2)
            for x in (q, k, v)
        )
        mask = None
        if window is not None and group.length > window:
            # The longest group comes first; of a shorter one's mask the corner of its is all.
            longest = plan.groups[0].length
            mask = _mask(context, longest, longest, window, q)[: group.length, : group.length]
        out = F.scaled_dot_product_attention(
            qg, kg, vg, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output if plan.restore is None else output.index_select(0, plan.restore)


def _decode_mask(visible: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive, `[B, 1, 1, M]`."""
    if window is not None:
        # Keys lie in order; of a context of n the last `window` are in sight.
        n = visible.sum(1, keepdim=True)
        visible = visible & (torch.arange(visible.shape[1], device=visible.device) >= n - window)
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)[:, None, None]


def _decode(
    plan: DecodePlan,
    mask: Tensor,
    buffers: tuple[Tensor, Tensor],
    q: Tensor,
    pages: tuple[Tensor, Tensor],
    scale: float | None,
) -> Tensor:
    """One token of each sequence: one gather and one call for the group; `q` `[B, H, D]`."""
    batch, heads, width = q.shape
    kv_heads = pages[0].shape[1]
    k, v = (
        torch.index_select(store, 0, plan.slots, out=buffer[: len(plan.slots)])
        .view(batch, -1, kv_heads, width)
        .transpose(1, 2)
        for store, buffer in zip(pages, buffers, strict=True)
    )
    # All query heads of one key-value head see the same keys: they become its query rows.
    rows = q.reshape(batch, kv_heads, heads // kv_heads, width)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, width)


def _chunk(
    context: ForwardContext,
    plan: ChunkPlan,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Several tokens of one sequence behind its past; `[L, H, D]`."""
    rows = q[plan.start : plan.stop].transpose(0, 1)[None]
    k, v = (x.index_select(0, plan.slots).transpose(0, 1)[None] for x in (keys, values))
    mask = _mask(context, rows.shape[2], k.shape[2], window, q)
    out = F.scaled_dot_product_attention(
        rows, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != keys.shape[1]
    )
    return out[0].transpose(0, 1)


def _mask(context: ForwardContext, new: int, total: int, window: int | None, q: Tensor) -> Tensor:
    """Additive, `[new, total]`: the last `new` of `total` tokens see what is not after them and inside the window.

    Made once for all layers: a mask of truth values would be turned into numbers, and kept for the backward pass, by
    each of them.
    """
    name = f"mask {new} {total} {window}"
    if name not in context.prepared:
        distance = torch.arange(total - new, total, device=q.device)[:, None] - torch.arange(total, device=q.device)
        hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        context.prepared[name] = q.new_zeros((new, total)).masked_fill_(hidden, -torch.inf)
    found: Tensor = context.prepared[name]
    return found
