"""DPO, reward modelling, GRPO, GSPO and PPO, stopped after some step and resumed, end as if they had not been.

Which requests share a forward pass depends on when they arrive, and with it the last bits of log-probs; so of classes
that sample or score, equality to the bit is asked for in the deterministic mode, and elsewhere but for rounding.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engines import LiveEngine, pair, start_engine, stop_engine
from harmony_core.algorithms import DPO, GRPO, GSPO, PPO, RecipeCallback, RewardModelling
from harmony_core.checkpoint_files import CheckpointStore
from harmony_core.checkpoints import RunCheckpoints
from harmony_core.client import TrainingModel
from harmony_core.errors import UsageError
from harmony_core.graders import BaseGrader
from harmony_core.loggers import Logger, Metrics
from harmony_core.notifiers import StageNotifier, StdoutJobNotifier
from harmony_core.threads import StringThread

FACTS = {"ranks": 1, "device": "cpu", "seed": 0, "deterministic": False}
PAIRS = [
    (pair(f"say {i}", "abc"[i % 3] * (1 + i % 4)), pair(f"say {i}", "xyz"[i % 3] * (1 + i % 5))) for i in range(12)
]
PROMPTS = [StringThread([("user", f"say {i}")]) for i in range(5)]


class Notes(Logger):
    """Keeps the metrics of each step by its number, and may ask the run to stop at one."""

    def __init__(self, kept: dict[int, dict[str, Any]], at_step: Callable[[int], None]) -> None:
        super().__init__()
        self.kept = kept
        self.at_step = at_step

    def record(self, step: int, metrics: Metrics) -> None:
        self.kept[step] = {name: value for name, value in metrics.items() if not name.endswith("seconds")}
        self.at_step(step)


class Calls(RecipeCallback):
    """Logs when it was called, and so with every step whether it was its turn."""

    def __init__(self) -> None:
        super().__init__(frequency=0.4)

    async def callback(self, current_percentage: float) -> dict[str, Any]:
        return {"called_at": current_percentage}


def digits(thread: StringThread) -> float:
    return sum(letter.isdigit() for letter in thread.completion() or "") / 6


async def models(engine: LiveEngine, *, policy: bool, scalar: bool) -> list[TrainingModel]:
    """Fresh models: a policy, one with a scalar head, or both."""
    builder = engine.client.model("builtin:tiny-lm", kv_cache_len=1024, tokens_to_generate=6)
    found = [await builder.spawn_train("policy", max_batch_size=256)] if policy else []
    return found + ([await builder.into_scoring_model().spawn_train("scalar", max_batch_size=256)] if scalar else [])


Make = Callable[[list[TrainingModel], Logger, StageNotifier], Any]


def make_dpo(live: list[TrainingModel], logger: Logger, stage: StageNotifier) -> Any:
    return DPO(PAIRS, live[0], logger, stage, [Calls()], lr=3e-3, samples_per_batch=4, epochs=2)


def make_rm(live: list[TrainingModel], logger: Logger, stage: StageNotifier) -> Any:
    return RewardModelling(PAIRS, live[0], logger, stage, [Calls()], lr=3e-3, samples_per_batch=4, epochs=2)


RL: dict[str, Any] = {"samples_per_batch": 8, "samples_per_mini_batch": 4, "kl_beta": 0.05}
GROUPS: dict[str, Any] = {"completions_per_sample": 4, "lr": 1e-2}


def make_grpo(live: list[TrainingModel], logger: Logger, stage: StageNotifier) -> Any:
    grader = BaseGrader.from_function("digits", digits)
    return GRPO(PROMPTS, live[0], grader, logger, stage, [Calls()], max_num_grpo_steps=5, **GROUPS, **RL)


def make_gspo(live: list[TrainingModel], logger: Logger, stage: StageNotifier) -> Any:
    grader = BaseGrader.from_function("digits", digits)
    return GSPO(PROMPTS, live[0], grader, logger, stage, [Calls()], max_num_gspo_steps=5, **GROUPS, **RL)


def make_ppo(live: list[TrainingModel], logger: Logger, stage: StageNotifier) -> Any:
    grader = BaseGrader.from_function("digits", digits)
    return PPO(PROMPTS, *live, grader, logger, stage, [Calls()], epochs=6, lr_policy=1e-2, lr_value=1e-2, **RL)


CASES: dict[str, tuple[Make, dict[str, bool], int]] = {
    "dpo": (make_dpo, {"policy": True, "scalar": False}, 3),
    "reward_modelling": (make_rm, {"policy": False, "scalar": True}, 2),
    "grpo": (make_grpo, {"policy": True, "scalar": False}, 5),
    "gspo": (make_gspo, {"policy": True, "scalar": False}, 5),
    "ppo": (make_ppo, {"policy": True, "scalar": True}, 4),
}
"""How to make the class, its models, and the logger's step within or after which it is stopped."""


