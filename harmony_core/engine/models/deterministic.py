"""The deterministic mode of CPUs, in float32: a token's numbers have the same bits in any batch.

Matrix products, reductions and exponentials may use another order or other instructions when the number of rows
changes, so the sampler with few rows and the trainer with thousands would differ in the last bits. In this mode every
product runs over tiles of exactly 16 rows; the rows of a pass are padded so that elementwise kernels have no remainder
that they treat differently; sums over ranks are taken in the order of ranks; and a rank has one thread. It remains to
ensure that a row's result does not depend on its place in a tile, which is checked for every shape when a model is
loaded.

Attention has shapes that depend on a token's position alone. A query at position p is computed among the 16 queries of
its group, p // 16, against the keys 0 to 64 * (p // 64 + 1), or with a sliding window from the multiple of 64 below its
first visible one; keys that it must not see, or that do not exist yet, are masked. Packed training, whole and chunked
prefill and decode all make these calls, only with different queries of the group missing, so a query's output has the
same bits in all of them. T tokens, B sequences, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harmony_core.engine.models.context import DecodeAttention, ForwardContext, PackedAttention, PagedAttention
from harmony_core.engine.models.matmul import plain_matmul
from harmony_core.engine.models.model import CausalLM
from harmony_core.errors import ResourceError

TILE = 16
"""Rows of every matrix product. Decode pads its sequences to a multiple of it, so it is as small as possible."""
NARROW = 16
"""Fewest columns of a product's result; missing ones are padded with zeros."""
LANES = 32
"""Most numbers that an elementwise kernel takes at a time: two registers of 16 float32."""


