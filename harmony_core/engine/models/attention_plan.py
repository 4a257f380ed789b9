"""How a row's attention is cut into calls: index tensors and masks, made once for all layers of a forward pass.

Attention runs on right-padded groups of sequences of like length: under a causal mask a real token never sees padding
to its right, so a group needs no mask. B sequences, L their padded length, T tokens of the row, M context slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from harmony_core.engine.models.context import PackedAttention, PagedAttention
from harmony_core.memory.plan import PADDING_SHARE

PADDING_TOKENS = 64
"""Padded tokens always allowed in a group: below this an extra call costs more than it saves."""
PADDING_CONTEXT = 256
"""The same for the contexts of a decode step, where a padded token is gathered but hardly computed with."""


@dataclass(frozen=True)
class Group:
    """`batch` sequences padded to `length`, at rows `[start, start + batch * length)` of the gathered row."""

    start: int
    batch: int
    length: int


@dataclass(frozen=True)
class PackedPlan:
    """Causal attention of each sequence to itself.

    `order` `[padded]`: for each row of the gathered layout, the row's token; None when it is the row itself.
    `restore` `[tokens]`: where each token of these sequences, in row order, lies in the gathered layout; None likewise.
    """

    groups: tuple[Group, ...]
    order: Tensor | None
    restore: Tensor | None


@dataclass(frozen=True)
class DecodePlan:
    """One new token of each of B sequences of like context against their pages. `slots` `[B * M]`, `visible` `[B, M]`.

    `rows` `[B]`: their tokens in the row of the step; None: all of it.
    """

    rows: Tensor | None
    slots: Tensor
    visible: Tensor


@dataclass(frozen=True)
class ChunkPlan:
    """Several new tokens of one sequence after its past: rows `[start, stop)` of the row, all its `slots` `[M]`."""

    start: int
    stop: int
    slots: Tensor


@dataclass(frozen=True)
class PagedPlan:
    """Which rows of a paged step go which way. `fresh_rows` None: all of them; `restore` None: already in row order."""

    fresh: PackedPlan | None
    fresh_rows: Tensor | None
    decodes: tuple[DecodePlan, ...]
    chunks: tuple[ChunkPlan, ...]
    restore: Tensor | None


def group_by_length(lengths: Sequence[int], spare: int = PADDING_TOKENS) -> list[list[int]]:
    """Indices of sequences in groups of like length, longest first, with bounded padding in each."""
    groups: list[list[int]] = []
    padded = real = longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        waste = padded + longest - length
        if groups and waste <= max(spare, PADDING_SHARE * (real + length)):
            groups[-1].append(index)
            padded, real = waste, real + length
        else:
            groups.append([index])
            padded, real, longest = 0, length, length
    return groups


def plan_packed(attention: PackedAttention, device: torch.device) -> PackedPlan:
    """The calls for sequences back to back."""
    starts = [0, *accumulate(attention.lengths)]
    return _plan_sequences(attention.lengths, starts, device)


def plan_paged(attention: PagedAttention, device: torch.device) -> PagedPlan:
    """The calls for a prefill or decode step; sequences without a past need no pages to attend."""
    lengths, contexts, slots = attention.lengths, attention.context_lengths, attention.read_slots
    if slots is not None and max(lengths) == 1 and min(contexts) > 1:
        # A decode step, the common case by far.
        groups = group_by_length(contexts, PADDING_CONTEXT)
        if len(groups) == 1:
            return PagedPlan(None, None, (_plan_decode(slots, contexts, range(len(lengths)), None),), (), None)
        order = [i for group in groups for i in group]
        decodes = tuple(_plan_decode(slots, contexts, group, group) for group in groups)
        return PagedPlan(None, None, decodes, (), torch.argsort(torch.tensor(order)).to(device))
    starts = [0, *accumulate(lengths)]
    past = [context - length for length, context in zip(lengths, contexts, strict=True)]
    fresh = [i for i in range(len(lengths)) if past[i] == 0]
    decode = [i for i in range(len(lengths)) if past[i] and lengths[i] == 1]
    chunks = [i for i in range(len(lengths)) if past[i] and lengths[i] > 1]
    rows: list[int] = []
    groups = group_by_length([contexts[i] for i in decode], PADDING_CONTEXT)
    together = [[decode[place] for place in group] for group in groups]
    for i in (*fresh, *(i for group in together for i in group), *chunks):
        rows += range(starts[i], starts[i + 1])
    restore = None
    if rows != list(range(starts[-1])):
        restore = torch.argsort(torch.tensor(rows)).to(device)
    fresh_rows = None
    if fresh and len(fresh) < len(lengths):
        fresh_rows = torch.tensor([r for i in fresh for r in range(starts[i], starts[i + 1])], device=device)
    if decode or chunks:
        assert slots is not None, "a sequence with a past needs read_slots"
    fresh_lengths = [lengths[i] for i in fresh]
    return PagedPlan(
        fresh=_plan_sequences(fresh_lengths, [0, *accumulate(fresh_lengths)], device) if fresh else None,
        fresh_rows=fresh_rows,
        decodes=tuple(
            _plan_decode(slots, contexts, group, [starts[i] for i in group]) for group in together if slots is not None
        ),
        chunks=tuple(ChunkPlan(starts[i], starts[i + 1], slots[i, : contexts[i]]) for i in chunks if slots is not None),
        restore=restore,
    )


def _plan_sequences(lengths: Sequence[int], starts: Sequence[int], device: torch.device) -> PackedPlan:
    order: list[int] = []
    restore = [0] * starts[-1]
    groups = []
    for members in group_by_length(lengths):
        longest = lengths[members[0]]
        groups.append(Group(len(order), len(members), longest))
        for index in members:
            start, length = starts[index], lengths[index]
            restore[start : start + length] = range(len(order), len(order) + length)
            # Padding repeats the first token of its own sequence: any real row will do, its output is dropped.
            order += [*range(start, start + length), *[start] * (longest - length)]
    if order == list(range(len(order))):
        return PackedPlan(tuple(groups), None, None)
    return PackedPlan(tuple(groups), torch.tensor(order, device=device), torch.tensor(restore, device=device))


def _plan_decode(
    slots: Tensor, contexts: Sequence[int], members: Sequence[int], rows: Sequence[int] | None
) -> DecodePlan:
    limits = torch.tensor([contexts[i] for i in members], device=slots.device)
    longest = max(contexts[i] for i in members)
    chosen = slots[:, :longest] if len(members) == len(contexts) else slots[list(members), :longest]
    visible = torch.arange(longest, device=slots.device) < limits[:, None]
    # Padding may name a slot that holds anything; a masked NaN would still reach the output, so read one of ours.
    safe = torch.where(visible, chosen, chosen[:, :1])
    there = None if rows is None else torch.tensor(rows, device=slots.device)
    return DecodePlan(there, safe.reshape(-1), visible)
