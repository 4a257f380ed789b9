"""Prefill, decode and chunked steps against pages whose unused slots hold NaN, compared with whole forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tiny_models
from harmony_core.engine.models.context import DecodeAttention, ForwardContext, PagedAttention, forward_context
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.model import CausalLM
from ranks import Group

SLOTS = 512
STEPS: list[list[tuple[int, int]]] = [
    # (sequence, new tokens) of each step; sequences keep their place in the row.
    [(0, 5), (1, 19), (2, 1), (3, 12)],
    [(0, 1), (1, 1), (2, 1), (3, 1)],
    [(2, 1), (0, 1)],
    [(1, 7), (4, 6), (0, 1), (3, 2), (2, 1), (5, 1)],
    [(5, 1), (4, 1), (3, 1), (2, 1), (1, 1), (0, 1)],
    [(5, 4)],
]


class Pages:
    """Slots handed out in random order, everything unwritten NaN."""

    def __init__(self, model: CausalLM) -> None:
        shape = (SLOTS, model.num_kv_heads_local, model.head_dim)
        self.device = model.device
        empty = torch.full(shape, torch.nan, dtype=model.dtype, device=model.device)
        self.keys = [empty.clone() for _ in range(model.num_layers)]
        self.values = [empty.clone() for _ in range(model.num_layers)]
        self.free = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(1)).tolist()
        self.slots: dict[int, list[int]] = {}

    def step(self, new: list[tuple[int, int]]) -> PagedAttention:
        for sequence, count in new:
            self.slots.setdefault(sequence, []).extend(self.free.pop() for _ in range(count))
        contexts = [len(self.slots[sequence]) for sequence, _ in new]
        past = [context - count for context, (_, count) in zip(contexts, new, strict=True)]
        # Padding names slots that nobody wrote.
        read = torch.tensor(self.free[:1]).repeat(len(new), max(contexts))
        for row, (sequence, _) in enumerate(new):
            read[row, : contexts[row]] = torch.tensor(self.slots[sequence])
        write = [slot for (sequence, count) in new for slot in self.slots[sequence][-count:]]
        return PagedAttention(
            keys=self.keys,
            values=self.values,
            slot_mapping=torch.tensor(write, device=self.device),
            lengths=tuple(count for _, count in new),
            context_lengths=tuple(contexts),
            context_slots=read.to(self.device) if any(past) else None,
        )


def against_whole_forward(group: Group, directories: list[str], tp: int, dtype: str) -> list[float]:
    """For each model the worst difference of any new token's logits from those of plain transformers."""
    place, _, _ = group.grid(tp)
    kind, worst = getattr(torch, dtype), []
    for directory in directories:
        model = load_model(Path(directory), place, torch.device("cpu"), kind)
        worst.append(worst_difference(model, tiny_models.reference(Path(directory), kind)))
    return worst


@torch.no_grad()
def worst_difference(model: CausalLM, reference: Any) -> float:
    """Of the logits of any new token of any step from those of a whole forward pass of `reference`."""
    pages, worst = Pages(model), 0.0
    history = dict(enumerate(tiny_models.random_tokens([60] * 6)))
    for new in STEPS:
        before = {sequence: len(pages.slots.get(sequence, [])) for sequence, _ in new}
        attention = pages.step(new)
        tokens = [t for s, count in new for t in history[s][before[s] : before[s] + count]]
        positions = [p for s, count in new for p in range(before[s], before[s] + count)]
        with forward_context(ForwardContext(attention)):
            hidden = model.hidden_states(
                torch.tensor(tokens, device=model.device), torch.tensor(positions, device=model.device)
            )
            logits = model.logits(hidden).cpu()
        expected: list[Tensor] = []
        for s, count in new:
            whole = reference(torch.tensor([history[s][: before[s] + count]])).logits[0]
            expected.append(whole[-count:])
        worst = max(worst, (logits - torch.cat(expected)).abs().max().item())
        assert torch.isfinite(logits).all()
    return worst


@torch.no_grad()
def worst_difference_of_decoding(model: CausalLM, reference: Any) -> float:
    """The same of steps with all lengths on the device, two rows of padding in each; past edges of pages and splits."""
    page_size, prompts, steps = 16, [1, 14, 15, 16, 31, 253, 1], 4
    most = -(-(max(prompts) + steps) // page_size)
    history = tiny_models.random_tokens([prompt + steps for prompt in prompts])
    table = torch.randperm(most * len(prompts), generator=torch.Generator().manual_seed(2)).int() + 1
    # Page 0 is for padding, whose row is the last one.
    table = torch.cat([table.view(len(prompts), most), torch.zeros(1, most, dtype=torch.int32)])
    shape = ((most * len(prompts) + 1) * page_size, model.num_kv_heads_local, model.head_dim)
    keys, values = (
        [torch.full(shape, torch.nan, dtype=model.dtype, device=model.device) for _ in range(model.num_layers)]
        for _ in range(2)
    )
    place = [torch.arange(prompt) for prompt in prompts]
    write = torch.cat([table[i, p // page_size].long() * page_size + p % page_size for i, p in enumerate(place)])
    first = PagedAttention(keys, values, write.to(model.device), tuple(prompts), tuple(prompts), None)
    prompt_tokens = torch.tensor([t for h, prompt in zip(history, prompts, strict=True) for t in h[:prompt]])
    with forward_context(ForwardContext(first)):
        model.hidden_states(prompt_tokens.to(model.device), torch.cat(place).to(model.device))
    worst = 0.0
    for step in range(steps):
        contexts = torch.tensor([*(prompt + step + 1 for prompt in prompts), 1, 1], dtype=torch.int32)
        rows = torch.tensor([*range(len(prompts)), len(prompts), len(prompts)], dtype=torch.int32)
        tokens = [*(h[prompt + step] for h, prompt in zip(history, prompts, strict=True)), 3, 5]
        layout = DecodeAttention(
            *(keys, values, *(x.to(model.device) for x in (table, rows, contexts))), block_size=page_size, capacity=20
        )
        with forward_context(ForwardContext(layout)):
            hidden = model.hidden_states(
                torch.tensor(tokens, device=model.device), contexts.long().to(model.device) - 1
            )
            logits = model.logits(hidden).cpu()
        expected = [
            reference(torch.tensor([h[: prompt + step + 1]])).logits[0, -1]
            for h, prompt in zip(history, prompts, strict=True)
        ]
        worst = max(worst, (logits[:-2] - torch.stack(expected)).abs().max().item())
        assert torch.isfinite(logits).all()
    return worst
