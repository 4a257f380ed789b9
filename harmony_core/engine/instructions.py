"""What the leader of a block announces and every rank of it then executes, and what comes back. Plain data."""

from __future__ import annotations

import msgspec

from harmony_core.engine.inference.step import StepPlan, StepResult
from harmony_core.rpc.protocol import METHODS, Message, MicroBatch, MicroBatchDone, Score
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
