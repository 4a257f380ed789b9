"""The leader of a domain turns requests into instructions for the worker, and answers the driver. No tensors.

Global requests run in the driver's order, each after all micro-batches that were sent to its model before it. Between
them, models with pending work take turns, one step each; within a model, training, scoring and generation take turns.
"""

from __future__ import annotations

import queue
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from harmony_core.engine.inference.scheduler import Scheduler
from harmony_core.engine.inference.step import Finished, StepPlan, StepResult
from harmony_core.errors import ConflictError, HarmonyError, InternalError
from harmony_core.rpc.methods import METHODS
from harmony_core.rpc.protocol import (
    Cancel,
    Clone,
    Generate,
    Message,
    MicroBatch,
    MicroBatchDone,
    Regroup,
    Score,
    Scored,
    Shutdown,
    Spawn,
)
from harmony_core.rpc.wire import Failure, error_of, unpack_ints

if TYPE_CHECKING:
    from harmony_core.rpc.rank_channel import Incoming, RankChannel


class GlobalWork(msgspec.Struct, tag=True):
    """A request that all ranks of the run execute, in the driver's order."""

    method: str
    body: bytes

    @classmethod
    def of(cls, message: Message) -> GlobalWork:
        """Wrap a request."""
        return cls(type(message).__name__, msgspec.msgpack.encode(message))

    def message(self) -> Message:
        """The request."""
        decoded = msgspec.msgpack.decode(self.body, type=METHODS[self.method][0])
        assert isinstance(decoded, Message)
        return decoded


class TrainWork(msgspec.Struct, tag=True):
    """At most one micro-batch for each replica of the domain."""

    model: str
    batches: dict[int, MicroBatch]


class ScoreWork(msgspec.Struct, tag=True):
    """Sequences to score, by replica of the domain."""

    model: str
    requests: dict[int, list[Score]]


class GenerateWork(msgspec.Struct, tag=True):
    """At most one generation step for each replica of the domain."""

    model: str
    plans: dict[int, StepPlan]


class Settle(msgspec.Struct, tag=True):
    """Wait for the oldest generation step in flight, and read its tokens."""


Instruction = GlobalWork | TrainWork | ScoreWork | GenerateWork | Settle


class RankResult(msgspec.Struct):
    """One rank's result of an instruction: an answer or a failure; empty if the rank took no part in it."""

    failure: Failure | None = None
    trained: MicroBatchDone | None = None
    scores: list[bytes] | None = None
    generated: StepResult | None = None


encode_instruction = msgspec.msgpack.Encoder().encode
decode_instruction = msgspec.msgpack.Decoder(Instruction).decode
encode_result = msgspec.msgpack.Encoder().encode
decode_result = msgspec.msgpack.Decoder(RankResult).decode


GLOBAL_WITHOUT_QUEUE = (Spawn, Clone, Regroup)
"""Global requests that do not wait for the micro-batches of a model."""


@dataclass(frozen=True)
class Barrier:
    """A global request's place among a model's micro-batches."""

    seq: int


@dataclass
class ReplicaQueue:
    """One replica's pending work. Numbers are the driver's call ids."""

    scheduler: Scheduler | None
    training: deque[tuple[int, MicroBatch] | Barrier] = field(default_factory=deque)
    scoring: deque[tuple[int, Score]] = field(default_factory=deque)

    def micro_batch(self) -> tuple[int, MicroBatch] | None:
        """The next micro-batch, or None if there is none or a global request precedes it."""
        head = self.training[0] if self.training else None
        return None if head is None or isinstance(head, Barrier) else head


@dataclass
class ModelQueue:
    """One model's pending work in this domain, by replica."""

    name: str
    score_tokens: int
    replicas: dict[int, ReplicaQueue]
    turn: int = 0

    def kinds(self) -> list[str]:
        """The kinds of work that can run now."""
        queues = self.replicas.values()
        found = []
        if any(q.micro_batch() is not None for q in queues):
            found.append("train")
        if any(q.scoring for q in queues):
            found.append("score")
        if any(q.scheduler is not None and q.scheduler.has_work for q in queues):
            found.append("generate")
        return found


@dataclass
class Step:
    """An instruction and the call ids that it answers, by replica, in the order of the instruction's parts."""

    instruction: Instruction
    calls: dict[int, list[int]]


