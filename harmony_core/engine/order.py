"""What a leader does next. Requests come in; one instruction at a time goes out. No tensors.

Global requests run in the driver's sequence, each once every micro-batch that was sent to its model before it has run.
Between them, models with pending work take turns, one step each; within a model training, scoring and generation do.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec

from harmony_core.engine.inference.scheduler import Scheduler
from harmony_core.engine.inference.step import StepPlan, StepResult
from harmony_core.rpc.protocol import METHODS, Clone, Message, MicroBatch, MicroBatchDone, Reblock, Score, Spawn
from harmony_core.rpc.wire import Failure


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
    """One micro-batch for each replica of the block that has one."""

    model: str
    batches: dict[int, MicroBatch]


class ScoreWork(msgspec.Struct, tag=True):
    """Sequences to score, for each replica of the block that has some."""

    model: str
    requests: dict[int, list[Score]]


class GenerateWork(msgspec.Struct, tag=True):
    """One generation step for each replica of the block that has one."""

    model: str
    plans: dict[int, StepPlan]


class Settle(msgspec.Struct, tag=True):
    """Wait for the oldest generation step that is under way, and take its tokens."""


Instruction = GlobalWork | TrainWork | ScoreWork | GenerateWork | Settle


class Outcome(msgspec.Struct):
    """What one rank made of an instruction: an answer, or a failure, or neither when it had no part in it."""

    failure: Failure | None = None
    trained: MicroBatchDone | None = None
    scores: list[bytes] | None = None
    generated: StepResult | None = None


encode_instruction = msgspec.msgpack.Encoder().encode
decode_instruction = msgspec.msgpack.Decoder(Instruction).decode
encode_outcome = msgspec.msgpack.Encoder().encode
decode_outcome = msgspec.msgpack.Decoder(Outcome).decode


GLOBAL_WITHOUT_QUEUE = (Spawn, Clone, Reblock)
"""Global requests that wait for no model's micro-batches."""


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
        """The next micro-batch, unless a global request stands before it."""
        head = self.training[0] if self.training else None
        return None if head is None or isinstance(head, Barrier) else head


@dataclass
class ModelQueue:
    """One model's pending work in this block, by replica."""

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
    """An instruction, and the calls that it answers: by replica, in the order of its parts."""

    instruction: Instruction
    calls: dict[int, list[int]]


class Order:
    """The pending work of a block."""

    def __init__(self) -> None:
        self._models: dict[str, ModelQueue] = {}
        self._globals: dict[int, tuple[int, Message]] = {}
        self._next_seq = 0
        self._turn: deque[str] = deque()

    def continue_from(self, seq: int) -> None:
        """Begin at a sequence number, as a new leader does."""
        self._next_seq = seq

    @property
    def next_seq(self) -> int:
        """The global request that is due."""
        return self._next_seq

    def add_model(self, queue: ModelQueue) -> None:
        """A model that this block now serves."""
        self._models[queue.name] = queue
        self._turn.append(queue.name)

    def remove_model(self, name: str) -> ModelQueue | None:
        """Forget a model; what it still had pending."""
        if name in self._models:
            self._turn.remove(name)
        return self._models.pop(name, None)

    def model(self, name: str) -> ModelQueue | None:
        """A model's queues, or None when it does not live here."""
        return self._models.get(name)

    def forget_prefixes(self, name: str) -> None:
        """A model's weights change, and its version need not: no request is to read pages of the old ones."""
        queue = self._models.get(name)
        for replica in queue.replicas.values() if queue is not None else ():
            if replica.scheduler is not None:
                replica.scheduler.flush_prefixes()

    def replica(self, model: str, replica: int) -> ReplicaQueue | None:
        """A replica's queue, or None when it does not live here."""
        queue = self._models.get(model)
        return queue.replicas.get(replica) if queue else None

    def add_global(self, call: int, seq: int, message: Message) -> None:
        """A request of the driver's sequence."""
        self._globals[seq] = call, message
        queue = None if isinstance(message, GLOBAL_WITHOUT_QUEUE) else self._models.get(getattr(message, "model", ""))
        for replica in queue.replicas.values() if queue else ():
            replica.training.append(Barrier(seq))

    def next(self) -> Step | None:
        """The next step, or None when nothing can run."""
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
        # Everything that is running may wait for the tokens of a step under way.
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
