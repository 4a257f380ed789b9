"""The engine thread of one rank: take an instruction, execute it, answer. It issues every collective of the rank.

The leader of a domain turns requests into instructions and sends them to the other ranks, which execute them
unchanged. Only the leader decides, so all ranks of a domain enter the same collectives in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor

from harmony_core.engine.groups import Domain, Groups
from harmony_core.engine.inference.runner import Pending
from harmony_core.engine.inference.scheduler import Scheduler
from harmony_core.engine.leader import (
    GenerateWork,
    GlobalWork,
    Instruction,
    Leader,
    ModelQueue,
    RankResult,
    ReplicaQueue,
    ScoreWork,
    Settle,
    Step,
    TrainWork,
    decode_instruction,
    decode_result,
    encode_instruction,
    encode_result,
)
from harmony_core.engine.model_table import ModelTable, SpawnedModel
from harmony_core.engine.models.allowed import AllowedTokens
from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.models.heads import scores, token_logprobs
from harmony_core.engine.models.model import CausalLM
from harmony_core.errors import InternalError, LossFailed, StepFailed
from harmony_core.rpc.protocol import (
    AbandonStep,
    Clone,
    Dealloc,
    Inspect,
    Inspected,
    Load,
    MakePool,
    Message,
    Nothing,
    OptimStep,
    Regroup,
    Save,
    Score,
    SetStep,
    Shutdown,
    Spawn,
    StepMetrics,
)
from harmony_core.rpc.rank_channel import IDLE, progress
from harmony_core.rpc.wire import Failure, error_of, failure_of

if TYPE_CHECKING:
    from harmony_core.engine.topology import Topology
    from harmony_core.rpc.rank_channel import RankChannel


@torch.no_grad()
def score(model: CausalLM, adapter: str | None, requests: list[Score], head: Tensor | None = None) -> list[bytes]:
    """Return float32 log-probs `[T]` of the targets of each request; a negative target is skipped and gives 0.

    With a scalar `head`, return the values at the positions of the targets instead; any non-negative target will do.
    A request to `embed` gets the hidden state of its last token, `[d]`.
    """
    tokens = [np.frombuffer(request.tokens, "<i4").astype(np.int64) for request in requests]
    targets = np.concatenate([np.frombuffer(request.targets, "<i4").astype(np.int64) for request in requests])
    lengths = [len(sequence) for sequence in tokens]
    positions = np.concatenate([np.arange(length) for length in lengths])

    def put(array: np.ndarray[tuple[int], np.dtype[np.int64]]) -> torch.Tensor:
        return torch.from_numpy(array).to(model.device)

    asked = np.flatnonzero(targets >= 0)
    values = np.zeros(len(targets), dtype=np.float32)
    with forward_context(ForwardContext(PackedAttention(tuple(lengths)), adapter)):
        hidden = model.hidden_states(put(np.concatenate(tokens)), put(positions))
        if len(asked):
            rows = hidden[put(asked)]
            allowed = AllowedTokens.read([(len(t), r.allowed, r.masks) for t, r in zip(tokens, requests, strict=True)])
            masks = None if allowed is None else allowed[torch.from_numpy(asked)]
            if head is None:
                found = token_logprobs(model, rows, put(targets[asked]), allowed=masks)
            else:
                found = scores(model, rows, head)
            values[asked] = found.float().cpu().numpy()
        last = hidden[put(np.cumsum(lengths) - 1)].float().cpu().numpy()
    parts = np.split(values, np.cumsum(lengths)[:-1])
    answers = [state if request.embed else part for request, state, part in zip(requests, last, parts, strict=True)]
    return [answer.astype("<f4").tobytes() for answer in answers]


Result = TypeVar("Result")
Launched = Pending | Failure | None
"""The result of launching a step: in flight, failed, or None if this rank has no part in it."""


class Worker:
    """Serves one rank until the driver sends `Shutdown`."""

    def __init__(self, channel: RankChannel, topology: Topology) -> None:
        self._channel = channel
        progress.report_to(channel.progressed)
        self._topology = topology
        backend = "gloo" if topology.device.type == "cpu" else "nccl"
        self._groups = Groups(topology.rank, topology.world_size, backend)
        self._models = ModelTable(topology.device, topology.deterministic, self._announce)
        self._domain: Domain = self._groups.domain(1)
        self._leader: Leader | None = Leader(channel)
        self._running = True
        # Generation steps in flight, whose tokens have not been read yet; oldest first.
        self._under_way: deque[tuple[GenerateWork, Step | None, Launched]] = deque()

    def serve(self) -> None:
        """Execute instructions until `Shutdown`."""
        while self._running:
            if self._leader is not None:
                step = self._leader.next_step(wait=not self._under_way)
                instruction = step.instruction if step is not None else Settle()
                if self._domain.size > 1:
                    self._domain.announce(encode_instruction(instruction))
                self._execute(instruction, step)
            else:
                self._execute(decode_instruction(self._domain.listen()), None)

    def _execute(self, instruction: Instruction, step: Step | None) -> None:
        name = instruction.method if isinstance(instruction, GlobalWork) else type(instruction).__name__
        self._channel.phase = name
        if isinstance(instruction, GenerateWork):
            self._generate(instruction, step)
        elif isinstance(instruction, Settle):
            self._settle()
        else:
            while self._under_way:
                self._settle()
            if isinstance(instruction, GlobalWork):
                self._execute_global(instruction.message(), step)
            else:
                self._finish(instruction, step, self._guarded(instruction))
        self._channel.step += 1
        self._channel.phase = IDLE

    def _generate(self, instruction: GenerateWork, step: Step | None) -> None:
        """Launch a step, then settle the oldest steps while more than `runner.depth` are in flight.

        All ranks of a domain follow the same instructions, so they settle the same step at the same time.
        """
        live = self._models.get(instruction.model)
        plan = instruction.plans.get(self._topology.rank // self._models.get(instruction.model).spawn.tp)
        runner = live.runner
        assert runner is not None, "no model without pages has a scheduler"
        launched = None if plan is None else self._tried(lambda: runner.launch(plan))
        self._under_way.append((instruction, step, launched))
        while len(self._under_way) > runner.depth:
            self._settle()

    def _settle(self) -> None:
        instruction, step, launched = self._under_way.popleft()
        runner = self._models.get(instruction.model).runner
        assert runner is not None
        result = self._tried(lambda: runner.collect(launched)) if isinstance(launched, Pending) else launched
        own = RankResult(failure=result) if isinstance(result, Failure) else RankResult(generated=result)
        self._finish(instruction, step, own)

    def _tried(self, work: Callable[[], Result]) -> Result | Failure:
        """Run `work` and return its result. An exception fails a request, not the rank, so it is returned as data."""
        try:
            return work()
        except Exception as error:
            return failure_of(error, self._topology.rank)

    def _finish(self, instruction: TrainWork | ScoreWork | GenerateWork, step: Step | None, own: RankResult) -> None:
        """Gather the results of the domain's ranks; the leader answers the driver."""
        results = [own]
        if self._domain.size > 1:
            results = [decode_result(o) for o in self._domain.exchange(encode_result(own))]
        if step is None or self._leader is None:
            return
        tp = self._models.get(instruction.model).spawn.tp
        first = self._domain.first
        parts = {r: results[r * tp - first : (r + 1) * tp - first] for r in _replicas(instruction)}
        self._leader.answer(step, parts)

    def _guarded(self, instruction: TrainWork | ScoreWork) -> RankResult:
        """Run this rank's part of an instruction. A failed sample fails its optimizer step."""
        own = self._tried(lambda: self._run(instruction))
        if not isinstance(own, Failure):
            return own
        if isinstance(instruction, TrainWork):
            live = self._models.get(instruction.model)
            live.poison = live.poison or own
        return RankResult(failure=own)

    def _run(self, instruction: TrainWork | ScoreWork) -> RankResult:
        live = self._models.get(instruction.model)
        replica = self._topology.rank // self._models.get(instruction.model).spawn.tp
        if isinstance(instruction, ScoreWork):
            requests = instruction.requests.get(replica)
            return RankResult(
                scores=None if requests is None else score(live.model, live.adapter, requests, live.score)
            )
        batch = instruction.batches.get(replica)
        if batch is None:
            return RankResult()
        assert live.trainer is not None
        done = live.trainer.accumulate(batch)
        # Samples and seconds of a group that was cut into parts are reported with its last part.
        for left, tokens in zip(reversed(range(len(done.tokens))), done.tokens, strict=True):
            counts = {"tokens": tokens, "samples": 0 if left else done.samples, "seconds": 0 if left else done.seconds}
            self._channel.event("micro_batch", {"model": live.name, "replica": replica, **counts})
        return RankResult(trained=done)

    def _execute_global(self, message: Message, step: Step | None) -> None:
        if isinstance(message, Shutdown):
            self._running = False
            self._reply(step, Nothing())
            return
        if isinstance(message, Regroup):
            self._regroup(message, step)
            return
        if isinstance(message, OptimStep):
            self._agree_on_poison(message, step)
            return
        answer, failure = self._attempt(message)
        failures = self._agree(failure)
        if failures:
            self._undo(message)
            self._fail(step, failures[0])
            return
        self._registered(message)
        self._reply(step, answer)

    def _attempt(self, message: Message) -> tuple[Message, Failure | None]:
        answer = self._tried(lambda: self._run_global(message))
        return (Nothing(), answer) if isinstance(answer, Failure) else (answer, None)

    def _run_global(self, message: Message) -> Message:
        if isinstance(message, Spawn):
            tp, replicas = self._groups.parallel(message.tp)
            return self._announced(self._models.spawn(message, tp, replicas))
        if isinstance(message, Clone):
            return self._announced(self._models.clone(message))
        if isinstance(message, MakePool):
            return self._announced(self._models.make_pool(message))
        if isinstance(message, Save):
            if self._topology.rank < self._models.get(message.model).spawn.tp:
                self._models.save(message, write=self._topology.rank == 0)
        elif isinstance(message, Load):
            if self._leader is not None:
                self._leader.order.forget_prefixes(message.model)
            self._models.load(message)
        elif isinstance(message, SetStep):
            trainer = self._models.get(message.model).trainer
            assert trainer is not None
            trainer.step = message.step
        elif isinstance(message, Inspect):
            return Inspected(values=self._inspect(message.model))
        elif isinstance(message, AbandonStep):
            self._abandon(self._models.get(message.model))
        elif isinstance(message, Dealloc):
            self._models.dealloc(message.model)
        else:
            raise InternalError(f"no way to execute a {type(message).__name__}")
        return Nothing()

    def _inspect(self, model: str) -> dict[str, float]:
        """Counters of this rank's part of a model, and this rank's memory."""
        values = self._models.get(model).statistics()
        queue = self._leader.order.model(model) if self._leader is not None else None
        for replica in queue.replicas.values() if queue is not None else ():
            if replica.scheduler is not None:
                for name, count in replica.scheduler.statistics.items():
                    values[name] = values.get(name, 0.0) + count
        return values

    def _announce(self, what: str, fields: dict[str, Any]) -> None:
        self._channel.phase = what
        self._channel.event(what, fields)

    def _announced(self, live: SpawnedModel) -> Message:
        self._channel.event("spawn", {"model": live.name, **live.held()})
        return Nothing()

    def _agree(self, failure: Failure | None) -> list[Failure]:
        """The failures on all ranks, lowest rank first."""
        payloads = self._groups.agree(msgspec.msgpack.encode(failure) if failure else b"")
        return [msgspec.msgpack.decode(p, type=Failure) for p in payloads if p]

    def _undo(self, message: Message) -> None:
        """Remove the model or pool from this rank, because some rank failed to create it."""
        if isinstance(message, Spawn | Clone):
            self._models.dealloc(message.name)
        elif isinstance(message, MakePool):
            self._models.drop_pool(message.model)

    def _registered(self, message: Message) -> None:
        """Create the queue of a new model or the scheduler of a new pool; fail the requests of a deallocated model."""
        if isinstance(message, Spawn | Clone):
            if self._leader is not None:
                self._leader.order.add_model(self._queue(self._models.get(message.name)))
        elif isinstance(message, MakePool):
            queue = self._leader.order.model(message.model) if self._leader is not None else None
            for replica in queue.replicas.values() if queue is not None else ():
                replica.scheduler = self._scheduler(self._models.get(message.model))
        elif isinstance(message, Dealloc) and self._leader is not None:
            self._leader.forget(message.model)

    def _queue(self, live: SpawnedModel) -> ModelQueue:
        tp, first, stop = live.spawn.tp, self._domain.first, self._domain.first + self._domain.size
        replicas = {replica: ReplicaQueue(self._scheduler(live)) for replica in range(first // tp, stop // tp)}
        return ModelQueue(live.name, live.spawn.max_batch_tokens, replicas)

    def _scheduler(self, live: SpawnedModel) -> Scheduler | None:
        name = live.name
        if live.runner is None:
            return None
        return Scheduler(
            kv_tokens=live.spawn.kv_tokens,
            max_positions=live.model.max_positions,
            vocab_size=live.model.vocab_size,
            # Look the model up by name: the closure must not keep a deallocated model and its memory alive.
            version=lambda: self._models.get(name).version(),
            prefill_tokens=live.spawn.max_batch_tokens,
            max_splits=live.runner.max_splits,
        )

    def _regroup(self, message: Regroup, step: Step | None) -> None:
        """Form new domains. The old leaders answer; the new ones continue at the same place in the driver's order."""
        domain = self._groups.domain(message.size)
        seqs = self._groups.agree(b"%d" % (self._leader.order.next_seq if self._leader is not None else -1))
        self._reply(step, Nothing())
        self._domain = domain
        if not domain.is_leader:
            self._leader = None
            return
        assert self._leader is not None, "domains only grow, so a leader was one before"
        self._leader.order.continue_from(max(int(s) for s in seqs))
        for live in self._models.live():
            self._leader.order.remove_model(live.name)
            self._leader.order.add_model(self._queue(live))

    def _agree_on_poison(self, message: OptimStep, step: Step | None) -> None:
        """Take an optimizer step, or fail it on all ranks if a sample failed on any rank."""
        live = self._models.get(message.model)
        failures = self._agree(live.poison)
        if failures:
            self._abandon(live)
            first = error_of(failures[0])
            kind = LossFailed if isinstance(first, LossFailed) else StepFailed
            reason = kind(f"a sample of this step failed: {first.message}", hint=first.hint, **first.details)
            self._fail(step, failure_of(reason, self._topology.rank))
            return
        metrics = self._tried(lambda: self._take_step(live, message))
        if isinstance(metrics, Failure):
            self._fail(step, metrics)
        else:
            self._reply(step, metrics)

    def _take_step(self, live: SpawnedModel, message: OptimStep) -> StepMetrics:
        assert live.trainer is not None
        values = live.trainer.optim_step(message)
        if live.runner is not None:
            live.runner.weights_changed()
        return StepMetrics(values=values)

    def _abandon(self, live: SpawnedModel) -> None:
        live.poison = None
        if live.trainer is not None:
            live.trainer.abandon()

    def _reply(self, step: Step | None, answer: Message) -> None:
        if step is not None:
            self._channel.reply(step.calls[0][0], answer)

    def _fail(self, step: Step | None, failure: Failure) -> None:
        if step is not None:
            self._channel.fail(step.calls[0][0], error_of(failure))


def _replicas(instruction: TrainWork | ScoreWork | GenerateWork) -> list[int]:
    """The replicas of the domain that take part in an instruction."""
    if isinstance(instruction, TrainWork):
        return list(instruction.batches)
    if isinstance(instruction, ScoreWork):
        return list(instruction.requests)
    return list(instruction.plans)
