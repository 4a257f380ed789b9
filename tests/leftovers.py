"""A session-wide check that no process, socket or temporary directory outlives the tests."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harmony_core.launch.processes import processes_with
from harmony_core.rpc.platform import state

SESSION = "ADAPTIVE_TEST_SESSION"


def running(variable: str, value: str) -> list[int]:
    """Live processes, other than this one, that were started with `variable=value`."""
    return [pid for pid in processes_with(variable, value) if pid != os.getpid() and state(pid) not in ("", "Z", "X")]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return ""


def wait_until(done: Callable[[], bool], seconds: float) -> bool:
    """Poll until `done()`; whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


async def until(done: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for a condition beside what the event loop has to do. Raises TimeoutError when it does not come true."""
    async with asyncio.timeout(seconds):
        while not done():
            await asyncio.sleep(0.01)


async def turns(count: int) -> None:
    """Let the event loop go round so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


def sockets_under(directory: Path) -> list[str]:
    """Paths of open unix sockets under a directory."""
    table = Path("/proc/net/unix")
    if not table.exists():
        return []
    return [line.split()[-1] for line in table.read_text().splitlines() if f" {directory}/" in line]


@pytest.fixture(scope="session", autouse=True)
def no_leftovers() -> Iterator[Path]:
    """Marks every process that the tests start, gives launches a directory of their own, and checks both at the end."""
    session = secrets.token_hex(8)
    directory = Path(tempfile.mkdtemp(prefix="at-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SESSION, session)
        patch.setenv("XDG_RUNTIME_DIR", str(directory))
        yield directory
    gc.collect()  # a grader's processes end with it
    wait_until(lambda: not running(SESSION, session), 5)
    processes = {pid: command_line(pid) for pid in running(SESSION, session)}
    sockets, left = sockets_under(directory), sorted(path.name for path in directory.iterdir())
    shutil.rmtree(directory, ignore_errors=True)
    assert not processes, f"processes left behind: {processes}"
    assert not sockets, f"sockets left open: {sockets}"
    assert not left, f"left in the runtime directory: {left}"
