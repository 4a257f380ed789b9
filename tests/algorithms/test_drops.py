"""Whatever cannot be trained, in any pattern and any class: each row is trained, or dropped or refused and counted."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from fake_policy import FakeModel, length_grader
from harmony_core.algorithms import DPO, GRPO, GSPO, PPO, SFT, RewardModelling
from harmony_core.algorithms.rollout import MOST_FAILURES
from harmony_core.errors import (
    DataError,
    IgnoreGradeException,
    NothingToTrain,
    PromptTooLong,
    SampleTooLong,
    TokenizationError,
    TooManyFailures,
)
from harmony_core.text.threads import StringThread, TokenizedThread

KINDS = ("good", "long", "refused", "ungraded", "ignored")


def check(thread: StringThread) -> None:
    """Raise what a thread's question says."""
    question = thread.get_turns()[0].content
    if "long" in question:
        raise SampleTooLong("too long", tokens=99, limit=10)
    if "refused" in question:
        raise TokenizationError("the template refuses it")
    if "ungraded" in question or "ignored" in question:
        raise NothingToTrain("no weighted token")


class Model(FakeModel):
    """Refuses threads by what their question says; `trained` has the question of each."""

    async def clone_inf(self) -> FakeModel:
        return Model()

    async def generate_tokens(self, thread: StringThread) -> TokenizedThread:
        question = thread.get_turns()[0].content
        if "long" in question:
            raise PromptTooLong("too long", tokens=99, limit=10)
        if "refused" in question:
            raise TokenizationError("the template refuses it")
        return await super().generate_tokens(thread)

    async def logprobs(self, thread: StringThread) -> float:
        await self._later()
        check(thread)
        return -1.0

    async def _take(self, thread: StringThread, *arguments: Any) -> None:
        check(thread)
        self.trained.append((thread.get_turns()[0].content, arguments))
        self._pending += 1
        await self._later()

    async def train_language_modelling(self, thread: StringThread) -> None:
        await self._take(thread)

    async def train_dpo(self, pos: StringThread, neg: StringThread, *arguments: float) -> None:
        check(neg)
        await self._take(pos, *arguments)

    async def train_ranking(self, pos: StringThread, neg: StringThread) -> None:
        check(neg)
        await self._take(pos)


def judge(thread: StringThread) -> None:
    question = thread.get_turns()[0].content
    if "ungraded" in question:
        raise KeyError("no answer")
    if "ignored" in question:
        raise IgnoreGradeException


def answered(rows: list[str]) -> list[StringThread]:
    return [StringThread([("user", row), ("assistant", "a")]) for row in rows]


def pairs(rows: list[str]) -> list[tuple[StringThread, StringThread]]:
    """The second thread of each pair is the one that fails, in every other pair."""
    good = answered([f"good-of-{row}" if i % 2 else row for i, row in enumerate(rows)])
    return [(a, b) for a, b in zip(good, answered(rows), strict=True)]


def rollouts(cls: type[Any]) -> Callable[..., Any]:
    def make(rows: list[str], model: Model, size: int, **options: Any) -> Any:
        many = {"value_only_fraction": 0} if cls is PPO else {"completions_per_sample": 2}
        value = (FakeModel(scalar=True).as_model(),) if cls is PPO else ()
        batch = size if cls is PPO else 2 * size
        prompts = [StringThread([("user", row)]) for row in rows]
        return cls(prompts, model.as_model(), *value, length_grader(judge), samples_per_batch=batch, **many, **options)

    return make


CLASSES: dict[str, tuple[int, Callable[..., Any]]] = {
    "SFT": (1, lambda rows, model, size, **o: SFT(answered(rows), model.as_model(), samples_per_batch=size, **o)),
    "DPO": (1, lambda rows, model, size, **o: DPO(pairs(rows), model.as_model(), samples_per_batch=size, **o)),
    "RewardModelling": (
        1,
        lambda rows, model, size, **o: RewardModelling(pairs(rows), model.as_model(), samples_per_batch=size, **o),
    ),
    "GRPO": (2, rollouts(GRPO)),
    "GSPO": (2, rollouts(GSPO)),
    "PPO": (1, rollouts(PPO)),
}
"""How often a row is trained by each class, and its maker."""


