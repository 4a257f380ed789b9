"""What the driver knows of one live model; its handles share it."""

from __future__ import annotations

import asyncio
import hashlib
import math
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from harmony_core.client.batching import Sample, SampleQueue
from harmony_core.client.engine import Engine, Request
from harmony_core.errors import ConflictError, ModelRefused, NothingToTrain, UsageError
from harmony_core.frames import Frame, is_own
from harmony_core.ledger import Plan
from harmony_core.memory import Shape, weight_elements
from harmony_core.rpc.protocol import Dealloc, Message, MicroBatch, StepMetrics, pack_doubles, pack_floats, pack_ints

if TYPE_CHECKING:
    from harmony_core.registry import ModelVersion
    from harmony_core.tokenization import ChatTokenizer

MAX_UNANSWERED = 8
"""Micro-batches per replica that may wait on the ranks before `train_*` makes its caller wait."""

MAX_GENERATING = 4096
"""Generations per replica that the ranks know of; the others wait in the driver, in the order of their calls."""


class DryRunEnded(Exception):
    """A dry run came to the first call that needs a rank. `where` is the caller's file:line."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where


def _callers_line() -> str:
    """file:line of the nearest caller that is the author's own code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        here = Frame(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        if is_own(here):
            return f"{Path(here.filename).name}:{here.line}"
        frame = frame.f_back
    return "the recipe"


@dataclass
class PendingStep:
    """What has been accepted since the last optimizer step."""

    queue: SampleQueue
    totals: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    batches: deque[Request] = field(default_factory=deque)
    next_batch: int = 0
    """Micro-batch i goes to replica i mod dp."""


@dataclass(frozen=True)
class Placement:
    """How a model was spawned. Token counts; `plan` in bytes per rank."""

    tp: int
    train: bool
    lora: bool
    max_batch_tokens: int
    kv_tokens: int
    context_tokens: int
    tokens_to_generate: int
    shape: Shape
    plan: Plan
    weights_key: str
    scalar: bool = False