class Order:
    """The pending work of a domain."""

    def __init__(self) -> None:
        self._models: dict[str, ModelQueue] = {}
        self._globals: dict[int, tuple[int, Message]] = {}
        self._next_seq = 0
        self._turn: deque[str] = deque()

    def continue_from(self, seq: int) -> None:
        """Continue at a sequence number. A new leader calls this."""
        self._next_seq = seq

    @property
    def next_seq(self) -> int:
        """Sequence number of the next global request."""
        return self._next_seq

    def add_model(self, queue: ModelQueue) -> None:
        """Start to serve a model in this domain."""
        self._models[queue.name] = queue
        self._turn.append(queue.name)

    def remove_model(self, name: str) -> ModelQueue | None:
        """Remove a model. Returns its pending work, or None if the model does not live here."""
        if name in self._models:
            self._turn.remove(name)
        return self._models.pop(name, None)

    def model(self, name: str) -> ModelQueue | None:
        """A model's queues, or None if the model does not live here."""
        return self._models.get(name)

    def forget_prefixes(self, name: str) -> None:
        """Clear the prefix cache of a model. Call this when its weights change, since its version may stay the same."""
        queue = self._models.get(name)
        for replica in queue.replicas.values() if queue is not None else ():
            if replica.scheduler is not None:
                replica.scheduler.flush_prefixes()

    def replica(self, model: str, replica: int) -> ReplicaQueue | None:
        """A replica's queue, or None if the replica does not live here."""
        queue = self._models.get(model)
        return queue.replicas.get(replica) if queue else None

    def add_global(self, call: int, seq: int, message: Message) -> None:
        """Queue a global request under its sequence number."""
        self._globals[seq] = call, message
        queue = None if isinstance(message, GLOBAL_WITHOUT_QUEUE) else self._models.get(getattr(message, "model", ""))
        for replica in queue.replicas.values() if queue else ():
            replica.training.append(Barrier(seq))

    def next(self) -> Step | None:
        """The next step, or None if no work can run now."""
        due = self._due_global()
        if due is not None:
            return due
        for _ in range(len(self._turn)):
            queue = self._models[self._turn[0]]
            self._turn.rotate(-1)
            kinds = queue.kinds()
            for _ in kinds:
                queue.turn += 1
                step = self._step(queue, kinds[queue.turn % len(kinds)])
                if step is not None:
                    return step
        return None

    def _due_global(self) -> Step | None:
        pending = self._globals.get(self._next_seq)
        if pending is None:
            return None
        call, message = pending
        queue = None if isinstance(message, GLOBAL_WITHOUT_QUEUE) else self._models.get(getattr(message, "model", ""))
        barrier = Barrier(self._next_seq)
        replicas = list(queue.replicas.values()) if queue else []
        if any(barrier in r.training and r.training[0] != barrier for r in replicas):
            return None
        for replica in replicas:
            if barrier in replica.training:
                replica.training.popleft()
        del self._globals[self._next_seq]
        self._next_seq += 1
        return Step(GlobalWork.of(message), {0: [call]})

    def _step(self, queue: ModelQueue, kind: str) -> Step | None:
        if kind == "train":
            return self._train(queue)
        if kind == "score":
            return self._score(queue)
        plans = {r: q.scheduler.plan() for r, q in queue.replicas.items() if q.scheduler and q.scheduler.has_work}
        # There may be no plan: all running requests may wait for the tokens of a step in flight.
        found = {replica: plan for replica, plan in plans.items() if plan is not None}
        return Step(GenerateWork(queue.name, found), {}) if found else None

    def _train(self, queue: ModelQueue) -> Step:
        calls: dict[int, list[int]] = {}
        batches: dict[int, MicroBatch] = {}
        for number, replica in queue.replicas.items():
            head = replica.micro_batch()
            if head is not None:
                replica.training.popleft()
                calls[number], batches[number] = [head[0]], head[1]
        return Step(TrainWork(queue.name, batches), calls)

    def _score(self, queue: ModelQueue) -> Step:
        calls: dict[int, list[int]] = {}
        requests: dict[int, list[Score]] = {}
        for number, replica in queue.replicas.items():
            room = queue.score_tokens
            while replica.scoring:
                call, score = replica.scoring[0]
                tokens = len(score.tokens) // 4
                if number in calls and tokens > room:
                    break
                room -= tokens
                replica.scoring.popleft()
                calls.setdefault(number, []).append(call)
                requests.setdefault(number, []).append(score)
        return Step(ScoreWork(queue.name, requests), calls)


