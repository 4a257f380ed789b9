"""The processes of one launch, marked in their environment so that they can be ended, and its temporary directory."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from harmony_core.errors import EngineError, storing
from harmony_core.launch.launcher import Launch, launch_command, launch_environment
from harmony_core.launch.pump import PIPE_BYTES
from harmony_core.options import EngineOptions
from harmony_core.plain_files import is_locked, try_lock
from harmony_core.redaction import Redactor
from harmony_core.rpc.platform import start_time

LAUNCHER = "launcher"
MARK = "ADAPTIVE_RANK_LAUNCH"
"""Environment variable set in all processes of one launch and in no other process. Only these are ever ended."""

_TERM_SECONDS = 2.0
_KILL_SECONDS = 5.0
_WRITTEN_SECONDS = 1.0


class PrivateDirectories:
    """The directories of this process's launches: socket, the launcher's configuration, torch elastic's files.

    They are outside the run's directory, because the path of a socket has at most about 100 bytes. A launch removes its
    directory as soon as all ranks are connected; the next launch removes directories left behind by a killed driver. An
    engine without a run also has a directory here for its logs.
    """

    _prefix, _owner, _longest_base = "adaptive-", "owner", 64

    def __init__(self) -> None:
        self._own: set[Path] = set()

    def create(self) -> Path:
        """A new directory that only this user can enter."""
        base = self._base()
        for left in filter(self._abandoned, base.glob(self._prefix + "*")):
            self.remove(left)
        directory = Path(tempfile.mkdtemp(prefix=self._prefix, dir=base))
        self._own.add(directory)
        (directory / self._owner).write_text(f"{os.getpid()} {start_time(os.getpid())}")
        return directory

    def remove(self, *directories: Path) -> None:
        """Remove the directories that exist."""
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)
            self._own.discard(directory)

    def remove_own(self) -> None:
        """Remove all directories of this process, for an end without further cleanup."""
        self.remove(*self._own)

    def _base(self) -> Path:
        """XDG_RUNTIME_DIR if it is ours and short enough, else /tmp regardless of TMPDIR: paths must stay short."""
        runtime = os.environ.get("XDG_RUNTIME_DIR", "")
        if runtime and len(os.fsencode(runtime)) <= self._longest_base and os.access(runtime, os.W_OK | os.X_OK):
            status = os.stat(runtime)
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                return Path(runtime)
        return Path("/tmp") if os.access("/tmp", os.W_OK) else Path(tempfile.gettempdir())

    def _abandoned(self, directory: Path) -> bool:
        """Whether the directory is ours, and the process that made it has certainly ended."""
        with contextlib.suppress(OSError, ValueError):
            status = directory.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                pid, started = (directory / self._owner).read_text().split(" ")
                return bool(started) and start_time(int(pid)) != started
        return False


private_directory = PrivateDirectories()


class ProcessHandle:
    """One process, identified by pid and start time, since a later process may have the same pid."""

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
    """Pids of processes started with `variable=value`, each with its environment."""
    found = {process.pid: process.info["environ"] or {} for process in psutil.process_iter(["environ"])}
    return {pid: environment for pid, environment in found.items() if environment.get(variable) == value}


def start_reader(
    directory: Path, log_dir: Path, names: Iterable[str], secrets: Iterable[str]
) -> subprocess.Popen[bytes]:
    """Start the process that reads the output of these processes, "launcher" or "rank-N".

    Each has a pipe in `directory`, the launch's private one, and a log in `log_dir`. Raises OSError.
    """
    pairs: list[tuple[int, int]] = []
    with contextlib.ExitStack() as opened:
        for name in names:
            pipe = directory / f"{name}.out"
            pipe.unlink(missing_ok=True)
            os.mkfifo(pipe, 0o600)
            reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
            opened.callback(os.close, reading)
            with contextlib.suppress(OSError, AttributeError):  # Linux only, and limited per user
                fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            anew = os.O_TRUNC if name == LAUNCHER else 0
            log = os.open(log_dir / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | anew, 0o600)
            opened.callback(os.close, log)
            try_lock(log)  # not taken while the reader of an earlier attempt still writes
            pairs.append((reading, log))
        reader = subprocess.Popen(
            [sys.executable, "-P", "-m", "harmony_core.launch.pump"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[descriptor for pair in pairs for descriptor in pair],
            start_new_session=True,
        )
    assert reader.stdin is not None
    with contextlib.suppress(BrokenPipeError), reader.stdin as stdin:
        stdin.write(json.dumps({"pairs": pairs, "secrets": list(secrets)}).encode())
    return reader


class LaunchedProcesses:
    """The launcher and its descendants. `log` receives the launcher's own output."""

    def __init__(self, options: EngineOptions, launch: Launch) -> None:
        self.log = options.log_dir / "launcher.log"
        self._options = options
        self._launch = launch
        self._id = secrets.token_hex(16)
        self._launcher: subprocess.Popen[bytes] | None = None
        self._reader: subprocess.Popen[bytes] | None = None

    def spawn(self, directory: Path, environment: dict[str, str]) -> None:
        """Start the launcher in its own session, so that a terminal's Ctrl-C does not reach it.

        Raises ResourceError if the logs cannot be written.
        """
        env = launch_environment(self._options, self._launch, os.environ)
        known = {*self._options.secrets, *Redactor.from_environment(env).values}
        names = [LAUNCHER, *(f"rank-{rank}" for rank in range(self._launch.world_size))]
        log_dir = self._options.log_dir
        with storing(f"cannot keep the output of the ranks in {log_dir}"):
            log_dir.mkdir(parents=True, exist_ok=True)
            self._reader = start_reader(directory, log_dir, names, known)
            output = os.open(directory / f"{LAUNCHER}.out", os.O_WRONLY | os.O_NONBLOCK)
        with os.fdopen(output, "wb", buffering=0) as stream:
            os.set_blocking(output, True)
            self._launcher = subprocess.Popen(
                launch_command(self._options, self._launch, directory),
                env=env | environment | {MARK: self._id},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def reader_died(self) -> bool:
        """Whether the launcher lives although the process that reads the ranks' output has ended."""
        return self._reader is not None and self._reader.poll() is not None and not self.launcher_gone()

    async def written(self, log: Path) -> None:
        """Wait until a log has all output of its process; only briefly, in case another process keeps the pipe open."""
        await wait_for(lambda: not is_locked(log), _WRITTEN_SECONDS)

    @property
    def launcher_pid(self) -> int:
        """The launcher's pid, 0 before it was started."""
        return self._launcher.pid if self._launcher is not None else 0

    def of_ranks(self) -> list[int]:
        """The process of each rank, in order; the launcher's for a rank without one."""
        marked = processes_with(MARK, self._id)
        marked.pop(self.launcher_pid, None)
        ranks = range(self._launch.world_size)
        alone = len(ranks) == 1  # a single rank has no number in its environment
        own = [[pid for pid, env in marked.items() if alone or env.get("RANK") == str(rank)] for rank in ranks]
        return [min(pids, default=self.launcher_pid) for pids in own]

    def launcher_status(self) -> int | None:
        """Exit status of the launcher, negative for a signal; None while it runs or was not started."""
        return self._launcher.poll() if self._launcher is not None else None

    def launcher_gone(self) -> bool:
        """Whether the launcher has ended, or was not started."""
        return self._launcher is None or self._launcher.poll() is not None

    async def end(self, ranks: Iterable[ProcessHandle]) -> None:
        """Send SIGTERM to the launcher, then SIGKILL to the remaining processes. Raises EngineError if any survives."""
        ranks = list(ranks)
        if self._launcher is not None and not self.launcher_gone():
            self._launcher.terminate()
            await wait_for(lambda: self.launcher_gone() and not any(rank.alive() for rank in ranks), _TERM_SECONDS)
        deadline = asyncio.get_running_loop().time() + _KILL_SECONDS
        while self._kill_marked(ranks):
            if asyncio.get_running_loop().time() > deadline:
                pids = ", ".join(map(str, processes_with(MARK, self._id)))
                raise EngineError(
                    f"processes that even SIGKILL does not end: {pids}", hint="the kernel waits for a device"
                )
            await asyncio.sleep(0.02)
        # The reader ends by itself when everything is written.
        await wait_for(lambda: self._reader is None or self._reader.poll() is not None, _KILL_SECONDS)

    def kill(self) -> None:
        """Send SIGKILL to the remaining processes, and wait only for the launcher and the reader to end."""
        self._kill_marked([])
        for process in filter(None, (self._launcher, self._reader)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_TERM_SECONDS)

    def _kill_marked(self, ranks: list[ProcessHandle]) -> bool:
        """Send SIGKILL to the remaining processes. Returns whether there were any."""
        left = [p for p in [*map(ProcessHandle, processes_with(MARK, self._id)), *ranks] if p.alive()]
        for process in left:
            process.send(signal.SIGKILL)
        if self._launcher is not None and not self.launcher_gone():
            self._launcher.kill()
        for rank in ranks:
            with contextlib.suppress(ChildProcessError):  # we can collect it only as process 1
                os.waitpid(rank.pid, os.WNOHANG)
        return bool(left) or not self.launcher_gone()


async def wait_for(done: Callable[[], bool], seconds: float, every: float = 0.01) -> None:
    """Check `done` every `every` seconds until it holds, for at most `seconds`."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not done() and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(every)
