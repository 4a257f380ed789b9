"""A loop that a recipe writes itself with `CheckpointManager`, stopped and resumed: it ends as if it had not been."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from algorithms.test_checkpointing import FACTS
from engines import LiveEngine, pairs
from harmony_core.algorithms.checkpoint_manager import (
    BaseCheckpointData,
    CheckpointManager,
    ENVGRPOCheckpointData,
    GRPOCheckpointData,
    PPOCheckpointData,
    SFTCheckpointData,
    StageCheckpoint,
)
from harmony_core.data.datasets import DataSet
from harmony_core.errors import UsageError
from harmony_core.loggers import EventLogger
from harmony_core.notifiers import StdoutJobNotifier
from harmony_core.runs.checkpoints import CheckpointStore
from harmony_core.runs.resuming import RunCheckpoints

STEPS, BATCH = 6, 4


class Story:
    """Two stages of one recipe, the second a loop over one model; processes share the engine and the folder."""

    def __init__(self, engine: LiveEngine, folder: Path) -> None:
        self.engine, self.store, self.folder = engine, CheckpointStore(folder / "checkpoints"), folder
        self.trained: list[tuple[int, float]] = []
        self.data: SFTCheckpointData | None = None
        self.seen: list[str] = []

    def play(self, stop_at: int = STEPS + 1, resume: bool = False, digest: str = "h") -> list[float]:
        return self.engine.run(self._play(stop_at, resume, digest))

    async def _play(self, stop_at: int, resume: bool, digest: str) -> list[float]:
        job = StdoutJobNotifier(self.folder.name.replace("_", "-"))
        resumed = self.store.newest_whole(lambda text: None) if resume else None
        run = RunCheckpoints(self.store, FACTS, resumed)
        job.checkpoints = run
        await self._first(job, run.restore_data)
        builder = self.engine.client.model("builtin:tiny-lm", kv_cache_len=512)
        model = await builder.spawn_train("policy", max_batch_size=128)
        samples = pairs(10)
        data, logger = DataSet(samples, allow_looping=True), EventLogger(lambda type, data: None)
        manager = CheckpointManager(
            "mine",
            data,
            samples,
            [],
            digest,
            job.stage_notifier("Own loop"),
            checkpoint_data_cls=SFTCheckpointData,
            checkpoint_frequency=0.3,
            checkpoint_restore_data=run.restore_data,
            logger=logger,
        )
        manager.register_model(model, recipe_key="model_checkpoint_name")

        async def load(found: SFTCheckpointData) -> None:
            self.data = found
            model.set_optim_step(found.optim_step)

        async def save() -> dict[str, Any]:
            return {"optim_step": model.get_optim_step()}

        try:
            if manager.should_skip():
                return []
            assert manager.stage_suffix == "-stage1" and manager.is_enabled()
            await manager.restore_checkpoint_data(load)
            while data.idx < STEPS * BATCH:
                for _ in range(BATCH):
                    await model.train_language_modelling(next(data))
                metrics = await model.optim_step(1e-2, 0.0, 1.0)
                logger(metrics)
                self.trained.append((model.get_optim_step(), metrics["loss"]))
                if model.get_optim_step() == stop_at:
                    run.stop()
                if await manager.maybe_checkpoint(data.idx / (STEPS * BATCH), save):
                    break
            assert logger.get_state() == {"step": STEPS}
            return await model.logprobs_per_token(await model.tokenize_thread(samples[0]))
        finally:
            await model.dealloc()

    async def _first(self, job: StdoutJobNotifier, restore_data: dict[str, Any] | None) -> None:
        """A stage without a model."""
        data = DataSet([1, 2])
        manager = CheckpointManager(
            "first", data, [1, 2], [], "", job.stage_notifier("First"), checkpoint_restore_data=restore_data
        )

        async def save() -> dict[str, Any]:
            return {}

        if not manager.should_skip():
            self.seen += [str(sample) for sample in data]
            await manager.maybe_checkpoint(1.0, save)


def test_a_stopped_loop_goes_on_as_one_that_was_not(one_rank: LiveEngine, tmp_path: Path) -> None:
    calm = Story(one_rank, tmp_path / "calm")
    expected = calm.play()
    story = Story(one_rank, tmp_path / "stopped")
    with pytest.raises(asyncio.CancelledError):
        story.play(stop_at=3)
    with pytest.raises(UsageError, match="hyperparams_hash: h -> other"):
        story.play(resume=True, digest="other")
    assert story.play(resume=True) == expected
    assert story.trained == calm.trained and len(story.trained) == STEPS
    assert sorted(story.seen) == ["1", "2"]  # the first stage had ended, and did not run again
    data = story.data
    assert data is not None and (data.recipe_type, data.hyperparams_hash, data.optim_step) == ("mine", "h", 3)
    assert data.dataset_idx == 3 * BATCH and len(data.dataset_access_indices) == 20
    assert (data.completion_percentage, data.logger_state) == (0.5, {"step": 3})
    assert data.model_checkpoint_name.startswith("checkpoints/stopped/own-loop-stage1-model_checkpoint_name@")
    assert story.play(resume=True) == []  # both have ended


def test_outside_of_a_run_nothing_is_saved(tmp_path: Path) -> None:
    data = DataSet([1])
    manager = CheckpointManager("mine", data, [1], [], "h", StdoutJobNotifier().stage_notifier("s"))
    CheckpointManager.reset_stage_counter()

    async def unexpected(*_: object) -> dict[str, Any]:
        raise AssertionError

    async def work() -> bool:
        await manager.restore_checkpoint_data(unexpected)  # type: ignore[arg-type]
        return await manager.maybe_checkpoint(0.9, unexpected) or await manager.maybe_checkpoint(1.0, unexpected)

    assert not manager.should_skip() and not asyncio.run(work())
    assert not manager.is_enabled() and manager.stage_suffix == ""


def test_records_have_their_documented_fields() -> None:
    base = {"recipe_type": "PPO", "dataset_hash": "d", "hyperparams_hash": "h"}
    plain = BaseCheckpointData(**base)
    assert (plain.dataset_hash, plain.dataset_rng_state, plain.callback_last_calls) == ("d", None, [])
    model = {"model_checkpoint_name": "m@1", "optim_step": 2}
    ppo = PPOCheckpointData(**base, **model, value_model_checkpoint_name="v@1", value_optim_step=3)
    assert (ppo.value_model_checkpoint_name, ppo.value_optim_step) == ("v@1", 3)
    assert GRPOCheckpointData(**base, **model).optim_step == 2
    assert ENVGRPOCheckpointData(**base, **model).sample_index_counter == 0
    stage = StageCheckpoint(active_stage="s")
    assert (stage.active_stage, stage.completed_stages, stage.data) == ("s", [], {})
