"""The decode kernels on a CUDA device: the checks of the interpreter, realistic sizes, and CUDA graphs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from harmony_core.engine.models import attention, attention_cuda
from harmony_core.engine.models.context import DecodeAttention, ForwardContext, PagedAttention

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from engine.kernels.decode_steps import CHECKS, error

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
PAGE = 16
QUICK = [
    "context_edges",
    "half_precision",
    "rows_of_padding",
    "a_row_does_not_depend_on_the_batch",
    "work_past_the_capacity_is_nan",
    "the_list_of_work",
    "new_tokens_are_written_to_their_slots",
]
"""The others differ by what is compiled in, seconds each, and not by what the device does."""


@pytest.fixture(autouse=True)
def fresh_inputs() -> None:
    """Fresh inputs in every run; the number stands in the output of a failure."""
    print("seed", torch.seed())


@pytest.mark.parametrize("name", QUICK)
def test_on_the_device(name: str) -> None:
    CHECKS[name](DEVICE)


class Tables:
    """Pages of `rows` sequences of up to `longest` tokens, everything written; B new tokens of them."""

    def __init__(self, rows: int, longest: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> None:
        most = -(-longest // PAGE)
        self.longest = longest
        self.table = torch.randperm(rows * most, device=DEVICE).int().view(rows, most)
        self.keys, self.values = (
            torch.randn(rows * most * PAGE, kv_heads, width, device=DEVICE, dtype=dtype) for _ in range(2)
        )
        self.q, self.k, self.v = (
            torch.randn(n, rows, width, device=DEVICE, dtype=dtype).transpose(0, 1) for n in (heads, kv_heads, kv_heads)
        )
        self.rows = torch.arange(rows, device=DEVICE, dtype=torch.int32)
        self.contexts = torch.ones(rows, device=DEVICE, dtype=torch.int32)

    def draw(self) -> None:
        """Other contexts, other pages, other tokens, in the same tensors."""
        self.table.view(-1).copy_(torch.randperm(self.table.numel(), device=DEVICE))
        self.rows.copy_(torch.randperm(len(self.rows), device=DEVICE))
        self.contexts.copy_(torch.randint(1, self.longest + 1, self.contexts.shape, device=DEVICE))
        for tensor in (self.q, self.k, self.v):
            tensor.normal_()

    def layout(self, keys: Tensor, values: Tensor) -> DecodeAttention:
        capacity = len(self.rows) * math.ceil(self.longest / 256)
        return DecodeAttention([keys], [values], self.table, self.rows, self.contexts, PAGE, capacity)

    def attend(self, context: ForwardContext, window: int | None) -> Tensor:
        layout = context.attention
        assert isinstance(layout, DecodeAttention)
        return attention_cuda.decode(context, layout, 0, self.q, self.k, self.v, None, window)

    def expected(self, window: int | None) -> Tensor:
        layout = self.layout(self.keys.double(), self.values.double())
        q, k, v = (x.double() for x in (self.q, self.k, self.v))
        return attention_cuda.reference(layout, 0, q, k, v, q.shape[2] ** -0.5, window)


@pytest.mark.parametrize(
    ("rows", "longest", "heads", "kv_heads", "width", "window"),
    [
        (64, 3000, 32, 8, 128, None),
        (64, 3000, 32, 8, 128, 1024),
        (1, 40_000, 16, 8, 128, None),
        (33, 900, 8, 4, 256, 512),
    ],
)
def test_realistic_sizes_in_bf16(
    rows: int, longest: int, heads: int, kv_heads: int, width: int, window: int | None
) -> None:
    step = Tables(rows, longest, heads, kv_heads, width, torch.bfloat16)
    step.draw()
    step.contexts[0] = longest
    expected = step.expected(window)
    found = step.attend(ForwardContext(step.layout(step.keys, step.values)), window)
    assert error(found, expected) < 8e-3
    again = step.attend(ForwardContext(step.layout(step.keys, step.values)), window)
    assert torch.equal(found, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_graph_follows_its_tensors(dtype: torch.dtype) -> None:
    """Captured at context 1; each replay sees other contexts, pages and tokens, with and without a window."""
    step = Tables(40, 1500, 8, 2, 128, dtype)
    windows = (None, 300, None)
    layout = step.layout(step.keys, step.values)

    def work() -> list[Tensor]:
        context = ForwardContext(layout)
        return [step.attend(context, window) for window in windows]

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()
    for _ in range(3):
        step.draw()
        expected = [step.expected(window) for window in windows]
        for output in outputs:
            output.fill_(torch.nan)
        graph.replay()
        for found, wanted in zip(outputs, expected, strict=True):
            assert error(found, wanted) < (8e-3 if dtype == torch.bfloat16 else 1e-5)
        assert all(map(torch.equal, outputs, work()))


@pytest.mark.parametrize("window", [None, 100])
def test_prompts_with_a_past_in_one_call(window: int | None) -> None:
    """Chunks, single tokens and whole prompts at once, in bfloat16, against the plain path in float64."""
    lengths, pasts = [300, 1, 17, 64, 1], [40, 500, 0, 1000, 0]
    contexts = [length + past for length, past in zip(lengths, pasts, strict=True)]
    slots = torch.randperm(4096, device=DEVICE)
    read = torch.stack([slots.roll(-sum(contexts[:i]))[: max(contexts)] for i in range(len(contexts))])
    write = torch.cat([read[i, c - n : c] for i, (c, n) in enumerate(zip(contexts, lengths, strict=True))])
    keys, values = torch.randn(2, 4096, 2, 64, device=DEVICE, dtype=torch.bfloat16)
    q, k, v = (torch.randn(sum(lengths), n, 64, device=DEVICE, dtype=torch.bfloat16) for n in (8, 2, 2))
    attention_cuda.write(keys, values, write, k, v)
    assert torch.equal(keys[write], k) and torch.equal(values[write], v)

    def layout(dtype: torch.dtype) -> PagedAttention:
        stores = [keys.to(dtype)], [values.to(dtype)]
        return PagedAttention(*stores, write, tuple(lengths), tuple(contexts), read)

    paged = layout(torch.bfloat16)
    found = attention_cuda.paged(ForwardContext(paged), paged, q, keys, values, None, window)
    wide = layout(torch.float64)
    exact = [x.double() for x in (q, k, v)]
    assert error(found, attention.attend_to_cache(ForwardContext(wide), wide, 0, *exact, None, window)) < 8e-3
