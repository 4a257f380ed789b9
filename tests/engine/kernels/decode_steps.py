"""Decode steps with poison wherever the kernels must not look, and checks of them on a CUDA device or interpreted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harmony_core.engine.kernels import paged_decode
from harmony_core.engine.models.attention_cuda import reference
from harmony_core.engine.models.context import DecodeAttention
from harmony_core.memory.plan import DECODE_SPLIT

EDGES = [1, 15, 16, 17, 255, 256, 257, 600]
ERRORS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""‖out − ref‖ / ‖ref‖ of a kernel whose inputs have this type."""
NOWHERE = 2**30


@dataclass(frozen=True)
class Step:
    """New tokens of B sequences. What the caches hold outside of the contexts is NaN; the table's rest is nowhere."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    table: Tensor
    rows: Tensor
    contexts: Tensor
    page_size: int

    def slot(self, row: int, position: int) -> int:
        page = int(self.table[self.rows[row], position // self.page_size])
        return page * self.page_size + position % self.page_size

    def only(self, row: int) -> Step:
        """The same row alone in its batch, in the same pages."""
        one = slice(row, row + 1)
        cut = {name: getattr(self, name)[one] for name in ("q", "k", "v", "rows", "contexts")}
        return replace(self, **cut, keys=self.keys.clone(), values=self.values.clone())

    def run(self, window: int | None = None, capacity: int | None = None, **settings: Any) -> Tensor:
        capacity = int((-(-self.contexts // DECODE_SPLIT)).sum()) if capacity is None else capacity
        work = paged_decode.list_work(self.contexts, self.rows, capacity, window)
        scratch = paged_decode.make_scratch(capacity, self.q)
        scratch.partial.fill_(torch.nan)
        scratch.lse.fill_(torch.nan)
        output = paged_decode.paged_decode(
            *(self.q, self.k, self.v, self.keys, self.values, self.table, work, scratch),
            scale=self.q.shape[2] ** -0.5,
            window=window,
            page_size=self.page_size,
            **settings,
        )
        return output

    def expected(self, window: int | None = None) -> Tensor:
        """Sequence by sequence, in float64."""
        outputs = []
        for row, context in enumerate(self.contexts.tolist()):
            slots = [self.slot(row, position) for position in range(context - 1)]
            keys = torch.cat([self.keys[slots], self.k[row : row + 1]]).double()[-(window or context) :]
            values = torch.cat([self.values[slots], self.v[row : row + 1]]).double()[-(window or context) :]
            queries = self.q[row].double().unflatten(0, (keys.shape[1], -1))
            shares = torch.einsum("kgd,tkd->kgt", queries, keys).mul(self.q.shape[2] ** -0.5).softmax(2)
            outputs.append(torch.einsum("kgt,tkd->kgd", shares, values).flatten(0, 1))
        return torch.stack(outputs)


def make_step(
    contexts: list[int],
    device: torch.device,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    page_size: int = 16,
) -> Step:
    """Pages and table rows in random order; new keys, values and queries strided as transformers hands them over."""
    counts = [-(-context // page_size) for context in contexts]
    pages = (torch.randperm(sum(counts) + 4) + 1).tolist()
    table = torch.full((len(contexts) + 3, max(counts) + 2), NOWHERE, dtype=torch.int32)
    rows = torch.randperm(len(contexts) + 3)[: len(contexts)].int()
    keys, values = torch.full((2, (len(pages) + 1) * page_size, kv_heads, width), torch.nan, dtype=dtype)
    for row, context, count in zip(rows.tolist(), contexts, counts, strict=True):
        held = [pages.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(held)
        past = torch.arange(context - 1)
        slots = torch.tensor(held)[past // page_size] * page_size + past % page_size
        keys[slots], values[slots] = torch.randn(2, len(past), kv_heads, width).to(dtype)
    new = [torch.randn(n, len(contexts), width).to(device, dtype).transpose(0, 1) for n in (heads, kv_heads, kv_heads)]
    where = torch.tensor(contexts, dtype=torch.int32)
    return Step(*new, *(x.to(device) for x in (keys, values, table, rows, where)), page_size)  # type: ignore[call-arg]


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def expect(step: Step, window: int | None = None, **settings: Any) -> None:
    """The output is right, the new token lies in its slot, and nothing else was written."""
    expected = step.expected(window)
    keys, values = step.keys.clone(), step.values.clone()
    found = step.run(window, **settings)
    assert found.dtype == step.q.dtype and torch.isfinite(found).all()
    assert error(found, expected) < ERRORS[step.q.dtype]
    for row, context in enumerate(step.contexts.tolist()):
        keys[step.slot(row, context - 1)] = step.k[row]
        values[step.slot(row, context - 1)] = step.v[row]
    torch.testing.assert_close(step.keys, keys, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(step.values, values, rtol=0, atol=0, equal_nan=True)


def check_context_edges(device: torch.device) -> None:
    expect(make_step(EDGES, device))


def check_groups_of_heads(device: torch.device) -> None:
    for heads, kv_heads in ((2, 2), (2, 1), (4, 1), (8, 1), (6, 2)):
        expect(make_step([1, 40, 300], device, heads=heads, kv_heads=kv_heads))


def check_head_widths(device: torch.device) -> None:
    for width in (8, 80, 96, 128, 256):
        expect(make_step([3, 270], device, width=width))


def check_windows(device: torch.device) -> None:
    for window in (1, 100, 256, 512):
        expect(make_step(EDGES, device), window)


def check_half_precision(device: torch.device) -> None:
    # Interpreted, a product of bfloat16 matrices is not one.
    for dtype in (torch.float16, torch.bfloat16)[: 2 if device.type == "cuda" else 1]:
        for width in (64, 128, 256):
            expect(make_step([17, 256, 310], device, width=width, dtype=dtype), 48 if width == 128 else None)


def check_page_sizes(device: torch.device) -> None:
    for page_size in (1, 32, 256):
        expect(make_step([1, 33, 290], device, page_size=page_size))


def check_rows_of_padding(device: torch.device) -> None:
    """Several rows may name the same page, for nobody to read: they leave the others alone."""
    step = make_step([20, 1, 1, 1, 300], device)
    step.table[step.rows[1]] = step.table[step.rows[2]] = step.table[step.rows[3]] = 0
    expected = step.expected()
    found = step.run()
    assert error(found, expected) < ERRORS[found.dtype]


def check_a_row_does_not_depend_on_the_batch(device: torch.device) -> None:
    """Bit for bit, and neither on how the work is spread."""
    for window in (None, 100):
        step = make_step([600, 1, 257, 90, 256, 513], device, dtype=torch.float16)
        alone = [step.only(row).run(window) for row in range(len(step.q))]
        whole = replace(step, keys=step.keys.clone(), values=step.values.clone()).run(window)
        assert torch.equal(whole, torch.cat(alone))
        few = replace(paged_decode.Config.of(64, torch.float16), programs_per_sm=1, combine_warps=1)
        assert torch.equal(step.run(window, capacity=99, config=few), whole)


def check_work_past_the_capacity_is_nan(device: torch.device) -> None:
    """Never a wrong number, never a write past the list."""
    step = make_step([600, 10, 513], device)
    room = int((-(-step.contexts // DECODE_SPLIT)).sum())
    for capacity in (3, room - 1):
        found = replace(step, keys=step.keys.clone(), values=step.values.clone()).run(capacity=capacity)
        assert torch.isnan(found).all()
    assert torch.isfinite(step.run(capacity=room)).all()


def check_the_list_of_work(device: torch.device) -> None:
    contexts = [1, 256, 257, 512, 513, 70 * 256 + 3]
    for window in (None, 1, 300):
        items = set()
        for row, context in enumerate(contexts):
            first = 0 if window is None else max(context - window, 0) // DECODE_SPLIT
            last = (context - 1) // DECODE_SPLIT
            items |= {(row, split, context, row + 7) for split in range(first, last + 1)}
        rows = torch.arange(7, 13, dtype=torch.int32, device=device)
        work = paged_decode.list_work(torch.tensor(contexts, dtype=torch.int32, device=device), rows, 99, window)
        total = int(work.total)
        found = work.items[:total].tolist()
        assert total == len(items) and {tuple(item[:4]) for item in found} == items
        for row, split, context, _, first, count, *_ in found:
            last = total - len(contexts) + row
            assert found[last][:2] == [row, (context - 1) // DECODE_SPLIT]
            listed = [item[:2] for item in found[first : first + count]]
            assert listed == [[row, found[last][1] - count + i] for i in range(count)]
            assert [row, split] in [*listed, found[last][:2]]


def check_new_tokens_are_written_to_their_slots(device: torch.device) -> None:
    for heads, width, dtype in ((2, 64, torch.float32), (3, 80, torch.float16), (1, 256, torch.float32)):
        keys, values = torch.full((2, 40, heads, width), torch.nan, dtype=dtype, device=device)
        k = torch.randn(heads, 6, width, device=device).to(dtype).transpose(0, 1)
        v = torch.randn(6, heads, width, device=device).to(dtype)
        slots = torch.tensor([39, 3, 0, 17, 4, 20], device=device)
        wanted = keys.index_copy(0, slots, k), values.index_copy(0, slots, v)
        paged_decode.write_kv(keys, values, slots, k, v)
        for found, expected in zip((keys, values), wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def check_the_plain_computation(device: torch.device) -> None:
    """What stands in for the kernel elsewhere: same outputs, same writes."""
    for window in (None, 100):
        step = make_step(EDGES, device, heads=6, width=80)
        plain = replace(step, keys=step.keys.clone(), values=step.values.clone())
        layout = DecodeAttention(
            *([plain.keys], [plain.values], plain.table, plain.rows, plain.contexts, plain.page_size, 99)
        )
        found = reference(layout, 0, plain.q, plain.k, plain.v, 80**-0.5, window)
        assert error(found, step.expected(window)) < ERRORS[found.dtype]
        torch.testing.assert_close(step.run(window), found, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(plain.keys, step.keys, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(plain.values, step.values, rtol=0, atol=0, equal_nan=True)


CHECKS: dict[str, Callable[[torch.device], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}