def make_deterministic(model: CausalLM) -> None:
    """Switch a freshly loaded model permanently to the deterministic mode. Its ranks must have one thread each.

    Raises ResourceError if this machine's matrix products depend on a row's place.
    """
    assert model.device.type == "cpu" and model.dtype == torch.float32, "the deterministic mode is for float32 on CPU"
    linear = TiledLinear()
    for module in model.module.modules():
        if isinstance(module, nn.Linear):
            linear.check(module.weight)
        elif hasattr(module, "layer_idx") and hasattr(module, "q_proj"):
            module.tiled_attention = tiled_attention  # type: ignore[assignment]
    decoder: nn.Module = model.module.base_model  # type: ignore[assignment]
    # Without the head: its slices may differ in size, and all ranks must pad equally.
    sizes = {size for m in decoder.modules() if isinstance(m, nn.Linear) for size in m.weight.shape}
    _pad_rows(decoder, LANES if any(size % (LANES // TILE) for size in sizes) else TILE)
    model.use_product(linear)
    model.deterministic, model.row_multiple = True, LANES


class TiledLinear:
    """`F.linear` by tiles of 16 rows. The backward pass is not tiled, because its bits are not compared."""

    def __init__(self) -> None:
        self._checked: set[torch.Size] = set()

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., in]` -> `[..., out]`. Raises ResourceError as `check` does."""
        self.check(weight)
        rows = x.reshape(-1, x.shape[-1])
        output = _Linear.apply(rows, weight) if torch.is_grad_enabled() else _by_tiles(rows, weight)  # type: ignore[no-untyped-call]
        output = output.reshape(*x.shape[:-1], len(weight))
        return output if bias is None else output + bias

    def check(self, weight: Tensor) -> None:
        """Raise ResourceError unless a row gives the same bits at every place of a tile, for a matrix of this shape.

        Each shape is checked once.
        """
        if weight.shape in self._checked:
            return
        row = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0))
        found = _by_tiles(row.repeat(TILE, 1), weight.detach())
        if not torch.equal(found, found[:1].expand_as(found)):
            raise ResourceError(
                f"this machine's product of {TILE} x {weight.shape[1]} and {weight.shape[1]} x {len(weight)} matrices "
                "depends on a row's place, so the deterministic mode cannot hold what it promises",
                hint="leave --deterministic out, or use another kind of processor",
            )
        self._checked.add(weight.shape)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        # The input is kept only for a trained weight.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _by_tiles(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return (
            plain_matmul(grads[0], weight) if ctx.needs_input_grad[0] else None,
            plain_matmul(grads[0].t(), x) if ctx.needs_input_grad[1] else None,
        )


def _by_tiles(x: Tensor, weight: Tensor) -> Tensor:
    """`[N, in]` -> `[N, out]`."""
    count, width = len(x), len(weight)
    x = _with_rows(x, -(-count // TILE) * TILE).contiguous()
    # Libraries compute narrow results differently, such as those of adapters, where a row's place can matter.
    columns = _with_rows(weight, max(width, NARROW)).t()
    output = x.new_empty(len(x), columns.shape[1])
    for start in range(0, len(x), TILE):
        tile, place = x[start : start + TILE], output[start : start + TILE]
        # The head's rows are padded with whole tiles of zeros, whose product is known.
        if start < count - TILE or tile.any():
            plain_matmul(tile, columns, out=place)
        else:
            place.zero_()
    return output[:count, :width]


def _with_rows(x: Tensor, count: int) -> Tensor:
    return x if len(x) == count else F.pad(x, (0, 0, 0, count - len(x)))


def _pad_rows(decoder: nn.Module, multiple: int) -> None:
    """Pad the input of a decoder to a multiple of this many rows, and drop the padding from its output."""
    plain = decoder.forward

    def forward(input_ids: Tensor, position_ids: Tensor, **options: Any) -> Any:
        count = input_ids.shape[1]
        missing = -count % multiple
        output = plain(
            input_ids=F.pad(input_ids, (0, missing)), position_ids=F.pad(position_ids, (0, missing)), **options
        )
        output.last_hidden_state = output.last_hidden_state[:, :count]
        return output

    decoder.forward = forward


QUERIES = 16
"""Queries of a block. Decode computes a whole block for one token, so it is the smallest that runs efficiently."""
KEYS = 64
"""Keys are padded to a multiple of this."""


@dataclass(frozen=True)
class Group:
    """Sequences whose new tokens lie in the same blocks `first` to `last`; each block takes one call for all of them.

    `queries` `[n * 16 * blocks]`: rows of the new tokens, by position; `keys` `[n * keys of the last block]`: rows of
    the new tokens or, with `paged`, slots of the KV cache. Places without a token repeat one of the same sequence.
    """

    size: int
    first: int
    last: int
    queries: Tensor
    keys: Tensor
    paged: bool


@dataclass(frozen=True)
class TiledPlan:
    """`restore` `[T]`: the place of each row of the forward pass in the groups' outputs; any place for padding."""

    groups: tuple[Group, ...]
    restore: Tensor


def tiled_attention(
    context: ForwardContext, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """`q` `[T, H, D]`, `k`, `v` `[T, K, D]` -> `[T, H, D]`. Rows after the layout's tokens are padding."""
    layout = context.attention
    assert not isinstance(layout, DecodeAttention), "decode over static tensors is for other devices"
    keys, values = k, v
    if isinstance(layout, PagedAttention):
        new = len(layout.slot_mapping)
        keys, values = layout.keys[layer], layout.values[layer]
        keys.index_copy_(0, layout.slot_mapping, k[:new])
        values.index_copy_(0, layout.slot_mapping, v[:new])
    if "tiled" not in context.prepared:
        context.prepared["tiled"] = make_plan(layout, q.shape[0])
    plan: TiledPlan = context.prepared["tiled"]
    outputs = []
    for group in plan.groups:
        source = (keys, values) if group.paged else (k, v)
        outputs.append(_group(context, group, q, *source, scale, window))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output.index_select(0, plan.restore)


def make_plan(layout: PackedAttention | PagedAttention, rows: int) -> TiledPlan:
    """Plan the groups of sequences and the places of their tokens. `rows`: T, including padding."""
    if isinstance(layout, PackedAttention):
        lengths = contexts = layout.lengths
        slots = None
    else:
        lengths, contexts, slots = layout.lengths, layout.context_lengths, layout.context_slots
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
    return TiledPlan(tuple(groups), restore)


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
    """Additive mask `[16, keys]`: 0 for visible keys, else minus infinity."""
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
