"""The deciding half of a leader: requests in, steps out, answers back. The host executes what it decides."""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING

from harmony_core.engine.inference.step import Finished
from harmony_core.engine.order import (
    GenerateWork,
    GlobalWork,
    ModelQueue,
    Order,
    Outcome,
    ReplicaQueue,
    ScoreWork,
    Step,
    TrainWork,
)
from harmony_core.errors import ConflictError, HarmonyError, InternalError
from harmony_core.rpc.protocol import Cancel, Generate, MicroBatch, Score, Scored, Shutdown, unpack_ints
from harmony_core.rpc.wire import error_of

if TYPE_CHECKING:
    from harmony_core.rpc.rank_channel import Incoming, RankChannel


class Leader:
    """Decides for a block. It belongs to the engine thread; only the channel's inbox is shared with another."""

    def __init__(self, channel: RankChannel) -> None:
        self.order = Order()
        self._channel = channel
        self._generating: dict[int, ReplicaQueue] = {}
        self._shutdown: Incoming | None = None

    def next_step(self, wait: bool) -> Step | None:
        """The next step. With nothing to do, wait for requests, or return None. A shutdown comes before all else."""
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
        """A model is gone: what it still had pending fails."""
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

    def answer(self, step: Step, outcomes: dict[int, list[Outcome]]) -> None:
        """Tell the driver what became of a step. `outcomes`: those of each replica's ranks, first rank first."""
        instruction = step.instruction
        for number, ranks in outcomes.items():
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

    def _generated(self, work: GenerateWork, number: int, outcome: Outcome, error: HarmonyError | None) -> None:
        replica = self.order.replica(work.model, number)
        assert replica is not None and replica.scheduler is not None
        plan = work.plans[number]
        finished: list[Finished]
        if error is not None:
            finished = replica.scheduler.abort(plan, error)
        else:
            assert outcome.generated is not None
            finished = replica.scheduler.commit(plan, outcome.generated)
        for request in finished:
            if self._generating.pop(request.id, None) is None:
                continue
            if request.error is not None:
                self._channel.fail(request.id, request.error)
            else:
                assert request.generated is not None
                self._channel.reply(request.id, request.generated)
