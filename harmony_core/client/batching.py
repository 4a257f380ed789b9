"""Packs the samples of a step into micro-batches, in call order, and counts the step's denominator."""

from __future__ import annotations

import math
from asyncio import Future, wait
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from harmony_core.client.allowed_tokens import AllowedTokens, packed
from harmony_core.errors import NothingToTrain, UsageError
from harmony_core.rpc.protocol import CustomLoss, Message, MicroBatch
from harmony_core.rpc.wire import pack_doubles, pack_floats, pack_ints

WINDOW_BATCHES = 4
"""A window is cut once this many full micro-batches for each replica are pending: enough to pack well, early enough
to keep the ranks busy while the recipe still submits."""


@dataclass(frozen=True)
class Loss:
    """The loss of a sample: equal for all samples of a micro-batch, as in `MicroBatch`."""

    name: str = "linear"
    settings: tuple[tuple[str, float], ...] = ()
    group: int = 1
    custom: CustomLoss | None = None
    dropout: bool = True
    """False where log-probs are compared with the sampler's, which uses no dropout."""


LINEAR = Loss()


@dataclass(frozen=True)
class TrainSample:
    """One sequence to train on: inputs, their targets, and a coefficient for each target, as in `MicroBatch`.

    `sampler_logprobs`: the sampler's log-prob of each target under the present weights, NaN where it is missing.
    `fields`: one value for each target whose coefficient is not 0. `on_last`: the sample is scored at its thread's last
    token, which is an input too; in other samples that token is only a target. `allowed`: the tokens that each target's
    softmax goes over, if a grammar constrained some of them.
    """

    tokens: list[int]
    targets: list[int]
    coefficients: list[float]
    sampler_logprobs: list[float] | None = None
    loss: Loss = LINEAR
    fields: dict[str, list[float]] = field(default_factory=dict)
    on_last: bool = False
    allowed: AllowedTokens | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def thread_tokens(self) -> int:
        """Number of tokens of the sample's thread."""
        return len(self.tokens) + (not self.on_last)

    @property
    def kind(self) -> tuple[Loss, frozenset[str]]:
        """Equal for samples that may share a micro-batch."""
        return self.loss, frozenset(self.fields)


Group = list[TrainSample]
"""Samples that belong together, such as a pair. They share a micro-batch, which is cut into parts if it is too long."""


class Accepted(NamedTuple):
    """The samples of one call, and their share of the step's denominator.

    They share one micro-batch, unless `apart` allows them to lie in different ones.
    """

    samples: Group
    unit: str
    amount: float
    apart: bool = False

    @property
    def groups(self) -> list[Group]:
        """The samples in groups; the samples of a group share a micro-batch."""
        return [[sample] for sample in self.samples] if self.apart else [self.samples]


@dataclass
class _Bin:
    free: int
    members: list[int] = field(default_factory=list)


