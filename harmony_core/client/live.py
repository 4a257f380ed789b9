"""What the driver knows of one live model; its handles share it."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from harmony_core.client.batching import Accepted, Loss, Sample, SampleQueue, micro_batch
from harmony_core.client.engine import Engine, Request, part_of
from harmony_core.client.limits import Placement, check_length, of_batch, of_context
from harmony_core.client.losses import AnyThread, check_head
from harmony_core.errors import (
    ConflictError,
    DataError,
    HarmonyError,
    ModelRefused,
    NothingToTrain,
    SampleTooLong,
    UsageError,
)
from harmony_core.memory.fit import could_fit
from harmony_core.memory.ledger import Plan
from harmony_core.memory.plan import weight_elements
from harmony_core.request_seeds import request_seed
from harmony_core.rpc.protocol import Dealloc, Message, StepMetrics
from harmony_core.rpc.tracebacks import Frame, is_own
from harmony_core.text.threads import StringThread, TokenizedThread

if TYPE_CHECKING:
    from harmony_core.registry import ModelVersion
    from harmony_core.text.tokenization import ChatTokenizer

log = logging.getLogger(__name__)

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
    gradient: bool = False
    """Whether any of them has one: tangents may all be zero."""
    batches: deque[Request] = field(default_factory=deque)
    next_batch: int = 0
    """Micro-batch i goes to replica i mod dp."""


@dataclass(frozen=True)
class PlannedCopy:
    """A copy whose memory is promised, and that is not made yet."""

    name: str
    placement: Placement


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
        self._told_dropout = False
        self.changes = 0
        """How often the weights were trained or taken from a checkpoint, steps under way included."""
        self._mark = object()
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

    def copied(self, name: str, placement: Placement) -> LiveModel:
        """The record of a frozen copy of this model."""
        return LiveModel(self.engine, name, self.version, self._tokenizer, placement)

    @property
    def tokenizer(self) -> ChatTokenizer:
        """The model's tokenizer. Raises ModelRefused for a model that has none."""
        if self._tokenizer is None:
            raise ModelRefused(
                f"model {self.version.ref} has no tokenizer: only raw_logprobs and train_tangents can be used",
                hint="add tokenizer.json and a chat template to the directory and import it again",
            )
        return self._tokenizer

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens at which a completion ends; none without a tokenizer."""
        return frozenset() if self._tokenizer is None else self._tokenizer.stop_ids

    def would_fit(self, settings: Sequence[str], tokens: int) -> bool:
        """Whether the model would fit, in its place, with these settings at so many tokens; "" cannot be set."""
        shape, ledger = self.placement.shape, self.engine.ledger.without(self.name)
        if "max_batch_size" in settings:
            shape = replace(shape, max_batch_tokens=tokens)
        if "kv_cache_len" in settings:
            shape = replace(shape, kv_tokens=tokens)
        return "" not in settings and could_fit(shape, ledger.free, ledger.transient)

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
        """The seed of the model's next request."""
        return request_seed(self.engine.options.seed, self.name, self.engine.request_numbers)

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

    def check_ids(self, tokens: Sequence[int]) -> None:
        """Raise DataError for a token that the model does not have. The ranks do not look again."""
        size = self.version.spec.vocab_size
        if tokens and not (min(tokens) >= 0 and max(tokens) < size):
            position = next(i for i, token in enumerate(tokens) if not 0 <= token < size)
            raise DataError(f"token {tokens[position]} at position {position} is outside the vocabulary of {size}")

    def tokenized(self, thread: AnyThread) -> TokenizedThread:
        """The thread as tokens that the model has."""
        tokens = thread if isinstance(thread, TokenizedThread) else self.tokenizer.tokenize(thread)
        self.check_ids(tokens.token_ids)
        return tokens

    def whole(self, thread: AnyThread) -> TokenizedThread:
        """The thread's tokens through what the template writes behind the last turn."""
        if isinstance(thread, StringThread):
            return self.tokenizer.tokenize(thread)
        return thread if self.version.tokenizer_dir is None else self.tokenizer.completed(thread)

    def sample(
        self, thread: TokenizedThread, coefficients: list[float], loss: Loss, fields: dict[str, list[float]]
    ) -> Sample:
        """A thread as inputs and targets of a loss, with what the sampler recorded of them."""
        tokens = thread.token_ids
        return Sample(tokens[:-1], tokens[1:], coefficients, self._recorded(thread), loss, fields)

    def _recorded(self, thread: TokenizedThread) -> list[float] | None:
        """The sampler's log-prob of each target; NaN where it is not of this model, or of older weights."""
        record = thread.generation
        if record is None or record.model != self.name:
            return None
        last, present = thread.token_turns[-1], self.present_version
        if len(record.logprobs) != last.end - last.start:
            return None
        found = [math.nan] * (len(thread.token_ids) - 1)
        found[last.start - 1 : last.end - 1] = [
            logprob if version == present else math.nan
            for logprob, version in zip(record.logprobs, record.versions, strict=True)
        ]
        return found

    def take(self, build: Callable[[], list[Accepted]]) -> Coroutine[Any, Any, None]:
        """Validate and queue now, so that the order of calls is the order of samples; report when awaited."""
        refused: HarmonyError | None = None
        if not self.placement.train:
            raise UsageError(f"model {self.name!r} was spawned for inference", hint="use spawn_train")
        try:
            self.require_ranks()
            found = build()
            for accepted in found:
                check_head(self.name, self.placement.scalar, accepted.samples[0].loss.name)
                for group in accepted.groups:
                    self._check_length(group)
            self._tell_dropout(found[0].samples[0].loss)
            for accepted in found:
                self.accept(accepted.groups, accepted.unit, accepted.amount)
        except HarmonyError as error:
            refused = error
        return self._taken(refused)

    async def _taken(self, refused: HarmonyError | None) -> None:
        if refused is not None:
            raise refused
        await self.room()

    def _check_length(self, samples: Sequence[Sample]) -> None:
        """Each sequence must fit a micro-batch and the context; those that belong together need not fit together."""
        what = "the sample has" if len(samples) == 1 else f"the longest of {len(samples)} sequences has"
        limits = [of_context(self.placement)[0], of_batch(self.placement)]
        check_length(self, SampleTooLong, max(sample.thread_tokens for sample in samples), what + " {} tokens", limits)

    def _tell_dropout(self, loss: Loss) -> None:
        """Say once of a model what its adapter's dropout means to a loss on what was sampled."""
        lora = self.placement.shape.lora
        if lora is None or not lora.dropout or self._told_dropout or (loss.dropout and loss.custom is None):
            return
        self._told_dropout = True
        what = f"the dropout of {lora.dropout:g} of {self.name!r}"
        if loss.custom is None:
            log.warning("train_grpo, train_ppo and train_gspo leave out %s: samples are drawn without it", what)
        else:
            log.warning("train_custom gives log-probs under %s: their ratio to sampled ones is not 1", what)

    def accept(self, groups: Sequence[Sequence[Sample]], unit: str, amount: float) -> None:
        """Queue the validated samples of one call and add `amount` of `unit` to the step's denominator.

        Those of a group belong together; all count as one.
        """
        self.require_ranks()
        self.pending.totals[unit] = self.pending.totals.get(unit, 0.0) + amount
        self.pending.samples += 1
        for group in groups:
            self.pending.gradient = self.pending.gradient or any(any(sample.coefficients) for sample in group)
            self._send(self.pending.queue.add(*group))

    def cut(self) -> None:
        """Cut and send what is pending, without a step."""
        self._send(self.pending.queue.cut())

    def _send(self, batches: list[list[Sample]]) -> None:
        pending = self.pending
        for batch in batches:
            replica = pending.next_batch % self.replicas
            pending.next_batch += 1
            message = micro_batch(self.name, replica, batch, self.placement.max_batch_tokens)
            pending.batches.append(self.post(replica, message, sum(map(len, batch))))

    def follow_step(self, posted: asyncio.Future[list[Message]]) -> None:
        """Count an optimizer step that was sent to the ranks, whether or not somebody waits for it."""
        self._steps_under_way += 1
        self.changed()

        def answered(future: asyncio.Future[list[Message]]) -> None:
            self._steps_under_way -= 1
            if not future.cancelled() and future.exception() is None:
                answer = future.result()[0]
                assert isinstance(answer, StepMetrics)
                self.step = int(answer.values["step"])

        posted.add_done_callback(answered)

    def changed(self) -> None:
        """The weights will not be those of the registry."""
        self.changes += 1
        self.engine.unsaved.add(self._mark)

    def saved(self, changes: int) -> None:
        """The weights as they were after so many changes are a version of the registry."""
        if changes == self.changes:
            self.engine.unsaved.discard(self._mark)

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
        if normalise == "mean" and total == 0 and pending.gradient:
            raise NothingToTrain(f"the step of {self.name!r} has a denominator of 0")
        return total or 1.0

    def promise_own_weights(self) -> None:
        """Promise memory for weights that are no longer shared with other spawns. Raises MemoryRefused."""
        if self.placement.weights_key and not self._owns_weights:
            shape = self.placement.shape
            weights = weight_elements(shape.spec, shape.tp, shape.headless) * shape.element
            self.engine.ledger.promise(part_of(self.name, "loaded weights"), Plan(weights=weights))
            self._owns_weights = True

    def free(self) -> asyncio.Future[list[Message]] | None:
        """Give the memory back; the model cannot be used afterwards. None when there is nothing to wait for."""
        if self._freed:
            return None
        self._freed = True
        self.engine.forget(self.name)
        if self.engine.options.dry_run:
            return None
        return self.engine.post_global(Dealloc(model=self.name))

    def __del__(self) -> None:
        if not self._freed and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_free_quietly, self.engine, self.name)


def _free_quietly(engine: Engine, name: str) -> None:
    """Free a model that no handle refers to any more."""
    engine.forget(name)
    if not engine.options.dry_run and not engine.closed:
        engine.post_global(Dealloc(model=name))
