"""Saved versions: they load in plain transformers and peft, and back into live models."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from engines import LiveEngine, pair, pairs, start_engine, stop_engine
from harmony_core.algorithms.checkpointing import Checkpointing
from harmony_core.client import InferenceModel, TrainingModel, storage
from harmony_core.errors import ModelRefused, RankDied, ResourceError
from harmony_core.notifiers import StdoutJobNotifier
from harmony_core.registry import publish
from harmony_core.runs import checkpoints
from harmony_core.runs.resuming import RunCheckpoints
from harmony_core.text.threads import StringThread

TINY = "builtin:tiny-lm"


async def trained(engine: LiveEngine, name: str, tp: int, adapter: bool, steps: int = 2) -> TrainingModel:
    builder = engine.client.model(TINY, kv_cache_len=1024).tp(tp).with_adapter(adapter)
    model = await builder.spawn_train(name, 256)
    for _ in range(steps):
        await step(model)
    return model


async def step(model: TrainingModel) -> dict[str, float]:
    await asyncio.gather(*(model.train_language_modelling(t) for t in pairs(16)))
    return await model.optim_step(1e-2, 0.01, 1.0)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_saved_models_give_the_same_logprobs_elsewhere(two_ranks: LiveEngine, tp: int, adapter: bool) -> None:
    async def work() -> tuple[list[int], list[float], str]:
        model = await trained(two_ranks, "saved", tp, adapter)
        tokens = (await model.tokenize_thread(pair("say 9", "bb9"))).token_ids
        ours = await model.raw_logprobs(tokens)
        ref = await model.save("elsewhere/saved")
        again = await two_ranks.client.model(ref, kv_cache_len=512).spawn_inference("again")
        assert await again.raw_logprobs(tokens) == pytest.approx(ours, abs=1e-5)
        assert (await again.generate(StringThread([("user", "say 9")]))).completion() is not None
        await again.dealloc()
        await model.dealloc()
        return tokens, ours, ref

    tokens, ours, ref = two_ranks.run(work())
    version = two_ranks.registry.resolve(ref)
    plain = AutoModelForCausalLM.from_pretrained(version.weights_dir, dtype=torch.float32)
    if adapter:
        assert version.format == "peft" and version.base is not None and version.base.ref == TINY
        assert version.tokenizer_dir == version.path
        plain = AutoPeftModelForCausalLM.from_pretrained(version.path, dtype=torch.float32)
    with torch.no_grad():
        logits = plain(torch.tensor([tokens])).logits[0, :-1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
    assert ours[1:] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_loaded_model_goes_on_as_if_it_had_never_stopped(one_rank: LiveEngine, adapter: bool) -> None:
    async def work() -> None:
        model = await trained(one_rank, "goes-on", 1, adapter)
        ref = await model.save("goes-on", inference_only=False)
        after = await step(model)
        await model.load(f"model_registry://{ref}")
        model.set_optim_step(2)
        assert await step(model) == pytest.approx(after | {"seconds": pytest.approx(0, abs=60)})
        other = await trained(one_rank, "other", 1, adapter, steps=1)
        await other.load(ref)
        other.set_optim_step(2)
        resumed = await step(other)
        assert resumed["loss"] == after["loss"] and resumed["grad_norm"] == after["grad_norm"]
        await model.dealloc()
        await other.dealloc()

    one_rank.run(work())


def test_loading_what_does_not_fit_is_refused(one_rank: LiveEngine) -> None:
    async def work() -> None:
        full = await trained(one_rank, "full", 1, adapter=False, steps=0)
        lora = await trained(one_rank, "lora", 1, adapter=True, steps=0)
        ref = await lora.save("an-adapter")
        with pytest.raises(ModelRefused, match="adapter"):
            await full.load(ref)
        with pytest.raises(ModelRefused, match="full weights"):
            await lora.load(TINY)
        await full.dealloc()
        await lora.dealloc()

    one_rank.run(work())


def test_concurrent_saves_of_one_name_make_versions(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await trained(one_rank, "versions", 1, adapter=True, steps=0)
        refs = await asyncio.gather(*(model.save("Many Versions!") for _ in range(4)))
        assert sorted(refs) == [f"many-versions@{n}" for n in (1, 2, 3, 4)]
        await model.dealloc()

    one_rank.run(work())


def test_an_inference_model_that_loads_no_longer_shares_its_weights(one_rank: LiveEngine) -> None:
    async def work() -> None:
        model = await trained(one_rank, "source", 1, adapter=False)
        ref = await model.save("loaded-later")
        thread = pair("say 2", "a2")
        shared = one_rank.client.model(TINY, kv_cache_len=512)
        first, second = await shared.spawn_inference("first"), await shared.spawn_inference("second")
        before, promised = await second.logprobs(thread), one_rank.client.memory()["free"]
        asked = StringThread([("user", "a prompt that fills several pages of the cache")])
        await first.max_gen_len(3).generate(asked)
        await first.load(ref)
        drawn = await first.max_gen_len(9).generate_tokens(asked)
        assert await first.logprobs_per_token(drawn) == pytest.approx(drawn.logprobs, abs=1e-4), "pages of old weights"
        assert await first.logprobs(thread) == pytest.approx(await model.logprobs(thread), abs=1e-4)
        assert await second.logprobs(thread) == before
        assert promised - one_rank.client.memory()["free"] == 324_000 * 4
        for live in (model, first, second):
            await live.dealloc()
        assert one_rank.client.memory()["models"] == {}

    one_rank.run(work())


class FullDisk:
    """A disk that has no room, or has some, as the one who saves sees it before he writes."""

    def __init__(self, engine: LiveEngine, monkeypatch: pytest.MonkeyPatch, wait: float | None = 60.0) -> None:
        self.full, self.tries, self.reason = True, 0, errno.ENOSPC
        options = replace(engine.client._engine.options, save_wait=wait)
        monkeypatch.setattr(engine.client._engine, "options", options)
        monkeypatch.setattr(storage, "RETRY_SECONDS", 0.02)
        for module in (publish, checkpoints):
            monkeypatch.setattr(module, "check_space", self.check)

    def check(self, *_: object) -> None:
        self.tries += 1
        if self.full:
            raise ResourceError("the disk is full", errno=self.reason)


async def logprobs(model: InferenceModel) -> list[float]:
    return await model.raw_logprobs((await model.tokenize_thread(pair("say 9", "bb9"))).token_ids)


def test_while_a_save_waits_for_room_what_follows_waits_and_the_others_go_on(
    one_rank: LiveEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def work() -> None:
        model = await trained(one_rank, "waits", 1, adapter=False)
        other = await one_rank.client.model(TINY, kv_cache_len=512).spawn_inference("goes-on")
        then, seen, disk = await logprobs(model), len(one_rank.events), FullDisk(one_rank, monkeypatch)
        first = asyncio.ensure_future(model.save("waits", inference_only=False))
        await one_rank.until(lambda: disk.tries > 1)
        assert await logprobs(model) == pytest.approx(then)
        await asyncio.gather(*(model.train_language_modelling(t) for t in pairs(8)))
        stepped = asyncio.ensure_future(model.optim_step(1e-2, 0.01, 1.0))
        second = asyncio.ensure_future(model.save("waits"))
        await asyncio.sleep(0)
        later, cancelled = asyncio.ensure_future(step(model)), asyncio.ensure_future(model.save("never"))
        seeing, tries = asyncio.ensure_future(logprobs(model)), disk.tries
        await one_rank.until(lambda: disk.tries > tries + 2)
        cancelled.cancel()
        assert await logprobs(other) != then
        assert not any(work.done() for work in (first, stepped, second, later, seeing))
        assert not list(one_rank.registry.home.staging.iterdir())
        assert one_rank.seen("save.waits", since=seen)[0][0]["reason"] == "the disk is full"
        assert "the save of waits is tried for another" in capsys.readouterr().err
        disk.full = False
        refs, steps = [await first, await second], [await stepped, await later]
        assert [one_rank.registry.resolve(ref).ref for ref in refs] == refs and [s["step"] for s in steps] == [3, 4]
        saved = [await one_rank.client.model(ref, kv_cache_len=512).spawn_inference(f"s{ref[-1]}") for ref in refs]
        numbers = [await logprobs(each) for each in saved]
        assert numbers[0] == pytest.approx(then, abs=1e-5) and numbers[1] != pytest.approx(then, abs=1e-5)
        assert await seeing != pytest.approx(then, abs=1e-5), "it was asked after the first step"
        assert numbers[1] != pytest.approx(await logprobs(model), abs=1e-5), "the second step came after the save"
        assert one_rank.client.unsaved
        for live in (model, other, *saved):
            await live.dealloc()

    one_rank.run(work())


def test_after_its_time_a_save_on_a_full_disk_fails_and_the_step_is_taken(
    one_rank: LiveEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        model = await trained(one_rank, "gives-up", 1, adapter=True)
        disk = FullDisk(one_rank, monkeypatch, wait=0.2)
        saving, stepped = asyncio.ensure_future(model.save("k")), asyncio.ensure_future(step(model))
        with pytest.raises(ResourceError, match="the disk is full") as caught:
            await saving
        assert caught.value.exit_code == 4 and disk.tries > 1 and (await stepped)["step"] == 3
        disk.reason, disk.tries = errno.EACCES, 0
        with pytest.raises(ResourceError):
            await model.save("k")
        assert disk.tries == 1
        monkeypatch.setenv("CI", "true")
        unset = FullDisk(one_rank, monkeypatch, wait=None)
        with pytest.raises(ResourceError):
            await model.save("k")
        assert unset.tries == 1
        await model.dealloc()

    one_rank.run(work())


def test_a_checkpoint_waits_for_room_as_a_save_does(
    one_rank: LiveEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        model = await trained(one_rank, "checkpointed", 1, adapter=True)
        job = StdoutJobNotifier("run", sink=lambda stage, done, total: None)
        store = checkpoints.CheckpointStore(tmp_path / "checkpoints")
        job.checkpoints = run = RunCheckpoints(store, {})
        stage = job.stage_notifier("SFT")
        kept = Checkpointing("SFT", stage, models={"policy": model}, parts={}, samples=[], settings={})
        disk = FullDisk(one_rank, monkeypatch)

        async def train() -> dict[str, float]:
            await step(model)
            await kept.step_done(0.5)
            return {"loss": 1.0}

        ended = asyncio.ensure_future(kept.run(train))
        await one_rank.until(lambda: disk.tries > 2)
        stepped = asyncio.ensure_future(step(model))
        await one_rank.until(lambda: disk.tries > 5)
        assert not stepped.done() and not ended.done() and not store.names()
        disk.full = False
        assert await ended == {"loss": 1.0} and (await stepped)["step"] == 4
        state = store.newest_whole(pytest.fail).state
        assert state["completed_stages"] == ["SFT"] and state["finished_stages"] == run.finished
        disk.full, disk.tries = True, 0
        run.stop()
        with pytest.raises(ResourceError, match="the disk is full"):
            await kept.run(train)
        assert disk.tries == 1, "a run that is asked to stop waits for no room"
        await model.dealloc()

    one_rank.run(work())


def test_a_save_that_waits_for_room_is_told_that_the_engine_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(tmp_path, 1)

    async def work() -> None:
        model = await trained(engine, "policy", 1, adapter=True, steps=0)
        disk = FullDisk(engine, monkeypatch)
        monkeypatch.setattr(storage, "RETRY_SECONDS", 50.0)
        saving = asyncio.ensure_future(model.save("k"))
        await engine.until(lambda: disk.tries > 0)
        stepping = asyncio.ensure_future(step(model))
        await engine.until(lambda: bool(engine.client._engine._unchanged["policy"]))
        os.kill(engine.client._engine._ranks[0].pid, signal.SIGKILL)
        with pytest.raises(RankDied):
            await asyncio.wait_for(saving, 30)
        with pytest.raises(RankDied):
            await asyncio.wait_for(stepping, 30)
        assert disk.tries == 1

    engine.run(work())
    stop_engine(engine)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 16 MiB."""
    tmp_path.joinpath("disk").mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(tmp_path / "disk")]
    if os.geteuid() or subprocess.run(mounted, capture_output=True, check=False).returncode:
        pytest.skip("mounting a disk takes root")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full_when_the_rank_writes_is_waited_for(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(publish, "check_space", lambda *_: None)
    engine = start_engine(small_disk, 1, save_wait=60.0)

    async def work() -> None:
        model = await trained(engine, "policy", 1, adapter=False)
        then = await logprobs(model)
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        saving = asyncio.ensure_future(model.save("kept"))
        await engine.until(lambda: len(engine.seen("save.waits")) > 2)
        assert "cannot save 'policy'" in engine.seen("save.waits")[0][0]["reason"]
        stepped = asyncio.ensure_future(step(model))
        (small_disk / "filler").unlink()
        ref, values = await saving, await stepped
        again = await engine.client.model(ref, kv_cache_len=512).spawn_inference("again")
        assert await logprobs(again) == pytest.approx(then, abs=1e-5) and values["step"] == 3

    engine.run(work())
    stop_engine(engine)
