"""The processes of one launch: started with a mark in their environment, and ended by it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from harmony_core.errors import EngineError
from harmony_core.launch.launcher import Launch, LaunchOptions, launch_command, launch_environment
from harmony_core.rpc.platform import ProcessHandle, processes_with

MARK = "ADAPTIVE_RANK_LAUNCH"
"""Environment variable that every process of one launch has, and no other process: only those are ever ended."""

_TERM_SECONDS = 2.0
_KILL_SECONDS = 5.0


class LaunchedProcesses:
    """The launcher and whatever came of it. `log` takes the launcher's own output."""

    def __init__(self, options: LaunchOptions, launch: Launch) -> None:
        self.log = options.log_dir / "launcher.log"
        self._options = options
        self._launch = launch
        self._id = secrets.token_hex(16)
        self._launcher: subprocess.Popen[bytes] | None = None

    def spawn(self, directory: Path, environment: dict[str, str]) -> None:
        """Start the launcher in its own session, so that a terminal's Ctrl-C does not reach it."""
        self._options.log_dir.mkdir(parents=True, exist_ok=True)
        stub = [sys.executable, "-P", "-m", "harmony_core.launch.stub", str(os.getpid())]
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        try:
            self._launcher = subprocess.Popen(
                stub + launch_command(self._options, self._launch, directory),
                env=launch_environment(self._options, self._launch, os.environ) | environment | {MARK: self._id},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        finally:
            os.close(log)

    @property
    def launcher_pid(self) -> int:
        """0 before it was started."""
        return self._launcher.pid if self._launcher is not None else 0

    def launcher_status(self) -> int | None:
        """Exit status of the launcher, negative for a signal; None while it runs or was not started."""
        return self._launcher.poll() if self._launcher is not None else None

    def launcher_gone(self) -> bool:
        """Whether there is no launcher (any more)."""
        return self._launcher is None or self._launcher.poll() is not None

    async def end(self, ranks: Iterable[ProcessHandle]) -> None:
        """SIGTERM to the launcher, then SIGKILL to whatever is left. Raises EngineError for what even that leaves."""
        ranks = list(ranks)

        def gone() -> bool:
            return self.launcher_gone() and not any(rank.alive() for rank in ranks)

        if self._launcher is not None and not self.launcher_gone():
            self._launcher.send_signal(signal.SIGTERM)
            await wait_for(gone, _TERM_SECONDS)
        deadline = asyncio.get_running_loop().time() + _KILL_SECONDS
        while self._kill_marked(ranks):
            if asyncio.get_running_loop().time() > deadline:
                pids = ", ".join(map(str, processes_with(MARK, self._id)))
                raise EngineError(
                    f"processes that even SIGKILL does not end: {pids}", hint="the kernel waits for a device"
                )
            await asyncio.sleep(0.02)

    def _kill_marked(self, ranks: list[ProcessHandle]) -> bool:
        """SIGKILL whatever is left. Returns whether there was anything."""
        marked = [ProcessHandle(pid) for pid in processes_with(MARK, self._id)]
        left = [process for process in marked + ranks if process.alive()]
        for process in left:
            process.send(signal.SIGKILL)
        for process in marked:
            process.close()
        if self._launcher is not None and not self.launcher_gone():
            self._launcher.kill()
        for rank in ranks:
            with contextlib.suppress(ChildProcessError):  # ours to collect only where we are process 1
                os.waitpid(rank.pid, os.WNOHANG)
        return bool(left) or not self.launcher_gone()


async def wait_for(done: Callable[[], bool], seconds: float) -> None:
    """Look every 10 ms until `done`, for at most so long."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not done() and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.01)
