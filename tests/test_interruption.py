"""Signals and the time limit, with recipes that help and recipes that do not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

# A script, not a function: it is signalled as a process.
SCRIPT = """
import asyncio, sys, time
from harmony_core.interruption import Interruption

kind, timeout, grace = sys.argv[1], float(sys.argv[2]) or None, float(sys.argv[3])

async def recipe():
    print("go", flush=True)
    try:
        if kind in ("sleeps", "impatient"):
            await asyncio.sleep(60)
        elif kind == "blocks":
            time.sleep(60)
        elif kind == "saves":
            for _ in range(40):
                await asyncio.sleep(0.05)
                if stop.reason:
                    with stop.saving():
                        await asyncio.sleep(2)
                    print("saved", flush=True)
                    raise asyncio.CancelledError
        elif kind == "child":
            async def child():
                time.sleep(60)
            await asyncio.gather(child(), asyncio.sleep(60))
        else:
            while True:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    pass
    finally:
        await asyncio.sleep(0.01)
        print("finally", flush=True)

async def main(stop):
    task = asyncio.create_task(recipe())
    stop.watch(task)
    await asyncio.wait([task])
    return stop.exit_code if task.cancelled() else 0

with Interruption(timeout, print, grace) as stop:
    stop.last_words = lambda code: print("last words", code, flush=True)
    if kind in ("saves", "impatient"):
        stop.patience = lambda: 5.0 if kind == "saves" else 0.2
        stop.resumable = lambda: True
    code = asyncio.run(main(stop))
sys.exit(code)
"""


def _run(kind: str, *signals: int, timeout: float = 0, grace: float = 10) -> tuple[int, str, float]:
    arguments = [sys.executable, "-c", SCRIPT, kind, str(timeout), str(grace)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        start = time.monotonic()
        for number, sent in enumerate(signals):
            time.sleep(0.2 if number else 0)
            process.send_signal(sent)
        output = process.stdout.read()
        code = process.wait(30)
    return code, output, time.monotonic() - start


@pytest.mark.parametrize("kind", ["sleeps", "blocks", "child"])
def test_ctrl_c_runs_the_recipes_finally(kind: str) -> None:
    code, output, seconds = _run(kind, signal.SIGINT)
    assert code == 130
    assert "finally" in output
    assert "Traceback" not in output
    assert seconds < 10


def test_sigterm() -> None:
    code, output, _ = _run("sleeps", signal.SIGTERM)
    assert (code, "finally" in output) == (143, True)


@pytest.mark.parametrize("kind", ["sleeps", "blocks"])
def test_the_time_limit(kind: str) -> None:
    code, output, seconds = _run(kind, timeout=0.3)
    assert (code, "finally" in output) == (124, True)
    assert seconds < 10


def test_ctrl_c_twice_ends_at_once() -> None:
    code, output, seconds = _run("stubborn", signal.SIGINT, signal.SIGINT)
    assert code == 130
    assert "last words 130" in output
    assert seconds < 2


def test_a_recipe_that_does_not_stop_is_ended() -> None:
    code, output, seconds = _run("stubborn", signal.SIGTERM, grace=1)
    assert code == 143
    assert "last words 143" in output
    assert 0.9 < seconds < 8


@pytest.mark.parametrize(("sent", "expected"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_recipe_that_saves_has_the_time_for_it(sent: int, expected: int) -> None:
    code, output, seconds = _run("saves", sent, grace=1)
    assert code == expected
    assert "saved" in output and "finally" in output and "last words" not in output
    assert 2 <= seconds < 8


def test_a_recipe_that_does_not_save_in_time_is_cancelled() -> None:
    code, output, seconds = _run("impatient", signal.SIGTERM)
    assert (code, "finally" in output) == (75, True)
    assert seconds < 5


def test_while_it_saves_the_second_signal_still_ends_it_at_once() -> None:
    code, output, seconds = _run("saves", signal.SIGTERM, signal.SIGTERM)
    assert (code, "saved" in output) == (75, False)
    assert seconds < 2
