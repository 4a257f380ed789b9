"""A training that was stopped and resumed ends as if it had not been stopped, bit for bit."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import LiveEngine, pair
from harmony_core.algorithms import SFT, RecipeCallback
from harmony_core.algorithms.checkpointing import Checkpointing, digest_of_samples
from harmony_core.client import TrainingModel
from harmony_core.data.datasets import DataSet
from harmony_core.errors import UsageError, VerificationError
from harmony_core.loggers import Logger, Metrics
from harmony_core.notifiers import StdoutJobNotifier
from harmony_core.runs.checkpoints import CheckpointStore
from harmony_core.runs.resuming import RunCheckpoints
from harmony_core.text.threads import StringThread

FACTS = {"ranks": 1, "device": "cpu", "seed": 0, "deterministic": False}
STEPS = 40
BATCH = 3
SAMPLES = 60  # two epochs of 20 steps: the second begins with another permutation
EPOCH_EDGE = SAMPLES // BATCH


class Killed(Exception):
    """Stands for the end of the process."""


class Notes(Logger):
    """Keeps the metrics of each step by its number, and may end the process at one.

    With them the seed that a request of training would have had there, as one has in reinforcement learning.
    """

    def __init__(
        self, kept: dict[int, dict[str, Any]], at_step: Callable[[int], None], seed: Callable[[], int]
    ) -> None:
        super().__init__()
        self.kept = kept
        self.at_step = at_step
        self.seed = seed

    def record(self, step: int, metrics: Metrics) -> None:
        self.kept[step] = {name: value for name, value in metrics.items() if name != "seconds"}
        self.kept[step]["seed"] = self.seed()
        self.at_step(step)


class Samples(RecipeCallback):
    """Samples at temperature 1, from seeds that belong to the part of the run that is done."""

    def __init__(self, model: TrainingModel) -> None:
        super().__init__(frequency=0.3)
        self.model = model.temperature(1.0).max_gen_len(8)

    async def callback(self, current_percentage: float) -> dict[str, Any]:
        return {"said": (await self.model.generate(StringThread([("user", "say 1")]))).last_content()}


def dataset() -> list[StringThread]:
    return [pair(f"say {i}", "abcde"[i % 5] * (1 + i % 4)) for i in range(SAMPLES)]


@dataclass
class Story:
    """A training over several processes: each begins with a fresh model, job and SFT, as a resumed run does."""

    engine: LiveEngine
    store: CheckpointStore
    metrics: dict[int, dict[str, Any]] = field(default_factory=dict)
    result: dict[str, float] = field(default_factory=dict)
    digest: str = ""
    run: RunCheckpoints | None = None
    tp: int = 1
    told: list[str] = field(default_factory=list)

    def job(self, resume: bool = False, allow_change: bool = False) -> StdoutJobNotifier:
        resumed = self.store.newest_whole(self.told.append) if resume else None
        job = StdoutJobNotifier("run", sink=lambda stage, done, total: None)
        self.run = job.checkpoints = RunCheckpoints(self.store, FACTS, resumed, allow_change)
        return job

    def play(
        self,
        at_step: Callable[[int], None] = lambda step: None,
        resume: bool = False,
        change: Callable[[SFT], None] = lambda sft: None,
        **options: Any,
    ) -> None:
        """One process: to the end, or to where `at_step` ends it."""
        self.engine.run(self._play(self.job(resume, options.pop("allow_change", False)), at_step, change, options))

    async def _play(
        self, job: StdoutJobNotifier, at_step: Callable[[int], None], change: Callable[[SFT], None], options: Any
    ) -> None:
        builder = self.engine.client.model("builtin:tiny-lm", kv_cache_len=512).tp(self.tp).with_adapter(dropout=0.1)
        model = await builder.spawn_train("policy", max_batch_size=64)
        try:
            settings = {"lr": 3e-3, "weight_decay": 0.01, "samples_per_batch": BATCH, "epochs": 2} | options
            sft = SFT(
                settings.pop("dataset", dataset()),
                model,
                Notes(self.metrics, at_step, model._live.next_request_seed),
                job.stage_notifier("SFT"),
                settings.pop("callbacks", [Samples(model)]),
                **settings,
            )
            change(sft)
            self.result = await sft.run()
            self.digest = await digest_of(model, self.store.directory.parent)
        finally:
            await model.dealloc()

    def stop(self, step: int) -> Callable[[int], None]:
        """Ask the run to stop within a step, as a signal does."""

        def at_step(now: int) -> None:
            if now == step:
                assert self.run is not None
                self.run.stop()

        return at_step

    def ended(self) -> dict[str, Any]:
        """Everything that must be equal at the end."""
        result = {name: value for name, value in self.result.items() if name != "seconds"}
        return {"weights and optimizer": self.digest, "metrics": self.metrics, "result": result}


async def digest_of(model: TrainingModel, folder: Path) -> str:
    """sha256 over the weights and the optimizer's state."""
    target = folder / "final"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    await model.state().save(target)
    found = hashlib.sha256()
    for file in sorted(target.glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()


def kill(step: int) -> Callable[[int], None]:
    """End the process after the step's numbers were logged, and before anything else."""

    def at_step(now: int) -> None:
        if now == step:
            raise Killed

    return at_step


@pytest.fixture(scope="module")
def calm(one_rank: LiveEngine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The end of a training that nothing stops and that writes no checkpoint but the last."""
    story = Story(one_rank, CheckpointStore(tmp_path_factory.mktemp("calm") / "checkpoints"))
    story.play(checkpoint_frequency=2.0)
    assert len(story.metrics) == STEPS + 1 and "said" in story.metrics[0]
    return story.ended()


@pytest.fixture
def story(one_rank: LiveEngine, tmp_path: Path) -> Story:
    return Story(one_rank, CheckpointStore(tmp_path / "checkpoints"))


# The logger's step 0 is that of the callbacks before the first optimizer step.
@pytest.mark.parametrize(
    "step",
    [
        pytest.param(step, marks=() if step in (EPOCH_EDGE, EPOCH_EDGE + 1) else pytest.mark.slow)
        for step in range(1, STEPS + 1)
    ],
)
def test_stopped_after_a_step_and_resumed(story: Story, calm: dict[str, Any], step: int) -> None:
    with pytest.raises(asyncio.CancelledError):
        story.play(story.stop(step), checkpoint_frequency=2.0)
    assert max(story.metrics) == step and story.store.names() == ["checkpoint-000001"]
    story.play(resume=True, checkpoint_frequency=2.0)
    assert story.ended() == calm


@pytest.mark.parametrize(
    "step", [pytest.param(s, marks=() if s == 25 else pytest.mark.slow) for s in range(5, STEPS + 1)]
)
def test_killed_and_resumed_from_the_last_checkpoint(story: Story, calm: dict[str, Any], step: int) -> None:
    with pytest.raises(Killed):
        story.play(kill(step), checkpoint_frequency=0.1)
    story.play(resume=True, checkpoint_frequency=0.1)
    assert story.ended() == calm


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_on_two_ranks(two_ranks: LiveEngine, tmp_path: Path, tp: int) -> None:
    calm, story = (Story(two_ranks, CheckpointStore(tmp_path / name / "checkpoints"), tp=tp) for name in "ab")
    calm.play(checkpoint_frequency=2.0)
    with pytest.raises(asyncio.CancelledError):
        story.play(story.stop(EPOCH_EDGE + 2))
    story.play(resume=True)
    assert story.ended() == calm.ended()


@pytest.fixture(scope="module")
def stopped(one_rank: LiveEngine, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """A training that was stopped late in its second epoch."""
    story = Story(one_rank, CheckpointStore(tmp_path_factory.mktemp("stopped") / "checkpoints"))
    with pytest.raises(asyncio.CancelledError):
        story.play(story.stop(32), checkpoint_frequency=2.0)
    return story


@pytest.fixture
def again(stopped: Story, tmp_path: Path) -> Story:
    """The same, to be resumed by one test."""
    shutil.copytree(stopped.store.directory, tmp_path / "checkpoints")
    return Story(stopped.engine, CheckpointStore(tmp_path / "checkpoints"), dict(stopped.metrics))


def test_with_every_part_it_ends_equal(again: Story, calm: dict[str, Any]) -> None:
    again.play(resume=True, checkpoint_frequency=2.0)
    assert again.ended() == calm


def tampered(story: Story, change: Callable[[Path, dict[str, Any]], None]) -> None:
    """Put a checkpoint beside the newest one that differs from it in one thing."""
    whole = story.store.newest_whole(pytest.fail)
    with story.store.write() as writing:
        shutil.copytree(whole.directory / "models", writing.directory / "models")
        state = json.loads(json.dumps(whole.state))
        change(writing.directory, state["data"])
        writing.commit(state)


def without_optimizer(directory: Path, data: dict[str, Any]) -> None:
    (directory / "models" / "policy" / "optimizer.safetensors").unlink()


def without_position(directory: Path, data: dict[str, Any]) -> None:
    data["parts"]["feed"]["dataset"]["idx"] -= BATCH


def without_permutations(directory: Path, data: dict[str, Any]) -> None:
    data["parts"]["feed"]["dataset"]["seed"] += 1


def without_request_numbers(directory: Path, data: dict[str, Any]) -> None:
    data["request_numbers"] = {"policy": 0}


def without_callbacks(directory: Path, data: dict[str, Any]) -> None:
    data["callback_last_calls"] = [-1.0]


def without_logger(directory: Path, data: dict[str, Any]) -> None:
    data["parts"]["logger"]["step"] = 0


@pytest.mark.parametrize(
    "left_out",
    [
        without_optimizer,
        without_position,
        without_permutations,
        without_request_numbers,
        without_callbacks,
        without_logger,
    ],
)
def test_each_part_of_a_checkpoint_is_needed(
    again: Story, calm: dict[str, Any], left_out: Callable[[Path, dict[str, Any]], None]
) -> None:
    tampered(again, left_out)
    again.play(resume=True, checkpoint_frequency=2.0)
    assert again.ended() != calm


@pytest.mark.parametrize(("name", "value"), [("steps", {}), ("parts", {}), ("callback_last_calls", [])])
def test_a_state_that_lacks_a_part_is_named_as_damaged(again: Story, name: str, value: object) -> None:
    tampered(again, lambda directory, data: data.update({name: value}))
    with pytest.raises(VerificationError, match=r"state\.json: cannot be taken back \((Key|Value)Error: "):
        again.play(resume=True)


def test_the_position_in_the_schedule_is_needed(again: Story, calm: dict[str, Any]) -> None:
    def begun_anew(sft: SFT) -> None:
        schedule = sft.lr_schedule
        sft.lr_schedule = lambda completion: schedule(completion - 32 / STEPS)

    again.play(resume=True, checkpoint_frequency=2.0, change=begun_anew)
    assert again.ended() != calm


def test_the_newest_damaged_checkpoint_is_passed_over(story: Story, calm: dict[str, Any]) -> None:
    with pytest.raises(Killed):
        story.play(kill(STEPS - 3), checkpoint_frequency=0.1)
    newest = story.store.directory / story.store.names()[0]
    weights = next(newest.rglob("adapter_model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    story.play(resume=True, checkpoint_frequency=0.1)
    assert newest.name in story.told[0] and "falling back" in story.told[1]
    assert story.ended() == calm


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr": 1e-3}, r"settings.lr: 0.003 -> 0.001"),
        ({"lr_scheduler": lambda x: 3e-3}, "settings.lr_scheduler: "),
        ({"data_seed": 1}, "settings.data_seed: 42 -> 1"),
        ({"dataset": dataset()[::-1]}, "data.sha256: "),
        ({"callbacks": []}, "callbacks: .*Samples"),
    ],
)
def test_other_data_and_settings_are_refused_with_the_difference(
    again: Story, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        again.play(resume=True, **options)
    harmless = "callbacks" in options
    with pytest.raises(asyncio.CancelledError if harmless else UsageError):
        again.play(again.stop(33), resume=True, allow_change=True, **options)


def test_when_asked_to_leave_the_loop_ends_and_the_rest_can_follow(story: Story, calm: dict[str, Any]) -> None:
    def leave(step: int) -> None:
        if step == 7:
            (story.store.directory / "GRACEFUL_EXIT").touch()

    story.play(leave, checkpoint_frequency=2.0)
    assert story.result["completion_percentage"] == pytest.approx(7 / STEPS)
    assert story.store.newest_whole(pytest.fail).state["active_stage"] == "SFT"
    story.play(resume=True, checkpoint_frequency=2.0)
    assert story.ended() == calm


def test_cancelled_within_a_step_the_end_of_the_one_before_is_saved(story: Story, calm: dict[str, Any]) -> None:
    def hang(sft: SFT) -> None:
        train, calls = sft.model.train_language_modelling, [0]

        async def hanging(thread: StringThread) -> None:
            calls[0] += 1
            if calls[0] == 10 * BATCH + 2:  # in the midst of the eleventh step
                assert story.run is not None
                story.run.stop()
                raise asyncio.CancelledError
            await train(thread)

        sft.model.train_language_modelling = hanging  # type: ignore[method-assign, assignment]

    with pytest.raises(asyncio.CancelledError):
        story.play(change=hang, checkpoint_frequency=2.0)
    assert story.store.newest_whole(pytest.fail).state["data"]["steps"] == {"policy": 10}
    story.play(resume=True, checkpoint_frequency=2.0)
    assert story.ended() == calm


@pytest.mark.parametrize("at", [pytest.param((1, 4), marks=pytest.mark.slow), (2, 3)])
def test_of_two_stages_the_finished_one_is_skipped_and_its_weights_are_kept(
    one_rank: LiveEngine, tmp_path: Path, at: tuple[int, int]
) -> None:
    async def recipe(story: Story, job: StdoutJobNotifier, end: tuple[int, int] | None) -> dict[str, Any]:
        model = await one_rank.client.model("builtin:tiny-lm", kv_cache_len=512).spawn_train("policy", 64)
        try:
            found: dict[str, Any] = {}
            for number in (1, 2):
                stop = story.stop(end[1]) if end is not None and end[0] == number else lambda step: None
                logger = Notes(story.metrics.setdefault(number, {}), stop, model._live.next_request_seed)
                stage = job.stage_notifier(f"stage {number}")
                sft = SFT(dataset()[: 10 * BATCH], model, logger, stage, lr=1e-3 * number, samples_per_batch=BATCH)
                found[f"result {number}"] = {k: v for k, v in (await sft.run()).items() if k != "seconds"}
                found[f"weights {number}"] = await digest_of(model, tmp_path)
            return found | {"metrics": story.metrics}
        finally:
            await model.dealloc()

    def told(folder: str, end: tuple[int, int] | None) -> dict[str, Any]:
        story = Story(one_rank, CheckpointStore(tmp_path / folder))
        if end is not None:
            with pytest.raises(asyncio.CancelledError):
                one_rank.run(recipe(story, story.job(), end))
        ended = one_rank.run(recipe(story, story.job(resume=end is not None), None))
        assert story.run is not None and not story.run.unused
        assert [stage["name"] for stage in story.run.finished] == ["stage 1", "stage 2"]
        return ended

    assert told("stopped", at) == told("calm", None)


def test_restore_data_must_be_that_of_the_run(story: Story) -> None:
    job = story.job()
    for data in ({}, {"checkpoint": "elsewhere"}):
        with pytest.raises(UsageError, match="checkpoint_restore_data"):
            Checkpointing(
                "SFT", job.stage_notifier("s"), models={}, parts={}, samples=[], settings={}, restore_data=data
            )
    with pytest.raises(UsageError, match="checkpoint_frequency"):
        Checkpointing("SFT", job.stage_notifier("s"), models={}, parts={}, samples=[], settings={}, frequency=0)


@pytest.mark.parametrize(("later", "taken"), [(4.0, True), (5.0, False)])
def test_a_setting_that_a_checkpoint_of_before_lacks_must_be_its_default(later: float, taken: bool) -> None:
    stage = StdoutJobNotifier(sink=lambda stage, done, total: None).stage_notifier("s")
    settings, defaults = {"lr": 0.1, "epochs": 1, "later": later}, {"epochs": 1, "later": 4.0}
    checkpointing = Checkpointing("X", stage, models={}, parts={}, samples=[], settings=settings, defaults=defaults)
    facts = checkpointing._with_later_settings({"settings": {"lr": 0.2, "epochs": 2}})
    assert facts == {"settings": {"lr": 0.2, "epochs": 2, **({"later": 4.0} if taken else {})}}


async def draws(store: CheckpointStore, resume: bool) -> list[list[Any]]:
    """What is drawn before and after a checkpoint; with `resume` only what is drawn after it."""
    job = StdoutJobNotifier(sink=lambda stage, done, total: None)
    run = job.checkpoints = RunCheckpoints(store, FACTS, store.newest_whole(pytest.fail) if resume else None)
    own, numpy, data = random.Random(1), np.random.default_rng(2), DataSet(range(5), allow_looping=True)
    parts, generators = {"data": data}, {"own": own, "numpy": numpy}
    stage = job.stage_notifier("s")
    checkpointing = Checkpointing("X", stage, models={}, parts=parts, samples=[], settings={}, generators=generators)
    drawn: list[list[Any]] = []

    def draw() -> None:
        drawn.append([own.random(), own.gauss(0, 1), numpy.normal(), next(data)])

    async def train() -> dict[str, float]:
        if not resume:
            for _ in range(7):
                draw()
            run.stopping = True
            with pytest.raises(asyncio.CancelledError):
                await checkpointing.step_done(0.5)
        draw()
        raise Killed

    with pytest.raises(Killed):
        await checkpointing.run(train)
    return drawn


def test_generators_and_other_parts_go_on_where_they_were(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    before = asyncio.run(draws(store, resume=False))
    assert asyncio.run(draws(store, resume=True)) == before[-1:]


def test_the_digest_of_samples_sees_every_sample_and_no_stamp() -> None:
    threads = dataset()
    before = digest_of_samples(threads)
    threads[30].metadata = {"sample_index": 4}
    again = dataset()
    again[30].metadata = {}
    assert digest_of_samples(threads) == digest_of_samples(again) != before
    assert digest_of_samples([*threads[:30], *threads[31:]]) != before
    pairs = [(threads[0], threads[1])]
    assert digest_of_samples(pairs) != digest_of_samples([(threads[1], threads[0])])
    assert digest_of_samples([object()]) == digest_of_samples([object()])
