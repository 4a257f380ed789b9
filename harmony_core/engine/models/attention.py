"""The attention function of all models, for training and sampling; registered with transformers by name.

It reads the layout from the forward context: sequences packed back to back, or new tokens and the KV cache. No mask
function is registered under the name, so transformers builds no mask. `attention_cuda` has the flash kernels; this file
applies `scaled_dot_product_attention` to gathered keys and values, on any device and in any dtype, and is tuned for
CPUs. Sequences of similar length are padded on the right and computed together: with a causal mask a real token never
sees padding to its right, so a group needs no other mask. Groups, index tensors and masks are made once for all layers
of a forward pass.

T tokens, B sequences, L their padded length, M tokens of the longest context, H query heads, K key-value heads, D head
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from harmony_core.engine.models import attention_cuda
from harmony_core.engine.models.context import (
    DecodeAttention,
    ForwardContext,
    PackedAttention,
    PagedAttention,
    current_context,
)
from harmony_core.errors import ModelRefused
from harmony_core.memory.plan import PADDING_SHARE

NAME = "harmony"
PADDING_TOKENS = 64
"""Padding tokens always allowed in a group: to save fewer is not worth another call."""
PADDING_CONTEXT = 256
"""The same for the contexts of a decode step, where a padding token is gathered but costs little computation."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`query` `[1, H, T, D]`, `key`, `value` `[1, K, T, D]` -> `[1, T, H, D]`.

    It depends on the forward context, so it is not traced: a compiled layer has a graph break here.
    """
    if softcap is not None or s_aux is not None or dropout:
        feature = "attention dropout" if dropout else "soft-capped attention" if softcap else "attention sinks"
        raise ModelRefused(f"{type(module).__name__}: {feature} is not supported")
    assert attention_mask is None and query.shape[0] == 1
    selection = getattr(module, "kv_selection", None)
    if selection is not None:
        key, value = selection(key), selection(value)
    # [T, heads, D]: the layout of packed rows and of the KV cache.
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    context, layer = current_context(), int(module.layer_idx)  # type: ignore[arg-type]
    layout = context.attention
    tiled = getattr(module, "tiled_attention", None)
    if tiled is not None:
        output = tiled(context, layer, q, k, v, scaling, sliding_window)
    elif isinstance(layout, DecodeAttention):
        output = attention_cuda.decode(context, layout, layer, q, k, v, scaling, sliding_window)
    elif isinstance(layout, PackedAttention):
        output = _packed(context, layout.lengths, q, k, v, scaling, sliding_window)
    else:
        output = _paged(context, layout, layer, q, k, v, scaling, sliding_window)
    return output[None], None


AttentionInterface.register(NAME, torch.compiler.disable(attend))  # type: ignore[no-untyped-call]


def _packed(
    context: ForwardContext,
    lengths: tuple[int, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Causal attention within each sequence; `[T, H, D]`."""
    assert sum(lengths) == q.shape[0], "lengths do not add up to the row"
    if q.is_cuda and attention_cuda.applies(q):
        return attention_cuda.packed(context, lengths, q, k, v, scale, window)
    if "packed" not in context.prepared:
        context.prepared["packed"] = plan_packed(lengths, q.device)
    return _by_groups(context, context.prepared["packed"], q, k, v, scale, window)