class Leader:
    """Chooses the steps of a domain. Only the engine thread uses it; other threads share only the channel's inbox."""

    def __init__(self, channel: RankChannel) -> None:
        self.order = Order()
        self._channel = channel
        self._generating: dict[int, ReplicaQueue] = {}
        self._shutdown: Incoming | None = None

    def next_step(self, wait: bool) -> Step | None:
        """The next step. Without work, wait for requests if `wait`, else return None. A shutdown precedes all work."""
        self._take_in(block=False)
        while self._shutdown is None:
            step = self.order.next()
            if step is not None or not wait:
                return step
            self._take_in(block=True)
        return Step(GlobalWork.of(self._shutdown.message), {0: [self._shutdown.id]})

    def _take_in(self, block: bool) -> None:
        inbox: queue.SimpleQueue[Incoming] = self._channel.inbox
        if block:
            self._receive(inbox.get())
        while not inbox.empty():
            self._receive(inbox.get())

    def _receive(self, incoming: Incoming) -> None:
        message = incoming.message
        try:
            if isinstance(message, Cancel):
                self._cancel(message.call)
            elif isinstance(message, Generate | Score | MicroBatch):
                self._enqueue(incoming.id, message)
            elif isinstance(message, Shutdown):
                self._shutdown = incoming
            elif incoming.seq is not None:
                self.order.add_global(incoming.id, incoming.seq, message)
            else:
                raise InternalError(f"a {type(message).__name__} without its place in the sequence")
        except HarmonyError as error:
            self._channel.fail(incoming.id, error)

    def _enqueue(self, call: int, message: Generate | Score | MicroBatch) -> None:
        replica = self.order.replica(message.model, message.replica)
        if replica is None:
            raise ConflictError(f"no model named {message.model!r} is live here")
        if isinstance(message, MicroBatch):
            replica.training.append((call, message))
        elif isinstance(message, Score):
            replica.scoring.append((call, message))
        else:
            assert replica.scheduler is not None
            replica.scheduler.submit(call, unpack_ints(message.tokens), message.sampling)
            self._generating[call] = replica

    def _cancel(self, call: int) -> None:
        replica = self._generating.pop(call, None)
        if replica is not None:
            assert replica.scheduler is not None
            replica.scheduler.cancel(call)
            self._channel.fail(call, ConflictError("the request was cancelled"))

    def forget(self, model: str) -> None:
        """Remove a deallocated model and fail its pending requests."""
        removed = self.order.remove_model(model)
        if removed is not None:
            self._fail_pending(removed)

    def _fail_pending(self, removed: ModelQueue) -> None:
        gone = ConflictError(f"model {removed.name!r} was deallocated")
        for replica in removed.replicas.values():
            calls = [item[0] for item in replica.training if isinstance(item, tuple)]
            calls += [call for call, _ in replica.scoring]
            calls += [call for call, owner in self._generating.items() if owner is replica]
            for call in calls:
                self._generating.pop(call, None)
                self._channel.fail(call, gone)

    def answer(self, step: Step, results: dict[int, list[RankResult]]) -> None:
        """Send the result of a step to the driver. `results`: the results of each replica's ranks, in rank order."""
        instruction = step.instruction
        for number, ranks in results.items():
            failure = next((o.failure for o in ranks if o.failure is not None), None)
            error = error_of(failure) if failure is not None else None
            if isinstance(instruction, GenerateWork):
                self._generated(instruction, number, ranks[0], error)
            elif error is not None:
                for call in step.calls[number]:
                    self._channel.fail(call, error)
            elif isinstance(instruction, TrainWork):
                assert ranks[0].trained is not None
                self._channel.reply(step.calls[number][0], ranks[0].trained)
            elif isinstance(instruction, ScoreWork):
                assert ranks[0].scores is not None
                for call, logprobs in zip(step.calls[number], ranks[0].scores, strict=True):
                    self._channel.reply(call, Scored(logprobs=logprobs))

    def _generated(self, work: GenerateWork, number: int, rank_result: RankResult, error: HarmonyError | None) -> None:
        replica = self.order.replica(work.model, number)
        assert replica is not None and replica.scheduler is not None
        plan = work.plans[number]
        finished: list[Finished]
        if error is not None:
            finished = replica.scheduler.abort(plan, error)
        else:
            assert rank_result.generated is not None
            finished = replica.scheduler.commit(plan, rank_result.generated)
        for request in finished:
            if self._generating.pop(request.id, None) is None:
                continue
            if request.error is not None:
                self._channel.fail(request.id, request.error)
            else:
                assert request.generated is not None
                self._channel.reply(request.id, request.generated)
