"""Prefill, decode and chunked steps against pages whose unused slots hold NaN, compared with whole forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tiny_models
from harmony_core.engine.models.context import ForwardContext, PagedAttention, forward_context
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
            write_slots=torch.tensor(write, device=self.device),
            lengths=tuple(count for _, count in new),
            context_lengths=tuple(contexts),
            read_slots=read.to(self.device) if any(past) else None,
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