def _paged(
    context: ForwardContext,
    layout: PagedAttention,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Write the new keys and values to the KV cache, then attend; `[T, H, D]`. Never under autograd."""
    keys, values = layout.keys[layer], layout.values[layer]
    if q.is_cuda:
        attention_cuda.write(keys, values, layout.slot_mapping, k, v)
    else:
        keys.index_copy_(0, layout.slot_mapping, k.to(keys.dtype))
        values.index_copy_(0, layout.slot_mapping, v.to(values.dtype))
    if layout.lengths == layout.context_lengths:
        return _packed(context, layout.lengths, q, k, v, scale, window)
    if q.is_cuda and attention_cuda.applies(q):
        return attention_cuda.paged(context, layout, q, keys, values, scale, window)
    return attend_to_cache(context, layout, layer, q, k, v, scale, window)


def attend_to_cache(
    context: ForwardContext,
    layout: PagedAttention,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Attention of new tokens, already written to the KV cache, to their whole context; `[T, H, D]`."""
    keys, values = layout.keys[layer], layout.values[layer]
    if "paged" not in context.prepared:
        context.prepared["paged"] = plan_paged(layout, q.device)
    plan: PagedPlan = context.prepared["paged"]
    parts = []
    if plan.fresh is not None:
        assert plan.fresh_rows is not None, "sequences without a past are packed"
        fresh_q, fresh_k, fresh_v = (x.index_select(0, plan.fresh_rows) for x in (q, k, v))
        parts.append(_by_groups(context, plan.fresh, fresh_q, fresh_k, fresh_v, scale, window))
    for decode in plan.decodes:
        queries = q if decode.rows is None else q.index_select(0, decode.rows)
        parts.append(_decode(context, decode, queries, keys, values, scale, window))
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
            # The longest group comes first; a shorter group uses the corner of its mask.
            longest = plan.groups[0].length
            mask = _mask(context, longest, longest, window, q)[: group.length, : group.length]
        out = F.scaled_dot_product_attention(
            qg, kg, vg, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output if plan.restore is None else output.index_select(0, plan.restore)


def _decode(
    context: ForwardContext,
    plan: DecodePlan,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """One new token of each sequence, by one gather and one call for the group; `q` `[B, H, D]`."""
    batch, heads, width = q.shape
    kv_heads = keys.shape[1]
    if window not in plan.masks:
        visible = plan.visible
        if window is not None:
            # Keys are in order; the last `window` keys of a context of n are visible.
            n = visible.sum(1, keepdim=True)
            visible = visible & (torch.arange(visible.shape[1], device=visible.device) >= n - window)
        hidden = torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, -torch.inf)
        plan.masks[window] = hidden[:, None, None]
    count, gathered = len(plan.slots), context.prepared.get("gathered")
    if gathered is None or len(gathered[0]) < count:
        # Every layer gathers equally many keys: one pair of buffers serves all layers and groups in turn.
        gathered = [store.new_empty((count, kv_heads, width)) for store in (keys, values)]
        context.prepared["gathered"] = gathered
    k, v = gathered
    k = torch.index_select(keys, 0, plan.slots, out=k[:count]).view(batch, -1, kv_heads, width).transpose(1, 2)
    v = torch.index_select(values, 0, plan.slots, out=v[:count]).view(batch, -1, kv_heads, width).transpose(1, 2)
    # All query heads of one key-value head see the same keys, so they become its query rows.
    rows = q.reshape(batch, kv_heads, heads // kv_heads, width)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=plan.masks[window], scale=scale)
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
    """Several new tokens of one sequence with a past; `[L, H, D]`."""
    rows = q[plan.start : plan.stop].transpose(0, 1)[None]
    k, v = (x.index_select(0, plan.slots).transpose(0, 1)[None] for x in (keys, values))
    mask = _mask(context, rows.shape[2], k.shape[2], window, q)
    out = F.scaled_dot_product_attention(
        rows, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != keys.shape[1]
    )
    return out[0].transpose(0, 1)


def _mask(context: ForwardContext, new: int, total: int, window: int | None, q: Tensor) -> Tensor:
    """Additive mask `[new, total]`: each of the last `new` of `total` tokens sees itself and the past in its window.

    It is made once for all layers: each layer would convert a boolean mask to numbers and keep it for the backward
    pass.
    """
    name = f"mask {new} {total} {window}"
    if name not in context.prepared:
        distance = torch.arange(total - new, total, device=q.device)[:, None] - torch.arange(total, device=q.device)
        hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        context.prepared[name] = q.new_zeros((new, total)).masked_fill_(hidden, -torch.inf)
    found: Tensor = context.prepared[name]
    return found


@dataclass(frozen=True)
class Group:
    """`batch` sequences padded to `length`, at rows `[start, start + batch * length)` of the gathered row."""

    start: int
    batch: int
    length: int


@dataclass(frozen=True)
class PackedPlan:
    """Causal attention within each sequence.

    `order` `[padded]`: the token in each place of the gathered layout; None if that layout equals the row.
    `restore` `[tokens]`: the place in the gathered layout of each token, in row order; None in the same case.
    """

    groups: tuple[Group, ...]
    order: Tensor | None
    restore: Tensor | None


@dataclass(frozen=True)
class DecodePlan:
    """One new token of each of B sequences with similar contexts. `slots` `[B * M]`, `visible` `[B, M]`.

    `rows` `[B]`: places of these tokens in the row of the step; None: the whole row.
    """

    rows: Tensor | None
    slots: Tensor
    visible: Tensor
    masks: dict[int | None, Tensor] = field(default_factory=dict, compare=False)
    """Additive masks `[B, 1, 1, M]` by window; the first layer with a window makes its mask."""


@dataclass(frozen=True)
class ChunkPlan:
    """Several new tokens of one sequence with a past: `[start, stop)` of the row, `slots` `[M]` of its context."""

    start: int
    stop: int
    slots: Tensor


@dataclass(frozen=True)
class PagedPlan:
    """The calls of a paged step. `fresh_rows` None: all rows are fresh; `restore` None: already in row order."""

    fresh: PackedPlan | None
    fresh_rows: Tensor | None
    decodes: tuple[DecodePlan, ...]
    chunks: tuple[ChunkPlan, ...]
    restore: Tensor | None


def group_by_length(lengths: Sequence[int], spare: int = PADDING_TOKENS) -> list[list[int]]:
    """Group sequences of similar length, longest first, with bounded padding. Returns their indices by group."""
    groups: list[list[int]] = []
    padded = real = longest = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[index]
        waste = padded + longest - length
        if groups and waste <= max(spare, PADDING_SHARE * (real + length)):
            groups[-1].append(index)
            padded, real = waste, real + length
        else:
            groups.append([index])
            padded, real, longest = 0, length, length
    return groups


def plan_packed(lengths: Sequence[int], device: torch.device) -> PackedPlan:
    """Plan the calls for sequences packed back to back."""
    starts = [0, *accumulate(lengths)]
    order: list[int] = []
    restore = [0] * starts[-1]
    groups = []
    for members in group_by_length(lengths):
        longest = lengths[members[0]]
        groups.append(Group(len(order), len(members), longest))
        for index in members:
            start, length = starts[index], lengths[index]
            restore[start : start + length] = range(len(order), len(order) + length)
            # Padding repeats the first token of its sequence; its output is dropped.
            order += [*range(start, start + length), *[start] * (longest - length)]
    if order == list(range(len(order))):
        return PackedPlan(tuple(groups), None, None)
    return PackedPlan(tuple(groups), torch.tensor(order, device=device), torch.tensor(restore, device=device))


def plan_paged(attention: PagedAttention, device: torch.device) -> PagedPlan:
    """Plan the calls for a prefill or decode step; sequences without a past attend to their new tokens alone."""
    lengths, contexts, slots = attention.lengths, attention.context_lengths, attention.context_slots
    assert slots is not None, "a sequence with a past needs context_slots"
    if max(lengths) == 1 and min(contexts) > 1:
        # The common case: a decode step.
        groups = group_by_length(contexts, PADDING_CONTEXT)
        if len(groups) == 1:
            return PagedPlan(None, None, (_plan_decode(slots, contexts, None),), (), None)
    starts = [0, *accumulate(lengths)]
    past = [context - length for length, context in zip(lengths, contexts, strict=True)]
    fresh = [i for i in range(len(lengths)) if past[i] == 0]
    decode = [i for i in range(len(lengths)) if past[i] and lengths[i] == 1]
    chunks = [i for i in range(len(lengths)) if past[i] and lengths[i] > 1]
    groups = [[decode[i] for i in group] for group in group_by_length([contexts[i] for i in decode], PADDING_CONTEXT)]
    rows = [r for i in (*fresh, *(i for g in groups for i in g), *chunks) for r in range(starts[i], starts[i + 1])]
    in_order = rows == list(range(starts[-1]))
    fresh_rows = [r for i in fresh for r in range(starts[i], starts[i + 1])]
    return PagedPlan(
        fresh=plan_packed([lengths[i] for i in fresh], device) if fresh else None,
        fresh_rows=torch.tensor(fresh_rows, device=device) if 0 < len(fresh) < len(lengths) else None,
        decodes=tuple(
            _plan_decode(slots[group], [contexts[i] for i in group], [starts[i] for i in group]) for group in groups
        ),
        chunks=tuple(ChunkPlan(starts[i], starts[i + 1], slots[i, : contexts[i]]) for i in chunks),
        restore=None if in_order else torch.argsort(torch.tensor(rows)).to(device),
    )


def _plan_decode(slots: Tensor, contexts: Sequence[int], rows: Sequence[int] | None) -> DecodePlan:
    longest = max(contexts)
    visible = torch.arange(longest, device=slots.device) < torch.tensor(contexts, device=slots.device)[:, None]
    # A padding slot may hold NaN, which reaches the output in spite of the mask: read a slot of the sequence.
    safe = torch.where(visible, slots[:, :longest], slots[:, :1])
    chosen = None if rows is None else torch.tensor(rows, device=slots.device)
    return DecodePlan(chosen, safe.reshape(-1), visible)
