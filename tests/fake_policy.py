"""Models for tests of training classes without an engine: they answer from a script and note what is asked of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any, cast

from harmony_core.client import TrainingModel
from harmony_core.errors import NothingToTrain, PromptTooLong
from harmony_core.graders import BaseGrader
from harmony_core.text.threads import StringThread, TokenizedThread, Turn
from harmony_core.text.turns import GenerationRecord, Text, TokenTurn


def prompts(count: int, bad: frozenset[int] = frozenset(), **metadata: Any) -> list[StringThread]:
    """`count` questions; the ones in `bad` say `long`, which a FakeModel cannot answer."""
    return [StringThread([("user", f"{'long' if i in bad else 'short'}-{i}")], dict(metadata)) for i in range(count)]


class FakeModel:
    """A policy and value model. Completions have 1 to 5 tokens, as far as `max_batch_size` leaves room behind a prompt
    of 3; answers come in a random order.

    `steps` holds, for each optimizer step, the samples trained and the learning rate; `trained` every sample's question
    and the arguments it was trained with.
    """

    def __init__(self, scalar: bool = False, max_batch_size: int = 10_000) -> None:
        self.scalar = scalar
        self.max_batch_size = max_batch_size
        self.generated: list[str] = []
        self.trained: list[tuple[str, tuple[Any, ...]]] = []
        self.steps: list[tuple[int, float]] = []
        self.scored: list[str] = []
        self.clones: list[FakeModel] = []
        self.freed = False
        self._version = 0
        self._pending = 0
        self._random = random.Random(0)

    def as_model(self) -> TrainingModel:
        """Itself, for the type checker."""
        return cast(TrainingModel, self)

    def is_scalar(self) -> bool:
        return self.scalar

    def get_builder_args(self) -> dict[str, Any]:
        return {"path": "model_registry://fake", "max_batch_size": self.max_batch_size}

    def max_seqlen(self, max_seqlen: int, setting: str) -> FakeModel:
        self.max_batch_size = max_seqlen
        return self

    @property
    def longest_completion(self) -> int:
        return 5

    def get_optim_step(self) -> int:
        return self._version

    def plan_clone(self) -> None:
        pass

    async def clone_inf(self) -> FakeModel:
        self.clones.append(FakeModel())
        return self.clones[-1]

    async def dealloc(self) -> None:
        self.freed = True

    async def _later(self) -> None:
        for _ in range(self._random.randrange(4)):
            await asyncio.sleep(0)

    async def tokenize(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    async def detokenize(self, tokens: Sequence[int]) -> str:
        return "x" * len(tokens)

    async def generate_tokens(self, thread: StringThread) -> TokenizedThread:
        question = thread.last_content()
        self.generated.append(question)
        number = len(self.generated)
        await self._later()
        if "long" in question:
            raise PromptTooLong(f"{question} is too long", tokens=99, limit=10)
        length = min(1 + number % 5, self.max_batch_size - 3)
        logprobs = tuple(-0.1 * (i + 1) for i in range(length))
        finish = "stop" if length < min(5, self.max_batch_size - 3) else "length"
        record = GenerationRecord(logprobs, logprobs, (self._version,) * length, finish, "fake")
        turns = [
            TokenTurn("user", (Text(question),), 0.0, 0, 3),
            TokenTurn("assistant", (Text("x" * length),), 1.0, 3, 3 + length, generation=record),
        ]
        return TokenizedThread([7] * (3 + length), turns, thread.metadata)

    async def detokenize_thread(self, thread: TokenizedThread) -> StringThread:
        await self._later()
        turns = [Turn(turn.role, turn.fragments, turn.weight) for turn in thread.token_turns]
        return StringThread.from_turns(turns, thread.metadata)

    async def logprobs_per_token(self, thread: TokenizedThread) -> list[float]:
        await self._later()
        self.scored.append(thread.get_fragments()[0][1][0]["text"])
        return [-0.5] * thread.len_last_turn()

    async def score(self, thread: TokenizedThread) -> list[float]:
        await self._later()
        return [0.25] * thread.len_last_turn()

    async def _train(self, thread: TokenizedThread, *arguments: Any) -> None:
        self.trained.append((thread.get_fragments()[0][1][0]["text"], arguments))
        self._pending += 1
        await self._later()

    train_grpo = train_gspo = train_ppo = train_mse_per_token = _train

    async def logprobs(self, thread: StringThread) -> float:
        await self._later()
        return -1.0

    async def train_dpo(self, pos: StringThread, neg: StringThread, *arguments: float) -> None:
        self.trained.append((pos.last_content(), (neg.last_content(), *arguments)))
        self._pending += 1

    async def train_language_modelling(self, thread: StringThread) -> None:
        self.trained.append((thread.last_content(), ()))
        self._pending += 1

    async def train_mse(self, thread: StringThread, target: float) -> None:
        self.trained.append((thread.last_content(), (target,)))
        self._pending += 1

    async def train_ranking(self, pos: StringThread, neg: StringThread) -> None:
        self.trained.append((pos.last_content(), (neg.last_content(),)))
        self._pending += 1

    async def optim_step(self, lr: float, wd: float, max_grad_norm: float, skip_nan: bool) -> dict[str, float]:
        if not self._pending:
            raise NothingToTrain("no sample was accepted")
        self.steps.append((self._pending, lr))
        self._pending = 0
        self._version += 1
        return {"loss": 1.0, "lr": lr}


def length_grader(judge: Callable[[StringThread], None] = lambda thread: None) -> BaseGrader[dict[str, Any]]:
    """Scores a completion by its length; `judge` may raise first."""

    def grade(thread: StringThread) -> float:
        judge(thread)
        return len(thread.last_content())

    return BaseGrader.from_function("length", grade)


def questions(trained: Sequence[tuple[str, tuple[Any, ...]]]) -> list[str]:
    """The questions of what was trained."""
    return [question for question, _ in trained]