async def digest(live: list[TrainingModel], folder: Path) -> str:
    """sha256 over weights and optimizer states."""
    found = hashlib.sha256()
    for index, model in enumerate(live):
        target = folder / str(index)
        target.mkdir(parents=True)
        await model.state().save(target)
        for file in sorted(target.rglob("*.safetensors")):
            found.update(file.read_bytes())
    return found.hexdigest()


async def play(
    engine: LiveEngine, name: str, store: CheckpointStore, folder: Path, stop: int | None = None, resume: bool = False
) -> tuple[dict[int, dict[str, Any]], dict[str, float], str]:
    """One process of a run: metrics by step, the result, and the digest of what the models are at the end."""
    make, which, _ = CASES[name]
    kept: dict[int, dict[str, Any]] = {}
    job = StdoutJobNotifier("run", sink=lambda stage, done, total: None)
    run = job.checkpoints = RunCheckpoints(
        store, FACTS, store.newest_whole(lambda text: None) if resume else None, False
    )
    live = await models(engine, **which)
    try:
        logger = Notes(kept, lambda step: void(run.stop()) if step == stop else None)
        try:
            result = await make(live, logger, job.stage_notifier("Stage")).run()
        except asyncio.CancelledError:
            assert stop is not None
            return kept, {}, ""
        return kept, without_seconds(result), await digest(live, folder)
    finally:
        for model in live:
            await model.dealloc()


def void(_: object) -> None:
    """Nothing."""


def without_seconds(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.endswith("seconds")}


Played = tuple[dict[int, dict[str, Any]], dict[str, float], str]


def whole_and_resumed(engine: LiveEngine, name: str, folder: Path) -> tuple[Played, Played]:
    """A run that was not stopped, and one that was."""
    stop = CASES[name][2]
    whole = engine.run(play(engine, name, CheckpointStore(folder / "a"), folder / "whole"))
    assert len(whole[0]) > stop + 1
    store = CheckpointStore(folder / "b")
    before, *_ = engine.run(play(engine, name, store, folder / "first", stop=stop))
    assert stop < len(before) < len(whole[0])
    after, result, weights = engine.run(play(engine, name, store, folder / "second", resume=True))
    assert min(after) == max(before) + 1, "it goes on, it does not begin again"
    return whole, ({**before, **after}, result, weights)


def named(names: set[str]) -> list[Any]:
    """All classes, those that are not named as slow tests."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", named({"dpo", "reward_modelling", "ppo"}))
def test_a_stopped_training_goes_on_as_one_that_was_not(one_rank: LiveEngine, name: str, tmp_path: Path) -> None:
    whole, resumed = whole_and_resumed(one_rank, name, tmp_path)
    if name == "reward_modelling":
        assert resumed == whole, "it neither samples nor scores"
    assert list(whole[0]) == list(resumed[0])
    assert sum("called_at" in metrics for metrics in whole[0].values()) == 4
    for step, metrics in whole[0].items():
        assert set(metrics) == set(resumed[0][step])
        for key, value in metrics.items():
            # What measures rounding itself is another number each time.
            if not key.startswith("sampler_"):
                assert resumed[0][step][key] == pytest.approx(value, rel=1e-3, abs=1e-5), (step, key)


@pytest.fixture(scope="module")
def deterministic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveEngine]:
    engine = start_engine(tmp_path_factory.mktemp("home"), 1, deterministic=True)
    yield engine
    stop_engine(engine)


@pytest.mark.parametrize("name", named({"grpo"}))
def test_in_the_deterministic_mode_it_ends_with_the_same_bits(
    deterministic: LiveEngine, name: str, tmp_path: Path
) -> None:
    whole, resumed = whole_and_resumed(deterministic, name, tmp_path)
    assert resumed == whole


def test_other_settings_are_refused(one_rank: LiveEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path / "a")
    one_rank.run(play(one_rank, "grpo", store, tmp_path / "first", stop=1))
    monkeypatch.setitem(RL, "kl_beta", 0.06)
    with pytest.raises(UsageError, match=r"kl_beta: 0\.05 -> 0\.06"):
        one_rank.run(play(one_rank, "grpo", store, tmp_path / "second", resume=True))
