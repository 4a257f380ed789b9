"""Triton kernels for CUDA: split key-value attention of decode steps, and writing new keys and values to the KV cache.

In a decode step one new token of each sequence attends to its pages. A page is a KV cache block.

A context is cut into splits at multiples of `DECODE_SPLIT` tokens, independently of the batch, so a row's bits never
depend on its neighbours. A step's work items (row, split) are listed once on the device and shared by all layers; a
fixed number of programs walks the list for each key-value head. A second kernel combines the splits of each row, in
order.

The host reads no lengths: all shapes follow from the batch, the capacity of the item list and the model, so a CUDA
graph can replay a step with other contexts. B sequences, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from harmony_core.memory.plan import DECODE_SPLIT

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Config:
    """Launch configuration of the kernels; only `block` affects rounding."""

    block: int
    num_warps: int = 4
    num_stages: int = 3
    programs_per_sm: int = 5
    combine_warps: int = 2

    @classmethod
    def of(cls, width: int, dtype: torch.dtype) -> Config:
        """The fixed configuration for a head width: keys and values of a block take at most 16 KiB of shared memory."""
        return cls(block=min(64, 8192 // (_padded(width) * dtype.itemsize)))


@dataclass(frozen=True)
class WorkList:
    """The work items of a step for one window; `total` `[1]` is their number.

    `items` `[capacity, 8]`: row, split, context, row of the table, the row's first whole item, its number of whole
    items; a program reads them in one access. The whole splits of all rows come first, then the last split of each row.
    If they do not all fit, only the last splits are listed, with -1 whole items.
    """

    items: Tensor
    total: Tensor


@dataclass(frozen=True)
class Scratch:
    """Results of the items of one layer, reused by the next: `partial` `[capacity, H, D]`, `lse` `[capacity, H]`."""

    partial: Tensor
    lse: Tensor


# fmt: off
@triton.jit(do_not_specialize=["batch", "capacity"])
def _list_items(
    contexts: tl.tensor, rows: tl.tensor, items: tl.tensor, total: tl.tensor, batch: int, capacity: int,
    WINDOW: tl.constexpr, SPLIT: tl.constexpr, BATCH_PADDED: tl.constexpr, BLOCK: tl.constexpr,
) -> None:
    # fmt: on
    row = tl.program_id(0)
    index = tl.arange(0, BATCH_PADDED)
    context = tl.load(contexts + index, mask=index < batch, other=1)
    first = context * 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0) // SPLIT
    whole = tl.where(index < batch, (context - 1) // SPLIT - first, 0)
    fits = tl.sum(whole) + batch <= capacity
    all_whole = tl.where(fits, tl.sum(whole), 0)
    start = tl.where(fits, tl.sum(tl.where(index < row, whole, 0)), 0)
    count = tl.where(fits, tl.sum(tl.where(index == row, whole, 0)), -1)
    split = tl.sum(tl.where(index == row, first, 0))
    mine = tl.load(contexts + row)
    table_row = tl.load(rows + row)
    if row == 0:
        tl.store(total, all_whole + batch)
    listed = tl.maximum(count, 0)
    # One iteration more than there are whole splits: the last split of the row is listed separately.
    for begin in range(0, listed + 1, BLOCK):
        turn = begin + tl.arange(0, BLOCK)
        item = items + tl.where(turn < listed, start + turn, all_whole + row) * 8
        real = turn <= listed
        tl.store(item, row, mask=real)
        tl.store(item + 1, tl.where(turn < listed, split + turn, (mine - 1) // SPLIT), mask=real)
        tl.store(item + 2, mine, mask=real)
        tl.store(item + 3, table_row, mask=real)
        tl.store(item + 4, start, mask=real)
        tl.store(item + 5, count, mask=real)


# fmt: off
@triton.jit(do_not_specialize=["table_row"])
def _attend(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, keys: tl.tensor, values: tl.tensor,
    table: tl.tensor, items: tl.tensor, total: tl.tensor,
    partial: tl.tensor, lse: tl.tensor, scale: float, table_row: int,
    q_row: int, q_head: int, k_row: int, k_head: int, v_row: int, v_head: int,
    keys_slot: int, keys_head: int, values_slot: int, values_head: int,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
) -> None:
    # fmt: on
    member = tl.arange(0, GROUP_PADDED)
    lane = tl.arange(0, WIDTH_PADDED)
    real = lane < WIDTH
    real_q = (member < GROUP)[:, None] & real[None, :]
    for work in tl.range(tl.program_id(0), tl.load(total) * KV_HEADS, tl.num_programs(0), num_stages=1):
        item = items + work // KV_HEADS * 8
        head = work % KV_HEADS
        row, split, context = tl.load(item), tl.load(item + 1), tl.load(item + 2)
        pages = table + tl.load(item + 3).to(tl.int64) * table_row
        newest = context - 1
        mine = real & (split == newest // SPLIT)
        begin, end = split * SPLIT, tl.minimum(split * SPLIT + SPLIT, newest)
        # Issue all loads that depend only on the item first; the loads of the loop are then independent and overlap.
        index = split * (SPLIT // PAGE) + tl.arange(0, SPLIT // PAGE)
        held = tl.load(pages + index, mask=index * PAGE < end, other=0)
        queries = q + row * q_row + (head * GROUP + member)[:, None] * q_head + lane[None, :]
        query = tl.load(queries, mask=real_q, other=0.0)
        new_k = tl.load(k + row * k_row + head * k_head + lane, mask=mine, other=0.0)
        new_v = tl.load(v + row * v_row + head * v_head + lane, mask=mine, other=0.0)
        slot = tl.load(pages + newest // PAGE).to(tl.int64) * PAGE + newest % PAGE

        oldest = 0
        if WINDOW > 0:
            oldest = tl.maximum(context - WINDOW, 0)
            # Every block has a visible key, or there is no block: with a window of 1 only the new token is visible.
            begin = tl.where(oldest < end, tl.maximum(begin, oldest // BLOCK * BLOCK), end)
        top = tl.full((GROUP_PADDED,), -float("inf"), tl.float32)
        sums = tl.zeros((GROUP_PADDED, BLOCK), tl.float32)
        output = tl.zeros((GROUP_PADDED, WIDTH_PADDED), tl.float32)
        for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
            position = start + tl.arange(0, BLOCK)
            # Table entries and pages beyond the context are undefined and never read.
            seen = (position < end) & (position >= oldest)
            slots = tl.gather(held, position % SPLIT // PAGE, 0).to(tl.int64) * PAGE + position % PAGE
            inside = seen[:, None] & real[None, :]
            column = head * keys_head + lane[None, :]
            key = tl.load(keys + slots[:, None] * keys_slot + column, mask=inside, other=0.0)
            column = head * values_head + lane[None, :]
            value = tl.load(values + slots[:, None] * values_slot + column, mask=inside, other=0.0)
            top, sums, output = _block(query, key, value, seen, scale, top, sums, output, PRECISION)
        # The new token is written to its slot but not read back: the program of the row's last split has it already.
        tl.store(keys + slot * keys_slot + head * keys_head + lane, new_k, mask=mine)
        tl.store(values + slot * values_slot + head * values_head + lane, new_v, mask=mine)
        log, output = _new_token(query, new_k, new_v, split == newest // SPLIT, scale, top, tl.sum(sums, 1), output)
        # If the items do not all fit, the rows are NaN rather than wrong.
        output = tl.where(tl.load(item + 5) < 0, float("nan"), output)
        place = work * GROUP + member.to(tl.int64)
        tl.store(partial + place[:, None] * WIDTH + lane[None, :], output, mask=real_q)
        tl.store(lse + place, log, mask=member < GROUP)


# fmt: off
@triton.jit
def _block(
    query: tl.tensor, key: tl.tensor, value: tl.tensor, seen: tl.tensor, scale: float,
    top: tl.tensor, sums: tl.tensor, output: tl.tensor, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    # fmt: on
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    scores = tl.where(seen[None, :], scores, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    shrink = tl.exp2(top - higher)
    weights = tl.exp2(scores - higher[:, None])
    # Summed over the block's columns at the end, which saves an exchange between warps in each iteration.
    sums = sums * shrink[:, None] + weights
    output = tl.dot(weights.to(value.dtype), value, output * shrink[:, None], input_precision=PRECISION)
    return higher, sums, output


# fmt: off
@triton.jit
def _new_token(
    query: tl.tensor, key: tl.tensor, value: tl.tensor, mine: tl.tensor, scale: float,
    top: tl.tensor, weight: tl.tensor, output: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    # fmt: on
    score = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale
    score = tl.where(mine, score, -float("inf"))
    higher = tl.maximum(top, score)
    shrink, own = tl.exp2(top - higher), tl.exp2(score - higher)
    weight = weight * shrink + own
    output = output * shrink[:, None] + own[:, None] * value.to(tl.float32)[None, :]
    return higher + tl.log2(weight), output / weight[:, None]


# fmt: off
@triton.jit(do_not_specialize=["batch"])
def _combine(
    partial: tl.tensor, lse: tl.tensor, items: tl.tensor, total: tl.tensor, out: tl.tensor,
    batch: int, out_row: int, out_head: int,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr,
) -> None:
    # fmt: on
    GROUP_PADDED: tl.constexpr = triton.next_power_of_2(GROUP)
    row, head = tl.program_id(0), tl.program_id(1)
    member = tl.arange(0, GROUP_PADDED)
    lane = tl.arange(0, WIDTH_PADDED)
    real = (member < GROUP)[:, None] & (lane < WIDTH)[None, :]
    last = tl.load(total) - batch + row
    first, count = tl.load(items + last * 8 + 4), tl.load(items + last * 8 + 5)
    place = (last.to(tl.int64) * KV_HEADS + head) * GROUP + member
    top = tl.load(lse + place, mask=member < GROUP, other=0.0)
    output = tl.load(partial + place[:, None] * WIDTH + lane[None, :], mask=real, other=0.0)
    weight = tl.full((GROUP_PADDED,), 1.0, tl.float32)
    for split in range(count):
        place = ((first + split).to(tl.int64) * KV_HEADS + head) * GROUP + member
        log = tl.load(lse + place, mask=member < GROUP, other=0.0)
        part = tl.load(partial + place[:, None] * WIDTH + lane[None, :], mask=real, other=0.0)
        higher = tl.maximum(top, log)
        shrink, share = tl.exp2(top - higher), tl.exp2(log - higher)
        output = output * shrink[:, None] + part * share[:, None]
        weight = weight * shrink + share
        top = higher
    output = output / weight[:, None]
    rows = out + row * out_row + (head * GROUP + member)[:, None] * out_head + lane[None, :]
    tl.store(rows, output.to(out.dtype.element_ty), mask=real)


def list_work(contexts: Tensor, rows: Tensor, capacity: int, window: int | None) -> WorkList:
    """List the work items of sequences for one window.

    `contexts` `[B]`: their tokens with the new one, at least 1. `rows` `[B]`: their rows of the page table.
    """
    (batch,) = contexts.shape
    assert capacity >= batch
    items = torch.empty((capacity, 8), dtype=torch.int32, device=contexts.device)
    total = torch.empty(1, dtype=torch.int32, device=contexts.device)
    _list_items[(batch,)](
        *(contexts, rows, items, total, batch, capacity),
        WINDOW=window or 0,
        SPLIT=DECODE_SPLIT,
        # One compilation for every batch of a usual size.
        BATCH_PADDED=max(1024, triton.next_power_of_2(batch)),
        BLOCK=64,
    )
    return WorkList(items, total)


def make_scratch(capacity: int, q: Tensor) -> Scratch:
    """Allocate scratch for `capacity` items of queries `[B, H, D]`."""
    _, heads, width = q.shape
    return Scratch(
        partial=torch.empty((capacity, heads, width), dtype=torch.float32, device=q.device),
        lse=torch.empty((capacity, heads), dtype=torch.float32, device=q.device),
    )


def paged_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    work: WorkList,
    scratch: Scratch,
    *,
    scale: float,
    window: int | None,
    page_size: int,
    config: Config | None = None,
) -> Tensor:
    """Write each row's new key and value to its slot, then attend to its whole context; `[B, H, D]`.

    `q` `[B, H, D]`, `k`, `v` `[B, K, D]`: any strides but 1 along D. `keys`, `values` `[token slots, K, D]`.
    `table` `[table rows, most pages]` int32: the pages of each sequence.
    """
    batch, heads, width = q.shape
    kv_heads = k.shape[1]
    config = config or Config.of(width, q.dtype)
    assert heads % kv_heads == 0 and DECODE_SPLIT % page_size == 0 and DECODE_SPLIT % config.block == 0
    assert q.stride(2) == k.stride(2) == v.stride(2) == keys.stride(2) == values.stride(2) == table.stride(1) == 1
    out = torch.empty((batch, heads, width), dtype=q.dtype, device=q.device)
    group = heads // kv_heads
    shape = {"KV_HEADS": kv_heads, "GROUP": group, "WIDTH": width, "WIDTH_PADDED": _padded(width)}
    _attend[(config.programs_per_sm * _multiprocessors(q.device),)](
        *(q, k, v, keys, values, table, work.items, work.total),
        *(scratch.partial, scratch.lse, scale * _LOG2_E, table.stride(0)),
        *(q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        *(keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)),
        **shape,
        GROUP_PADDED=_padded(group),
        PAGE=page_size,
        SPLIT=DECODE_SPLIT,
        BLOCK=config.block,
        WINDOW=window or 0,
        STAGES=config.num_stages,
        PRECISION="ieee" if q.dtype == torch.float32 else None,
        num_warps=config.num_warps,
    )
    _combine[(batch, kv_heads)](
        *(scratch.partial, scratch.lse, work.items, work.total, out, batch, out.stride(0), out.stride(1)),
        **shape,
        num_warps=config.combine_warps,
    )
    return out


def _padded(size: int) -> int:
    # Every dimension of a matrix product is at least 16.
    return max(16, int(triton.next_power_of_2(size)))


@cache
def _multiprocessors(device: torch.device) -> int:
    # Triton's interpreter runs on CPU tensors, one program after another.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


# fmt: off
@triton.jit
def _write(
    k: tl.tensor, v: tl.tensor, slots: tl.tensor, keys: tl.tensor, values: tl.tensor,
    k_token: int, k_head: int, v_token: int, v_head: int,
    keys_slot: int, keys_head: int, values_slot: int, values_head: int,
    HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr,
) -> None:
    # fmt: on
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    head = tl.arange(0, HEADS_PADDED)[:, None]
    lane = tl.arange(0, WIDTH_PADDED)[None, :]
    real = (head < HEADS) & (lane < WIDTH)
    new_k = tl.load(k + token * k_token + head * k_head + lane, mask=real)
    new_v = tl.load(v + token * v_token + head * v_head + lane, mask=real)
    tl.store(keys + slot * keys_slot + head * keys_head + lane, new_k, mask=real)
    tl.store(values + slot * values_slot + head * values_head + lane, new_v, mask=real)


def write_kv(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """`keys[slots], values[slots] = k, v` in one launch; `k`, `v` `[T, K, D]` with any strides but 1 along D.

    `slots` `[T]`, int32 or int64, distinct. `keys`, `values` `[token slots, K, D]`.
    """
    tokens, heads, width = k.shape
    assert k.stride(2) == v.stride(2) == keys.stride(2) == values.stride(2) == 1
    assert slots.shape == (tokens,) and slots.is_contiguous()
    _write[(tokens,)](
        k,
        v,
        slots,
        keys,
        values,
        *(k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        *(keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)),
        HEADS=heads,
        HEADS_PADDED=triton.next_power_of_2(heads),
        WIDTH=width,
        WIDTH_PADDED=triton.next_power_of_2(width),
    )