class LiveModel:
    """A spawned model: where it runs, its limits, and what is under way. Frees itself when no handle is left."""

    def __init__(
        self, engine: Engine, name: str, version: ModelVersion, tokenizer: ChatTokenizer | None, placement: Placement
    ) -> None:
        self.engine = engine
        self.name = name
        self.version = version
        self.placement = placement
        self.replicas = engine.world_size // placement.tp
        self.step = 0
        self._steps_under_way = 0
        self.generating = asyncio.Semaphore(MAX_GENERATING * self.replicas)
        """Held by each generation that is under way on the ranks."""
        self.pending = PendingStep(SampleQueue(placement.max_batch_tokens, self.replicas))
        self._tokenizer = tokenizer
        self._outstanding = [0] * self.replicas
        engine.request_numbers[name] = 0
        self._owns_weights = False
        self._freed = False
        self._loop = asyncio.get_running_loop()

    def copied(self, name: str, shape: Shape, plan: Plan) -> LiveModel:
        """The record of a frozen copy of this model."""
        return LiveModel(
            self.engine,
            name,
            self.version,
            self._tokenizer,
            replace(self.placement, train=False, shape=shape, plan=plan),
        )

    @property
    def tokenizer(self) -> ChatTokenizer:
        """The model's tokenizer. Raises ModelRefused for a model that has none."""
        if self._tokenizer is None:
            raise ModelRefused(
                f"model {self.version.ref} has no tokenizer: only raw_logprobs and train_tangents can be used",
                hint="add tokenizer.json and a chat template to the directory and import it again",
            )
        return self._tokenizer

    def require_live(self) -> None:
        """Raises ConflictError when the model was deallocated."""
        if self._freed:
            raise ConflictError(f"model {self.name!r} was deallocated", hint="spawn it again")

    def require_ranks(self) -> None:
        """Before any request: the model must be live, and not only planned. Raises DryRunEnded, ConflictError."""
        self.require_live()
        if self.engine.options.dry_run:
            raise DryRunEnded(_callers_line())

    def next_request_seed(self) -> int:
        """A request's seed: a hash of the run's seed, the spawn's name and the request's number."""
        numbers = self.engine.request_numbers
        number = numbers.get(self.name, 0)
        numbers[self.name] = number + 1
        text = f"{self.engine.options.seed}/{self.name}/{number}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

    def least_busy(self) -> int:
        """The replica with the fewest outstanding tokens."""
        return min(range(self.replicas), key=lambda r: (self._outstanding[r], r))

    def post(self, replica: int, message: Message, cost: int) -> Request:
        """Send a request of `cost` tokens to a replica."""
        self._outstanding[replica] += cost
        request = self.engine.post_replica(self.placement.tp, replica, message)

        def answered(_: asyncio.Future[Message]) -> None:
            self._outstanding[replica] -= cost

        request.future.add_done_callback(answered)
        return request

    def accept(self, group: Sequence[Sample], unit: str, amount: float) -> None:
        """Queue validated samples that belong together and add `amount` of `unit` to the step's denominator."""
        self.require_ranks()
        self.pending.totals[unit] = self.pending.totals.get(unit, 0.0) + amount
        self.pending.samples += 1
        self._send(self.pending.queue.add(*group))

    def cut(self) -> None:
        """Cut and send what is pending, without a step."""
        self._send(self.pending.queue.cut())

    def _send(self, batches: list[list[Sample]]) -> None:
        pending = self.pending
        for batch in batches:
            replica = pending.next_batch % self.replicas
            pending.next_batch += 1
            loss = batch[0].loss
            message = MicroBatch(
                model=self.name,
                replica=replica,
                tokens=pack_ints(chain.from_iterable(s.tokens for s in batch)),
                targets=pack_ints(chain.from_iterable(s.targets for s in batch)),
                coefficients=pack_doubles(chain.from_iterable(s.coefficients for s in batch)),
                lengths=pack_ints(map(len, batch)),
                sampler_logprobs=_sampler_logprobs(batch),
                loss=loss.name,
                custom=loss.custom,
                settings=dict(loss.settings),
                fields={
                    name: pack_doubles(chain.from_iterable(s.fields[name] for s in batch)) for name in batch[0].fields
                },
                group=loss.group,
            )
            request = self.post(replica, message, sum(map(len, batch)))
            pending.batches.append(request)

    def follow_step(self, posted: asyncio.Future[list[Message]]) -> None:
        """Count an optimizer step that was sent to the ranks, whether or not somebody waits for it."""
        self._steps_under_way += 1

        def answered(future: asyncio.Future[list[Message]]) -> None:
            self._steps_under_way -= 1
            if not future.cancelled() and future.exception() is None:
                answer = future.result()[0]
                assert isinstance(answer, StepMetrics)
                self.step = int(answer.values["step"])

        posted.add_done_callback(answered)

    @property
    def present_version(self) -> int | None:
        """How many optimizer steps the weights have seen; None while a step is under way."""
        return None if self._steps_under_way else self.step

    async def room(self) -> None:
        """Wait while too many of the micro-batches sent so far are unanswered.

        Later ones do not count: of a thousand samples that wait, each is woken once.
        """
        batches, most = self.pending.batches, MAX_UNANSWERED * self.replicas
        while batches and batches[0].future.done():
            batches.popleft()
        if len(batches) > most:
            await asyncio.wait([batches[-most - 1].future])

    def close_step(self, normalise: str) -> float:
        """Cut and send what is pending, and begin the next step. Returns the denominator.

        Raises NothingToTrain when nothing was accepted, UsageError for mixed units.
        """
        pending = self.pending
        self._send(pending.queue.cut())
        self.pending = PendingStep(SampleQueue(self.placement.max_batch_tokens, self.replicas))
        if pending.samples == 0:
            raise NothingToTrain(
                f"optim_step of {self.name!r}: no sample was accepted since the last one",
                hint="await at least one train_* call before optim_step",
            )
        total = sum(pending.totals.values())
        if normalise == "mean" and len(pending.totals) > 1:
            units = " and ".join(sorted(pending.totals))
            raise UsageError(
                f"one step of {self.name!r} mixes losses that are normalised differently: {units}",
                hint='call optim_step between them, or optim_step(..., normalise="sum")',
            )
        if normalise == "mean" and total == 0:
            raise NothingToTrain(f"the step of {self.name!r} has a denominator of 0")
        return total

    def promise_own_weights(self) -> None:
        """Promise memory for weights that are no longer shared with other spawns. Raises MemoryRefused."""
        if self.placement.weights_key and not self._owns_weights:
            shape = self.placement.shape
            weights = weight_elements(shape.spec, shape.tp, shape.headless) * shape.element
            self.engine.ledger.promise(_own_weights(self.name), Plan(weights=weights))
            self._owns_weights = True

    def free(self) -> asyncio.Future[list[Message]] | None:
        """Give the memory back; the model cannot be used afterwards. None when there is nothing to wait for."""
        if self._freed:
            return None
        self._freed = True
        _forget(self.engine, self.name)
        if self.engine.options.dry_run:
            return None
        return self.engine.post_global(Dealloc(model=self.name))

    def __del__(self) -> None:
        if not self._freed and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_free_quietly, self.engine, self.name)


def _sampler_logprobs(batch: list[Sample]) -> bytes:
    """Those of all samples, one after the other; nothing when no sample has any."""
    if all(s.sampler_logprobs is None for s in batch):
        return b""
    return pack_floats(chain.from_iterable(s.sampler_logprobs or [math.nan] * len(s) for s in batch))


def _own_weights(name: str) -> str:
    return f"{name}: loaded weights"


def _forget(engine: Engine, name: str) -> None:
    engine.names.discard(name)
    engine.request_numbers.pop(name, None)
    engine.ledger.release(name)
    engine.ledger.release(_own_weights(name))


def _free_quietly(engine: Engine, name: str) -> None:
    """Free a model that no handle refers to any more."""
    _forget(engine, name)
    if not engine.options.dry_run and not engine.closed:
        engine.post_global(Dealloc(model=name))
