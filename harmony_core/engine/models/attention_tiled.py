"""Attention whose shapes depend on a token's position alone, for the deterministic mode.

A query at position p is computed among the 16 queries of its block, p // 16, against the keys 0 to 64 * (p // 64 + 1),
or with a sliding window from the multiple of 64 below its first visible one; keys that it must not see, or that do not
exist yet, are masked. Packed training, whole and chunked prefill and decode all make these same calls, with other
queries of the block missing, so a query's output has the same bits in all of them. T tokens, B sequences, H query
heads, K key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from harmony_core.engine.models.context import DecodeAttention, ForwardContext, PackedAttention, PagedAttention

QUERIES = 16
"""Queries of a block. Decode computes a whole block for one token, so it is as small as the kernels run well with."""
KEYS = 64
"""Keys come in multiples of this."""


@dataclass(frozen=True)
class Group:
    """Sequences whose new tokens lie in the same blocks `first` to `last`, one call for all of them per block.

    `queries` `[n * 16 * blocks]`: rows of the new tokens, by position; `keys` `[n * keys of the last block]`: rows of
    the new tokens or, with `paged`, slots of the pages. Places without a token name one of the sequence's own.
    """

    size: int
    first: int
    last: int
    queries: Tensor
    keys: Tensor
    paged: bool


@dataclass(frozen=True)
class Plan:
    """`restore` `[T]`: where each row of the forward pass lies in the groups' outputs; any place for padding."""

    groups: tuple[Group, ...]
    restore: Tensor


def attend(
    context: ForwardContext, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """`q` `[T, H, D]`, `k`, `v` `[T, K, D]` -> `[T, H, D]`. Rows after the layout's tokens are padding."""
    layout = context.attention
    assert not isinstance(layout, DecodeAttention), "decode over static tensors is for other devices"
    keys, values = k, v
    if isinstance(layout, PagedAttention):
        new = len(layout.write_slots)
        keys, values = layout.keys[layer], layout.values[layer]
        keys.index_copy_(0, layout.write_slots, k[:new])
        values.index_copy_(0, layout.write_slots, v[:new])
    if "tiled" not in context.prepared:
        context.prepared["tiled"] = make_plan(layout, q.shape[0])
    plan: Plan = context.prepared["tiled"]
    outputs = []
    for group in plan.groups:
        source = (keys, values) if group.paged else (k, v)
        outputs.append(_group(context, group, q, *source, scale, window))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output.index_select(0, plan.restore)


def make_plan(layout: PackedAttention | PagedAttention, rows: int) -> Plan:
    """Which sequences are computed together, and where their tokens are. `rows`: T, padding included."""
    if isinstance(layout, PackedAttention):
        lengths = contexts = layout.lengths
        slots = None
    else:
        lengths, contexts, slots = layout.lengths, layout.context_lengths, layout.read_slots
    starts = [0, *accumulate(lengths)]
    assert starts[-1] <= rows, "more tokens than rows"
    by_blocks: dict[tuple[int, int], list[int]] = {}
    for i, (new, past) in enumerate((new, total - new) for new, total in zip(lengths, contexts, strict=True)):
        by_blocks.setdefault((past // QUERIES, (past + new - 1) // QUERIES), []).append(i)
    restore = torch.zeros(rows, dtype=torch.long)
    groups, done = [], 0
    for (first, last), members in by_blocks.items():
        start, length, total = (_column(values, members) for values in (starts, lengths, contexts))
        position = torch.arange(first * QUERIES, (last + 1) * QUERIES)
        row = start + position - (total - length)
        there = (row >= start) & (position < total)
        restore[row[there]] = done + torch.arange(row.numel()).view(row.shape)[there]
        key = torch.arange(_keys_until(last))
        if slots is None:
            places = torch.where(key < total, start + key, start)
        else:
            held = slots[members]
            places = torch.where(key < total, held[:, key.clamp(max=held.shape[1] - 1)], held[:, :1])
        queries = torch.where(there, row, start).flatten()
        groups.append(Group(len(members), first, last, queries, places.flatten(), slots is not None))
        done += row.numel()
    return Plan(tuple(groups), restore)


def _group(
    context: ForwardContext, group: Group, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """`[n * 16 * blocks, H, D]`."""
    rows, keys, values = (
        x.index_select(0, index).view(group.size, -1, *x.shape[1:])
        for x, index in ((q, group.queries), (k, group.keys), (v, group.keys))
    )
    outputs = []
    for block in range(group.first, group.last + 1):
        place = (block - group.first) * QUERIES
        low, high = _keys_from(block, window), _keys_until(block)
        output = F.scaled_dot_product_attention(
            rows[:, place : place + QUERIES].transpose(1, 2),
            keys[:, low:high].transpose(1, 2),
            values[:, low:high].transpose(1, 2),
            attn_mask=_mask(context, block, window),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, 1).flatten(0, 1)


def _keys_until(block: int) -> int:
    return (block * QUERIES // KEYS + 1) * KEYS


def _keys_from(block: int, window: int | None) -> int:
    return 0 if window is None else max(0, block * QUERIES - window + 1) // KEYS * KEYS


def _mask(context: ForwardContext, block: int, window: int | None) -> Tensor:
    """`[16, keys]` to be added to the scores: 0 for what a query sees, else minus infinity."""
    name = f"tiled mask {block} {window}"
    if name not in context.prepared:
        query = torch.arange(block * QUERIES, (block + 1) * QUERIES)[:, None]
        distance = query - torch.arange(_keys_from(block, window), _keys_until(block))
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        context.prepared[name] = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    mask: Tensor = context.prepared[name]
    return mask


def _column(values: Sequence[int], members: Sequence[int]) -> Tensor:
    return torch.tensor([values[i] for i in members])[:, None]
