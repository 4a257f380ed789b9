"""Helpers of recipes: hashes, logged arguments, templates of prompts."""

from __future__ import annotations

import asyncio
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import pair
from harmony_core.algorithms.helpers import (
    SingleTurnShot,
    TurnTemplates,
    flatten,
    get_function_name,
    hash_dataset,
    hash_hyperparams,
    log_args,
    turn_templates_from_dir,
    wrap_coroutine_with_progress,
)
from harmony_core.algorithms.tangents import grpo_loss
from harmony_core.algorithms.training import CosineScheduler
from harmony_core.errors import DataError
from harmony_core.loggers import Logger, Metrics


class Kept(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.configs: list[dict[str, Any]] = []

    def record(self, step: int, metrics: Metrics) -> None:
        raise AssertionError("no metrics are expected")

    def log_config(self, config: dict[str, Any]) -> None:
        self.configs.append(config)


class Handle:
    def get_builder_args(self) -> dict[str, Any]:
        return {"path": "model_registry://m@1"}


def test_arguments_are_logged_as_far_as_json_holds_them() -> None:
    class Loop:
        @log_args
        def __init__(
            self, model: Handle, data: list[int], logger: Logger, lr: float = 0.1, other: object = None
        ) -> None:
            self.lr = lr

    logger = Kept()
    assert Loop(Handle(), list(range(101)), logger, other=object()).lr == 0.1
    assert logger.configs == [{"model": {"path": "model_registry://m@1"}, "lr": 0.1}]
    Loop(Handle(), [1, 2], logger=logger)
    assert logger.configs[1]["data"] == [1, 2] and logger.configs[1]["other"] is None


def test_the_hash_of_hyperparameters_is_one_of_values() -> None:
    class Loop:
        @hash_hyperparams({"lr", "lr_scheduler"})
        def __init__(self, lr: float = 0.1, lr_scheduler: Any = None, seed: int = 0) -> None:
            self._hyperparams_hash: str

    one = Loop(lr_scheduler=CosineScheduler(1e-3))._hyperparams_hash
    assert len(one) == 16 and int(one, 16) >= 0
    assert Loop(0.1, CosineScheduler(1e-3), seed=5)._hyperparams_hash == one
    assert Loop(lr_scheduler=CosineScheduler(1e-4))._hyperparams_hash != one
    assert Loop(0.2, CosineScheduler(1e-3))._hyperparams_hash != one


def test_the_hash_of_a_dataset_covers_every_sample() -> None:
    samples = [pair(str(i), "a") for i in range(30)]
    changed = [*samples[:15], pair("15", "b"), *samples[16:]]
    assert hash_dataset(samples) == hash_dataset([pair(str(i), "a") for i in range(30)], num_samples=2)
    assert hash_dataset(samples) != hash_dataset(changed)
    assert hash_dataset(samples[:1]) != hash_dataset(samples[:1] * 2)


def test_names_progress_and_lists() -> None:
    def named(x: int) -> int:
        return x

    class Called:
        def __call__(self) -> None: ...

    class Counter:
        count = 0

        def update(self, n: int, /) -> None:
            self.count += n

    assert get_function_name(named) == get_function_name(functools.partial(named, 1)) == "named"
    assert get_function_name(Called()) == "Called"
    counter = Counter()

    async def fails() -> None:
        raise ValueError("no")

    async def work() -> None:
        assert await wrap_coroutine_with_progress(asyncio.sleep(0, "done"), counter) == "done"
        with pytest.raises(ValueError, match="no"):
            await wrap_coroutine_with_progress(fails(), counter)

    asyncio.run(work())
    assert counter.count == 1
    assert flatten([[1], [], [2, 3]]) == [1, 2, 3]


def test_templates_of_a_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has none of system.md, user.md, assistant.md, shots.jsonl"):
        turn_templates_from_dir(tmp_path)
    shot = SingleTurnShot(user={"question": "2+2?"}, assistant={"answer": "4"})
    (tmp_path / "user.md").write_text("{{question}}\n")
    (tmp_path / "shots.jsonl").write_text(json.dumps(shot) + "\n\n")
    found = turn_templates_from_dir(str(tmp_path))
    assert found == TurnTemplates(system=None, user="{{question}}\n", assistant=None, shots=[shot])
    (tmp_path / "shots.jsonl").write_text("{not json")
    with pytest.raises(DataError, match="not JSON lines"):
        turn_templates_from_dir(tmp_path)


def test_the_loss_of_grpo_takes_arrays_too() -> None:
    given = [-1.0, -0.5], [-1.2, -0.4], [-0.9, -0.6], [1.0, -2.0]
    plain, metrics = grpo_loss(*given, clip_range=0.1, kl_beta=0.01)
    arrays, same = grpo_loss(*map(np.array, given), clip_range=0.1, kl_beta=0.01)
    assert arrays == pytest.approx(plain) and same == pytest.approx(metrics)
    logprobs, old, reference, advantages = map(np.array, given)
    for at in range(2):  # -dL/dlogprob, by differences

        def loss(values: Any) -> float:
            ratio, x = np.exp(values - old), reference - values
            surrogate = np.minimum(ratio * advantages, np.clip(ratio, 0.9, 1.1) * advantages)
            return float(np.sum(-surrogate + 0.01 * (np.exp(x) - x - 1)))

        step = np.eye(2)[at] * 1e-6
        assert plain[at] == pytest.approx(-(loss(logprobs + step) - loss(logprobs - step)) / 2e-6, abs=1e-6)
