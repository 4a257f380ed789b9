"""An engine that nobody refers to ends by itself, as in a notebook whose cells are run again."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import psutil
import pytest

from harmony_core.client import get_client
from harmony_core.text.threads import StringThread
from leftovers import until


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE}


def test_a_client_that_is_made_again_leaves_one_engine_and_the_last_handle_none(
    no_leftovers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTIVE_HOME", str(tmp_path))
    before, folders = children(), set(no_leftovers.iterdir())

    async def work() -> None:
        client = await get_client(num_gpus=1)
        await until(lambda: bool(children() - before))
        first = children() - before
        client = await get_client(num_gpus=1)  # the cell once more
        await until(lambda: not first & children())
        model = await client.model("builtin:tiny-lm", kv_cache_len=512).spawn_inference("a")
        del client
        gc.collect()
        # A model is enough to hold on to.
        assert (await model.max_gen_len(2).generate(StringThread([("user", "a")]))).completion() is not None
        assert children() - before
        del model
        gc.collect()
        await until(lambda: not children() - before)
        await until(lambda: set(no_leftovers.iterdir()) == folders)

    asyncio.run(work())


def test_one_that_outlives_its_event_loop_ends_too(
    no_leftovers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTIVE_HOME", str(tmp_path))
    before, folders = children(), set(no_leftovers.iterdir())
    with asyncio.Runner() as runner:
        client = runner.run(get_client(num_gpus=1))
        runner.run(until(lambda: bool(children() - before)))
    del client
    gc.collect()
    with asyncio.Runner() as runner:
        runner.run(until(lambda: not children() - before))
    assert set(no_leftovers.iterdir()) == folders
