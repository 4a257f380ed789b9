"""Every training class that was stopped after some step and resumed ends as if it had not been.

Which requests share a forward pass depends on when they arrive, and with it the last bits of log-probs; so of classes
that sample or score, equality to the bit is asked for in the deterministic mode, and elsewhere but for rounding.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engines import LiveEngine, pair, start_engine, stop_engine
from harmony_core.algorithms import DPO, ENVGRPO, ENVPPO, GRPO, GSPO, PPO, SFT, RecipeCallback, RewardModelling
from harmony_core.client import TrainingModel, batching
from harmony_core.errors import EngineError, UsageError
from harmony_core.graders import BaseGrader
from harmony_core.loggers import Logger, Metrics
from harmony_core.notifiers import StageNotifier, StdoutJobNotifier
from harmony_core.rpc.wire import pack_doubles
from harmony_core.runs.checkpoints import CheckpointStore
from harmony_core.runs.resuming import RunCheckpoints
from harmony_core.text.threads import StringThread
from worlds import Factory, answers

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


def make_sft(live: list[TrainingModel], logger: Logger, stage: StageNotifier) -> Any:
    return SFT(
        [chosen for chosen, _ in PAIRS], live[0], logger, stage, [Calls()], lr=3e-3, samples_per_batch=4, epochs=2
    )


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


def make_env_grpo(live: list[TrainingModel], logger: Logger, stage: StageNotifier) -> Any:
    factory = Factory(answers(2, digits))
    return ENVGRPO(PROMPTS, live[0], factory, logger, stage, [Calls()], max_num_grpo_steps=5, **GROUPS, **RL)


def make_env_ppo(live: list[TrainingModel], logger: Logger, stage: StageNotifier) -> Any:
    factory = Factory(answers(2, digits))
    rates = {"lr_policy": 1e-2, "lr_value": 1e-2}
    return ENVPPO(PROMPTS, *live, factory, False, logger, stage, [Calls()], epochs=6, **rates, **RL)


CASES: dict[str, tuple[Make, dict[str, bool], int]] = {
    "sft": (make_sft, {"policy": True, "scalar": False}, 3),
    "dpo": (make_dpo, {"policy": True, "scalar": False}, 3),
    "reward_modelling": (make_rm, {"policy": False, "scalar": True}, 2),
    "grpo": (make_grpo, {"policy": True, "scalar": False}, 5),
    "gspo": (make_gspo, {"policy": True, "scalar": False}, 5),
    "ppo": (make_ppo, {"policy": True, "scalar": True}, 4),
    "env_grpo": (make_env_grpo, {"policy": True, "scalar": False}, 5),
    "env_ppo": (make_env_ppo, {"policy": True, "scalar": True}, 4),
}
"""How to make the class, its models, and the logger's step within or after which it is stopped."""
SKIPPING = [name for name in CASES if name != "gspo" and not name.startswith("env")]
"""Classes that take `skip_nan_gradients`; those for environments take their steps as the others."""


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
    engine: LiveEngine,
    name: str,
    store: CheckpointStore,
    folder: Path,
    stop: int | None = None,
    resume: bool = False,
    at_step: Callable[[int], None] | None = None,
) -> tuple[dict[int, dict[str, Any]], dict[str, float], str]:
    """One process of a run: metrics by step, the result, and the digest of what the models are at the end.

    It is asked to stop when the metrics of step `stop` were logged, or whatever `at_step` does happens.
    """
    make, which, _ = CASES[name]
    kept: dict[int, dict[str, Any]] = {}
    job = StdoutJobNotifier("run", sink=lambda stage, done, total: None)
    run = job.checkpoints = RunCheckpoints(
        store, FACTS, store.newest_whole(lambda text: None) if resume else None, False
    )
    live = await models(engine, **which)
    try:
        logger = Notes(kept, at_step or (lambda step: void(run.stop()) if step == stop else None))
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
    if name in ("sft", "reward_modelling"):
        assert resumed == whole, "it neither samples nor scores"
    assert list(whole[0]) == list(resumed[0])
    assert sum("called_at" in metrics for metrics in whole[0].values()) == 4
    for step, metrics in whole[0].items():
        assert set(metrics) == set(resumed[0][step])
        for key, value in metrics.items():
            # Metrics of rounding differ each time: the gap to the sampler, and the larger of two equal rewards.
            equal_rewards = key == "reward_accuracy" and abs(metrics.get("reward_margin", 1.0)) < 1e-5
            if not key.startswith("sampler_") and not equal_rewards:
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


class Poison:
    """Once `at_step` was logged, the next micro-batch that is sent holds NaN in place of its numbers but 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at_step: int) -> None:
        self.at_step = at_step
        self.armed = self.used = False
        monkeypatch.setattr(batching, "pack_doubles", self.pack)

    def logged(self, step: int) -> None:
        self.armed = step == self.at_step

    def pack(self, values: Iterable[float]) -> bytes:
        if not self.armed:
            return pack_doubles(values)
        self.used = True
        return pack_doubles(value and math.nan for value in values)


POISONED = [
    *(("sft", 3, "policy"), ("dpo", 3, "policy"), ("reward_modelling", 2, "scalar")),
    *(("grpo", 4, "policy"), ("gspo", 5, "policy"), ("ppo", 2, "scalar"), ("ppo", 4, "policy")),
]
"""After which step in the log, and which model is the next to train."""


@pytest.mark.parametrize(
    ("name", "at_step", "model"),
    [pytest.param(*case, marks=() if case[0] == "ppo" else pytest.mark.slow) for case in POISONED],
)
def test_bad_gradients_end_the_training_and_are_never_saved(
    one_rank: LiveEngine, name: str, at_step: int, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=99)
    with monkeypatch.context() as patched:
        poison = Poison(patched, at_step)
        with pytest.raises(EngineError, match=rf"of '{model}': .*, the first in \S+, computed on rank 0") as error:
            one_rank.run(play(one_rank, name, store, tmp_path / "first", at_step=poison.logged))
        assert poison.used
    assert error.value.details["step"] > 0 and error.value.details["tensor"] and error.value.details["rank"] == 0
    steps = [max(store.read(n).state["data"]["steps"].values()) for n in store.names()]
    assert all(step < error.value.details["step"] for step in steps)
    resume = bool(store.names())
    metrics, _, weights = one_rank.run(play(one_rank, name, store, tmp_path / "second", resume=resume))
    assert weights and all(math.isfinite(m.get("grad_norm", 0)) for m in metrics.values())


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "sft" else pytest.mark.slow) for n in SKIPPING])
def test_bad_gradients_are_skipped_and_counted_when_asked(
    one_rank: LiveEngine, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = Poison(monkeypatch, 2)
    for make in (SFT, DPO, RewardModelling, GRPO, PPO):
        monkeypatch.setattr(f"{__name__}.{make.__name__}", partial(make, skip_nan_gradients=True))
    store = CheckpointStore(tmp_path / "checkpoints")
    metrics, _, weights = one_rank.run(play(one_rank, name, store, tmp_path / "models", at_step=poison.logged))
    skipped = [step for step, found in metrics.items() if found.get("skipped") or found.get("value/skipped")]
    assert weights and skipped == [3]


def test_other_settings_are_refused(one_rank: LiveEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path / "a")
    one_rank.run(play(one_rank, "grpo", store, tmp_path / "first", stop=1))
    monkeypatch.setitem(RL, "kl_beta", 0.06)
    with pytest.raises(UsageError, match=r"kl_beta: 0\.05 -> 0\.06"):
        one_rank.run(play(one_rank, "grpo", store, tmp_path / "second", resume=True))