def pack(lengths: Sequence[int], capacity: int, multiple_of: int = 1) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `capacity`, few and even.

    Best-fit decreasing gives the number of bins (at most 11/9 of the optimum + 1, Johnson 1973); it is rounded up to
    `multiple_of` (the replicas) if there are enough samples, and the longest-first samples then go to the emptiest
    bin, so that replicas finish together. Falls back to the tight packing if the even one does not fit.
    Deterministic; members of a bin keep call order.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    tight: list[_Bin] = []
    for index in order:
        fitting = [b for b in tight if b.free >= lengths[index]]
        if fitting:
            target = min(fitting, key=lambda b: b.free)
        else:
            target = _Bin(capacity)
            tight.append(target)
        target.free -= lengths[index]
        target.members.append(index)
    count = min(-(-len(tight) // multiple_of) * multiple_of, len(lengths))
    even = [_Bin(capacity) for _ in range(count)]
    for index in order:
        target = max(even, key=lambda b: b.free)
        if target.free < lengths[index]:
            even = tight
            break
        target.free -= lengths[index]
        target.members.append(index)
    return [sorted(b.members) for b in even if b.members]


class SampleQueue:
    """Samples waiting to be cut into micro-batches of at most `capacity` tokens, each of samples of one kind.

    A group with more tokens is a micro-batch by itself, for `parts` to cut.
    """

    def __init__(self, capacity: int, replicas: int) -> None:
        self._capacity = capacity
        self._replicas = replicas
        self._pending: list[Group] = []
        self._tokens = 0

    def add(self, *group: TrainSample) -> list[list[TrainSample]]:
        """Queue samples that belong together. Returns the micro-batches of the window if it is full, else []."""
        self._pending.append(list(group))
        self._tokens += _tokens(group)
        if self._tokens < WINDOW_BATCHES * self._replicas * self._capacity:
            return []
        return self.cut()

    def cut(self) -> list[list[TrainSample]]:
        """Everything pending, as micro-batches."""
        kinds: dict[tuple[Loss, frozenset[str]], list[Group]] = {}
        for group in self._pending:
            kinds.setdefault(group[0].kind, []).append(group)
        cut: list[list[TrainSample]] = []
        for groups in kinds.values():
            small = [g for g in groups if _tokens(g) <= self._capacity]
            bins = pack([_tokens(g) for g in small], self._capacity, self._replicas)
            cut += [[sample for i in members for sample in small[i]] for members in bins]
            cut += [g for g in groups if _tokens(g) > self._capacity]
        self._pending = []
        self._tokens = 0
        return cut


def require_weight(weights: Iterable[float]) -> float:
    """The sum of a sample's weights. Raises NothingToTrain if it is 0."""
    if (total := sum(weights)) <= 0:
        raise NothingToTrain(
            "the sample has no weighted token",
            hint="give an assistant turn a weight, as with_weight_last_assistant_turn() does",
        )
    return total


@dataclass
class PendingStep:
    """The samples that were accepted since the last optimizer step of a model."""

    model: str
    queue: SampleQueue
    totals: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    gradient: bool = False
    """Whether any of the samples has a gradient: tangents may all be zero."""
    sent: list[Future[Message]] = field(default_factory=list)
    """The answers of its micro-batches; number i goes to replica i mod dp."""
    answered: int = 0

    def add(self, accepted: Accepted) -> Iterator[list[list[TrainSample]]]:
        """Queue the samples of one call, which count as one; yields the micro-batches that are full."""
        self.totals[accepted.unit] = self.totals.get(accepted.unit, 0.0) + accepted.amount
        self.samples += 1
        for group in accepted.groups:
            self.gradient = self.gradient or any(any(sample.coefficients) for sample in group)
            yield self.queue.add(*group)

    async def room(self, most: int) -> None:
        """Wait while more than `most` of the micro-batches sent so far are unanswered.

        Micro-batches that are sent later do not count, so each of a thousand waiting samples is woken once.
        """
        while self.answered < len(self.sent) and self.sent[self.answered].done():
            self.answered += 1
        if len(self.sent) - self.answered > most:
            await wait([self.sent[-most - 1]])

    def denominator(self, normalise: str) -> float:
        """The number that divides the step. Raises NothingToTrain without samples, UsageError for mixed units."""
        if self.samples == 0:
            raise NothingToTrain(
                f"optim_step of {self.model!r}: no sample was accepted since the last one",
                hint="await at least one train_* call before optim_step",
            )
        total = sum(self.totals.values())
        if normalise == "mean" and len(self.totals) > 1:
            units = " and ".join(sorted(self.totals))
            raise UsageError(
                f"one step of {self.model!r} mixes losses that are normalised differently: {units}",
                hint='call optim_step between them, or optim_step(..., normalise="sum")',
            )
        if normalise == "mean" and total == 0 and self.gradient:
            raise NothingToTrain(f"the step of {self.model!r} has a denominator of 0")
        return total or 1.0


def parts(batch: Sequence[TrainSample], capacity: int) -> list[int]:
    """The number of adjacent samples in each part of at most `capacity` tokens; [] if one part holds them all."""
    sizes: list[int] = []
    room = -1
    for sample in batch:
        if len(sample) > room:
            sizes.append(0)
            room = capacity
        sizes[-1] += 1
        room -= len(sample)
    return sizes if len(sizes) > 1 else []


def micro_batch(model: str, replica: int, batch: Sequence[TrainSample], capacity: int) -> MicroBatch:
    """The message for samples of one kind."""
    loss, sampler = batch[0].loss, b""
    if not all(s.sampler_logprobs is None for s in batch):
        sampler = pack_floats(chain.from_iterable(s.sampler_logprobs or [math.nan] * len(s) for s in batch))
    allowed, masks = packed([(len(s), s.allowed) for s in batch])
    return MicroBatch(
        model=model,
        replica=replica,
        tokens=pack_ints(chain.from_iterable(s.tokens for s in batch)),
        targets=pack_ints(chain.from_iterable(s.targets for s in batch)),
        coefficients=pack_doubles(chain.from_iterable(s.coefficients for s in batch)),
        lengths=pack_ints(map(len, batch)),
        sampler_logprobs=sampler,
        loss=loss.name,
        custom=loss.custom,
        settings=dict(loss.settings),
        fields={name: pack_doubles(chain.from_iterable(s.fields[name] for s in batch)) for name in batch[0].fields},
        group=loss.group,
        parts=pack_ints(parts(batch, capacity)),
        dropout=loss.dropout,
        allowed=allowed,
        masks=masks,
    )


def _tokens(group: Sequence[TrainSample]) -> int:
    return sum(map(len, group))
