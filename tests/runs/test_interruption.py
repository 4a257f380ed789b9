"""Signals and the time limit, with recipes that help and recipes that do not."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# A script, not a function: it is signalled as a process.
SCRIPT = """
import asyncio, sys, time
from harmony_core.errors import RankDied
from harmony_core.runs.interruption import Interruption

kind, _, under = sys.argv[1].partition("-")
timeout, grace = float(sys.argv[2]) or None, float(sys.argv[3])

async def recipe():
    print("go", flush=True)
    try:
        if kind in ("sleeps", "unheard", "impatient"):
            await asyncio.sleep(60)
        elif kind == "blocks":
            time.sleep(60)
        elif kind in ("saves", "brief"):
            while not stop.reason:
                await asyncio.sleep(0.05)
            with stop.saving():
                await asyncio.sleep(2 if kind == "saves" else 0.5)
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
    if under == "fault":
        asyncio.get_running_loop().call_later(0.1, stop.end_for, RankDied("rank 1 died"))
    await asyncio.wait([task])
    return stop.exit_code if task.cancelled() else 0

def say(text):
    print(text, flush=True)
    if kind == "unheard":
        raise OSError(5, "the terminal is gone")

with Interruption(timeout, say, grace) as stop:
    stop.last_words = lambda code: print("last words", code, flush=True)
    if kind in ("saves", "brief", "impatient"):
        stop.patience = lambda: 0.2 if kind == "impatient" else 5.0
        stop.resumable = lambda: True
    code = asyncio.run(main(stop))
sys.exit(code)
"""


def _run(
    kind: str, *signals: int, timeout: float = 0, grace: float = 10, under: tuple[str, ...] = ()
) -> tuple[int, str]:
    """Exit code and output; further signals are sent when the first is heard, or not waited for where it is ignored."""
    arguments = [*under, sys.executable, "-c", SCRIPT, kind, str(timeout), str(grace)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        output = ""
        for number, sent in enumerate(signals):
            while number and not under and "stopping" not in output:
                output += process.stdout.readline()
            process.send_signal(sent)
        output += process.stdout.read()
        code = process.wait(30)
    return code, output


@pytest.mark.parametrize("kind", ["sleeps", "blocks", "child"])
def test_ctrl_c_runs_the_recipes_finally(kind: str) -> None:
    code, output = _run(kind, signal.SIGINT)
    assert code == 130
    assert "finally" in output
    assert "Traceback" not in output
    assert "ended" not in output, "before the grace is over"


@pytest.mark.parametrize(("sent", "expected"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("kind", ["sleeps", "unheard"])
def test_sigterm_and_sighup(kind: str, sent: int, expected: int) -> None:
    code, output = _run(kind, sent)
    assert (code, "finally" in output) == (expected, True)


@pytest.mark.parametrize("others", [(signal.SIGHUP, signal.SIGHUP), (signal.SIGTERM,)])
def test_a_closing_terminal_and_what_comes_with_it_is_one_request(others: tuple[int, ...]) -> None:
    code, output = _run("brief", signal.SIGHUP, *others)
    assert (code, "saved" in output, "finally" in output) == (75, True, True)
    code, output = _run("brief", *others, signal.SIGHUP)
    assert (code, "saved" in output, "finally" in output) == (75, True, True)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_was_ignored_stays_ignored(number: int) -> None:
    ignoring = ("bash", "-c", f"trap '' {int(number)}; exec \"$@\"", "bash")
    other = signal.SIGINT if number == signal.SIGTERM else signal.SIGTERM
    code, output = _run("sleeps", number, number, other, under=ignoring)
    assert (code, "finally" in output, "ended" in output) == (130 if other == signal.SIGINT else 143, True, False)


def test_nohup() -> None:
    code, output = _run("brief", signal.SIGHUP, signal.SIGTERM, under=("nohup",))
    assert (code, "saved" in output, "SIGHUP" in output) == (75, True, False)


@pytest.mark.parametrize("kind", ["sleeps", "blocks"])
def test_the_time_limit(kind: str) -> None:
    code, output = _run(kind, timeout=0.3)
    assert (code, "finally" in output, "ended" in output) == (124, True, False)


@pytest.mark.parametrize(("kind", "last"), [("sleeps-fault", "finally"), ("saves-fault", "finally")])
def test_a_failed_engine_cancels_the_recipe_and_lets_it_save_nothing(kind: str, last: str) -> None:
    code, output = _run(kind)
    assert (code, last in output, "saved" in output) == (5, True, False)


def test_a_recipe_that_does_not_stop_for_a_failed_engine_is_ended() -> None:
    code, output = _run("stubborn-fault", grace=1)
    assert (code, "last words 5" in output) == (5, True)


def test_ctrl_c_twice_ends_at_once() -> None:
    code, output = _run("stubborn", signal.SIGINT, signal.SIGINT)
    assert code == 130
    assert "ended: asked twice\nlast words 130" in output


def test_a_recipe_that_does_not_stop_is_ended() -> None:
    code, output = _run("stubborn", signal.SIGTERM, grace=1)
    assert code == 143
    assert "ended: not stopped within 1 s\nlast words 143" in output


@pytest.mark.parametrize(("sent", "expected"), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)])
def test_a_recipe_that_saves_has_the_time_for_it(sent: int, expected: int) -> None:
    code, output = _run("saves", sent, grace=1)
    assert code == expected
    assert "saved" in output and "finally" in output and "last words" not in output


def test_a_recipe_that_does_not_save_in_time_is_cancelled() -> None:
    code, output = _run("impatient", signal.SIGTERM)
    assert (code, "finally" in output, "ended" in output) == (75, True, False)


def test_while_it_saves_the_second_signal_still_ends_it_at_once() -> None:
    code, output = _run("saves", signal.SIGTERM, signal.SIGTERM)
    assert (code, "saved" in output, "ended: asked twice" in output) == (75, False, True)


def test_a_run_whose_signal_thread_fails_ends() -> None:
    code = (
        "import time; from harmony_core.runs.interruption import Interruption\n"
        "class Broken(Interruption):\n"
        "    def _check(self): raise OverflowError('timeout is too large')\n"
        "with Broken(0.01, lambda text: print(text, flush=True)): time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 70
    assert "the thread that takes signals failed: OverflowError: timeout is too large" in done.stdout
