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

import psutil

from harmony_core.errors import EngineError, ResourceError
from harmony_core.launch import pump
from harmony_core.launch.launcher import Launch, launch_command, launch_environment
from harmony_core.options import EngineOptions
from harmony_core.plain_files import is_locked
from harmony_core.redaction import Redactor

MARK = "ADAPTIVE_RANK_LAUNCH"
"""Environment variable that every process of one launch has, and no other process: only those are ever ended."""

_TERM_SECONDS = 2.0
_KILL_SECONDS = 5.0
_WRITTEN_SECONDS = 1.0


class ProcessHandle:
    """One process, held by its number and start time, so that another one of that number is never meant."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._process: psutil.Process | None = None
        with contextlib.suppress(psutil.NoSuchProcess):
            self._process = psutil.Process(pid)

    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._process is not None and self._process.is_running():
                return self._process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return False

    def send(self, signal_number: int) -> None:
        """Signal it if it still runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._process is not None and self.alive():
                self._process.send_signal(signal_number)


def processes_with(variable: str, value: str) -> dict[int, dict[str, str]]:
    """Pids whose starting environment holds `variable=value`, each with that environment."""
    found = {process.pid: process.info["environ"] or {} for process in psutil.process_iter(["environ"])}
    return {pid: environment for pid, environment in found.items() if environment.get(variable) == value}


class LaunchedProcesses:
    """The launcher and whatever came of it. `log` takes the launcher's own output."""

    def __init__(self, options: EngineOptions, launch: Launch) -> None:
        self.log = options.log_dir / "launcher.log"
        self._options = options
        self._launch = launch
        self._id = secrets.token_hex(16)
        self._launcher: subprocess.Popen[bytes] | None = None
        self._readers: list[subprocess.Popen[bytes]] = []

    def spawn(self, directory: Path, environment: dict[str, str]) -> None:
        """Start the launcher in its own session, so that a terminal's Ctrl-C does not reach it.

        Raises ResourceError when the logs cannot be written.
        """
        stub = [sys.executable, "-P", "-m", "harmony_core.launch.stub", str(os.getpid())]
        env = launch_environment(self._options, self._launch, os.environ)
        known = {*self._options.secrets, *Redactor.from_environment(env).values}
        names = [pump.LAUNCHER, *(f"rank-{rank}" for rank in range(self._launch.world_size))]
        try:
            self._options.log_dir.mkdir(parents=True, exist_ok=True)
            self._readers.append(pump.start(directory, self._options.log_dir, names, known))
            output = os.open(pump.pipe_of(directory, pump.LAUNCHER), os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            raise ResourceError(
                f"cannot keep the output of the ranks in {self._options.log_dir}: {error.strerror or error}"
            ) from error
        os.set_blocking(output, True)
        try:
            self._launcher = subprocess.Popen(
                stub + launch_command(self._options, self._launch, directory),
                env=env | environment | {MARK: self._id},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        finally:
            os.close(output)

    def reader_died(self) -> bool:
        """Whether the ranks' output goes nowhere although the launcher lives."""
        return bool(self._readers) and self._readers[-1].poll() is not None and not self.launcher_gone()

    async def written(self, log: Path) -> None:
        """Wait until a log has everything that its process wrote; not for long where another keeps its pipe open."""
        await wait_for(lambda: not is_locked(log), _WRITTEN_SECONDS)

    @property
    def launcher_pid(self) -> int:
        """0 before it was started."""
        return self._launcher.pid if self._launcher is not None else 0

    def of_ranks(self) -> list[int]:
        """The process of each rank, in order; the launcher while there is none."""
        marked = processes_with(MARK, self._id)
        marked.pop(self.launcher_pid, None)
        ranks = range(self._launch.world_size)
        alone = len(ranks) == 1  # its process is not told its number
        own = [[pid for pid, env in marked.items() if alone or env.get("RANK") == str(rank)] for rank in ranks]
        return [min(pids, default=self.launcher_pid) for pids in own]

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
        # They end by themselves, when everything is written.
        await wait_for(lambda: all(reader.poll() is not None for reader in self._readers), _KILL_SECONDS)

    def kill(self) -> None:
        """SIGKILL to whatever is left; of its end only the launcher's is awaited."""
        self._kill_marked([])
        for process in (self._launcher, *self._readers):
            with contextlib.suppress(subprocess.TimeoutExpired):
                if process is not None:
                    process.wait(_TERM_SECONDS)

    def _kill_marked(self, ranks: list[ProcessHandle]) -> bool:
        """SIGKILL whatever is left. Returns whether there was anything."""
        marked = [ProcessHandle(pid) for pid in processes_with(MARK, self._id)]
        left = [process for process in marked + ranks if process.alive()]
        for process in left:
            process.send(signal.SIGKILL)
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