def question_of(trained: str) -> str:
    return trained.removeprefix("good-of-")


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("seed", range(12))
def test_every_row_is_trained_or_counted(name: str, seed: int) -> None:
    rng = random.Random(seed)
    weights = [rng.choice((0.1, 1, 1)), rng.choice((0, 0.5, 3)), *(rng.choice((0, 0.1, 1)) for _ in KINDS[2:])]
    rows = [f"{rng.choices(KINDS, weights)[0]}-{i}" for i in range(rng.choice((1, 7, 40, 300)))]
    epochs, rate = rng.choice((0.7, 1, 2)), rng.choice((0, 0.3, 0.5, 1))
    times, make = CLASSES[name]
    model = Model(scalar=name == "RewardModelling")
    training = make(rows, model, rng.choice((1, 3, 16, 64)), epochs=epochs, data_seed=seed, max_failure_rate=rate)
    ended: DataError | None = None
    try:
        asyncio.run(training.run())
    except DataError as error:
        ended = error
    feed = training.loader
    taken = Counter(rows[i] for i in feed.dataset.access_indices[: feed.dataset.idx])
    trained = Counter(question_of(question) for question, _ in model.trained)
    kinds = {kind: sum(n for row, n in taken.items() if row.startswith(kind)) for kind in KINDS}
    if isinstance(ended, TooManyFailures) and "rows" not in ended.details:
        assert "grades all failed" in ended.message and kinds["ungraded"] * times >= MOST_FAILURES
        return
    assert feed.dropped.total() == sum(kinds.values()) - kinds["good"]
    assert feed.dropped["sample_too_long"] + feed.dropped["prompt_too_long"] == kinds["long"]
    assert feed.dropped["tokenization_error"] == kinds["refused"]
    good = Counter({row: n * times for row, n in taken.items() if row.startswith("good")})
    # What a grader leaves unscored is no fault of the data.
    tolerated = ("good", "long", *(("ungraded", "ignored") if name in ("GRPO", "GSPO", "PPO") else ()))
    failed = sum(not row.startswith(tolerated) for row in rows)
    if ended is None:
        assert trained == good and good and taken.total() == feed.total
        assert all(size for size, _ in model.steps) and failed <= rate * len(rows) + len(rows) * (epochs < 1)
    elif isinstance(ended, TooManyFailures):
        assert ended.details["failures"] > rate * min(200, len(rows), feed.total)
        assert failed >= ended.details["failures"]
    else:
        assert not good, "only a pass that yields nothing ends a run otherwise"
    # A batch that ended the run may not have been trained to its end, and never was a step.
    assert not trained - good


def test_completions_fit_the_value_model_too() -> None:
    """Which may train shorter sequences than the policy: none of a prompt's completions is lost for that."""
    policy, value = FakeModel(max_batch_size=8), FakeModel(scalar=True, max_batch_size=6)
    prompts = [StringThread([("user", f"good-{i}")]) for i in range(12)]
    models = policy.as_model(), value.as_model()
    training = PPO(prompts, *models, length_grader(judge), samples_per_batch=4, epochs=1, value_only_fraction=0)
    asyncio.run(training.run())
    assert len(policy.trained) == 12 and not training.loader.dropped
    assert max(len(advantages) for _, (_, advantages, *_) in policy.trained) == 3


@pytest.mark.parametrize("name", CLASSES)
def test_too_long_alone_never_ends_a_run(name: str) -> None:
    for seed in range(4):
        rng = random.Random(seed)
        rows = [f"{'long' if rng.random() < 0.9 else 'good'}-{i}" for i in range(60)] + ["good-60"]
        model = Model(scalar=name == "RewardModelling")
        training = CLASSES[name][1](rows, model, rng.choice((1, 4)), epochs=2, data_seed=seed, max_failure_rate=0)
        asyncio.run(training.run())
        assert set(map(question_of, (question for question, _ in model.trained))) == {r for r in rows if "good" in r}
