"""Starts the ranks, watches them, says what went wrong first, and leaves nothing behind.

Three signals, none enough alone: a socket's end (at once), the launcher's exit (the fallback), and a beat every second
that tells stuck from dead. One failure ends the engine: every call, pending or later, gets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from harmony_core import __version__
from harmony_core.errors import EngineError, HarmonyError, LauncherDied, RankDied, ResourceError
from harmony_core.launch import postmortem, private_directory
from harmony_core.launch.launcher import Launch, LaunchOptions, launch_command, launch_environment, resolve
from harmony_core.launch.liveness import TICK_SECONDS, Watch
from harmony_core.launch.rank_handle import RankHandle
from harmony_core.rpc import platform
from harmony_core.rpc.connection import Connection, Listener
from harmony_core.rpc.protocol import PROTOCOL_VERSION, Beat, Event, Hello, Message, Shutdown
from harmony_core.rpc.wire import WireError

__all__ = ["RankHandle", "Supervisor"]

READY_EVENT = "rank_ready"
LAUNCH_ID = "ADAPTIVE_RANK_LAUNCH"
"""Environment variable that marks every process of one launch, and no other process."""

_HELLO_SECONDS = 10.0
_SETTLE_SECONDS = 2.0
_POLL_SECONDS = 0.05
_MAX_STARTS = 3
_PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)


class Supervisor(Listener):
    """One launch. `failure` resolves to the first failure, whatever it was; `on_event` gets the ranks' events."""

    def __init__(self, options: LaunchOptions, launch: Launch, on_event: Callable[[int, Event], None]) -> None:
        loop = asyncio.get_running_loop()
        self.options = options
        self.failure: asyncio.Future[HarmonyError] = loop.create_future()
        self._launch = launch
        self._on_event = on_event
        self._directory = private_directory.create()
        self._token = secrets.token_hex(32)
        self._launch_id = secrets.token_hex(16)
        self._server: asyncio.Server | None = None
        self._launcher: subprocess.Popen[bytes] | None = None
        self._handles: dict[int, RankHandle] = {}
        self._all_ready: asyncio.Future[None] = loop.create_future()
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch = Watch(options, self._handles, self._log_of)
        self._oom_kills = platform.oom_kills()

    @classmethod
    async def start(cls, options: LaunchOptions, on_event: Callable[[int, Event], None]) -> Supervisor:
        """Start the launcher and return; call on the main thread, with whose end the kernel ends the ranks.

        Raises ConfigError, ResourceError, NotFoundError for options that cannot be.
        """
        launch = resolve(options.num_processes, options.device, options.accelerate_config)
        self = cls(options, launch, on_event)
        try:
            path = self._directory / "s"
            self._server = await asyncio.get_running_loop().create_unix_server(lambda: Connection(self), str(path))
            os.chmod(path, 0o600)
            self._spawn()
        except BaseException:
            await self.stop(0)
            raise
        for work in (self._watch_launcher(), self._watch_start(), self._watch_ranks()):
            self._background(work)
        return self

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._launch.world_size

    @property
    def device(self) -> str:
        """ "cpu" or "cuda"."""
        return self._launch.device

    async def ready(self) -> list[RankHandle]:
        """Wait until every rank takes requests; the ranks in order. Raises the failure that prevented it."""
        await asyncio.shield(self._all_ready)
        return [self._handles[rank] for rank in range(self.world_size)]

    # --- start ------------------------------------------------------------------------------------------------

    def _spawn(self) -> None:
        """Start the launcher in its own session: a terminal's Ctrl-C does not reach it."""
        self.options.log_dir.mkdir(parents=True, exist_ok=True)
        environment = launch_environment(self.options, self._launch, os.environ)
        environment |= {
            LAUNCH_ID: self._launch_id,
            "ADAPTIVE_RANK_SOCKET": str(self._directory / "s"),
            "ADAPTIVE_RANK_TOKEN": self._token,
        }
        stub = [sys.executable, "-P", "-m", "harmony_core.launch.stub", str(os.getpid())]
        log = os.open(self._launcher_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._launcher = subprocess.Popen(
                stub + launch_command(self.options, self._launch, self._directory),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        finally:
            os.close(log)

    def hello(self, connection: Connection, message: Hello) -> None:
        """A process says that it is a rank of ours; believe it if it knows the token."""
        if not hmac.compare_digest(message.token.encode(), self._token.encode()):
            connection.close()
            return
        reason = self._misfit(connection, message)
        if reason:
            error = ResourceError(f"rank {message.rank} does not fit this run: {reason}")
            connection.refuse(error)
            self._fail(error)
            return
        connection.accept()
        connection.hold_error = self._hold_error
        self._handles[message.rank] = RankHandle(connection, message, asyncio.get_running_loop().time())

    def _misfit(self, connection: Connection, hello: Hello) -> str:
        if hello.protocol != PROTOCOL_VERSION or hello.version != __version__:
            theirs = f"harmony-core {hello.version} (protocol {hello.protocol})"
            return f"it runs {theirs}, the driver {__version__} (protocol {PROTOCOL_VERSION})"
        if hello.world_size != self.world_size:
            return f"it was started as one of {hello.world_size}, {self.world_size} ranks were asked for"
        if not 0 <= hello.rank < self.world_size or hello.rank in self._handles:
            return f"rank {hello.rank} of {self.world_size} is not free"
        if connection.peer_pid not in (0, hello.pid):
            return f"it says it is process {hello.pid}, the kernel says {connection.peer_pid}"
        other = next((h for h in self._handles.values() if h.torch_version != hello.torch), None)
        return f"it has torch {hello.torch}, rank {other.rank} has {other.torch_version}" if other else ""

    def event(self, connection: Connection, message: Message) -> None:
        """A beat, or something for the event log."""
        handle = self._handle_of(connection)
        if isinstance(message, Beat):
            handle.note_beat(message, asyncio.get_running_loop().time())
        elif isinstance(message, Event):
            if message.type == READY_EVENT:
                handle.ready = True
                self._check_ready()
            self._on_event(handle.rank, message)

    def _check_ready(self) -> None:
        complete = len(self._handles) == self.world_size and all(h.ready for h in self._handles.values())
        if complete and not self._all_ready.done():
            self._close_door()
            self._all_ready.set_result(None)

    def _close_door(self) -> None:
        """Take no more connections. Nothing on disk is needed from here on, so that a kill leaves nothing there."""
        if self._server is not None:
            self._server.close()
        private_directory.remove(self._directory)

    async def _watch_start(self) -> None:
        await asyncio.wait([self._all_ready], timeout=self.options.init_timeout)
        if not self._all_ready.done():
            handles = {rank: self._handles.get(rank) for rank in range(self.world_size)}
            states = [
                f"rank {rank} {handle.where() if handle else 'was not heard of'}"
                for rank, handle in handles.items()
                if handle is None or not handle.ready
            ]
            lines = postmortem.last_lines(self._launcher_log)
            text = f"not all ranks were ready within {self.options.init_timeout:g} s: " + "; ".join(states)
            self._fail(LauncherDied(text + postmortem.shown(self._launcher_log, lines), log=lines))

    # --- failures ---------------------------------------------------------------------------------------------

    def fatal(self, connection: Connection, error: HarmonyError) -> None:
        """A rank reports that it cannot go on."""
        handle = self._handle_of(connection)
        handle.error = error
        self._incident(handle)

    def lost(self, connection: Connection, reason: str) -> None:
        """A socket is closed: of a rank, that is its death."""
        handle = next((h for h in self._handles.values() if h.connection is connection), None)
        if handle is None or handle.lost:
            return
        handle.lost = True
        if reason:
            error = WireError(f"rank {handle.rank} (pid {handle.pid}) sent {reason}", rank=handle.rank, pid=handle.pid)
            handle.error = handle.error or error
        self._incident(handle)

    def _incident(self, handle: RankHandle) -> None:
        if not (self._stopping or self.failure.done()):
            self._background(self._diagnose(handle))

    async def _diagnose(self, handle: RankHandle) -> None:
        """Find out why, and whether it was the first. An echo of another rank's failure gives that one time to show."""
        if handle.error is None:
            handle.status = await postmortem.exit_status(handle.process, self._launcher_log)
            collateral = postmortem.is_collateral_status(handle.status)
        else:
            collateral = postmortem.is_collateral_error(handle.error)
        if collateral:
            await asyncio.wait([self.failure], timeout=_SETTLE_SECONDS)
        if self._stopping or self.failure.done():
            return
        code = self._launcher.poll() if self._launcher else None
        if handle.error is None and code is not None and code < 0:
            self._launcher_died(code)
        else:
            self._fail(self._describe(handle))

    def _describe(self, handle: RankHandle) -> HarmonyError:
        log = self._log_of(handle.rank)
        lines = postmortem.last_lines(log)
        where: dict[str, Any] = {"rank": handle.rank, "pid": handle.pid, "phase": handle.phase, "log": lines}
        if handle.error is not None:
            error = handle.error
            if isinstance(error, EngineError):
                error.details = where | error.details
                error.hint = error.hint or f"the whole output of rank {handle.rank} is in {log}"
            return error
        if handle.process.alive():
            cause = "closed its connection, and runs on"
        else:
            cause = postmortem.in_words(handle.status, platform.oom_kills() - self._oom_kills)
        text = f"rank {handle.rank} (pid {handle.pid}) died {handle.where()}: {cause}"
        return RankDied(text + postmortem.shown(log, lines), cause=cause, status=handle.status, **where)

    def _hold_error(self, error: HarmonyError) -> float:
        """A call that failed because another rank did gets that rank's failure, if it shows soon."""
        return _SETTLE_SECONDS if postmortem.is_collateral_error(error) else 0.0

    def _launcher_died(self, code: int) -> None:
        words = postmortem.in_words(code, platform.oom_kills() - self._oom_kills)
        lines = postmortem.last_lines(self._launcher_log)
        text = f"the launcher of the ranks {words}"
        self._fail(LauncherDied(text + postmortem.shown(self._launcher_log, lines), status=code, log=lines))

    def _fail(self, error: HarmonyError) -> None:
        """The end of the engine: everybody who waits gets `error`, and the processes are ended."""
        if self.failure.done():
            return
        self.failure.set_result(error)
        if not self._all_ready.done():
            self._all_ready.set_exception(error)
            self._all_ready.exception()
        for handle in self._handles.values():
            handle.connection.fail(error)
        if not self._stopping:
            self._background(self._end_processes())

    async def _watch_launcher(self) -> None:
        """The fallback: a launcher that ends before its ranks are known, or without them."""
        starts = 1
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            assert self._launcher is not None
            code = self._launcher.poll()
            if code is None:
                continue
            if self._stopping or self.failure.done():
                return
            log = "\n".join(postmortem.last_lines(self._launcher_log))
            if not self._handles and starts < _MAX_STARTS and _PORT_TAKEN.search(log):
                starts += 1
                self._launcher_log.unlink(missing_ok=True)
                self._spawn()
                continue
            # Ranks that end with it, or just before it, are the better news; they report within moments.
            await asyncio.wait([self.failure], timeout=0.5 if code < 0 else 2 * _SETTLE_SECONDS)
            if not self._stopping:
                self._launcher_died(code)
            return

    async def _watch_ranks(self) -> None:
        while not self.failure.done():
            await asyncio.sleep(TICK_SECONDS)
            for rank, silent in self._watch.newly_silent():
                self._on_event(rank, Event(type="rank_silent", data={"seconds": silent}))
            stuck = self._watch.stuck()
            if stuck and not self._stopping:
                error = await self._watch.diagnose(stuck)
                if error is not None and not self._stopping:
                    self._fail(error)

    # --- stop -------------------------------------------------------------------------------------------------

    async def stop(self, grace: float = 10.0) -> None:
        """Ask the ranks to leave, for at most `grace` seconds, then end them. Nothing of the launch is left."""
        self._stopping = True
        if self._all_ready.done() and not self.failure.done() and grace > 0:
            for handle in self._handles.values():
                handle.submit(Shutdown())
            await self._wait(lambda: all(h.lost for h in self._handles.values()), grace)
            if not self._ranks_alive():
                await self._wait(lambda: self._launcher is None or self._launcher.poll() is not None, 1.0)
        self._fail(EngineError("the engine is stopped"))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._end_processes()
        for handle in self._handles.values():
            handle.connection.close()
            handle.process.close()
        self._close_door()

    async def _end_processes(self) -> None:
        """SIGTERM to the launcher, SIGKILL to whatever carries this launch's mark and is still there."""
        launcher = self._launcher
        if launcher is not None and launcher.poll() is None:
            launcher.send_signal(signal.SIGTERM)
            await self._wait(lambda: launcher.poll() is not None and not self._ranks_alive(), 2.0)
        for _ in range(20):
            marked = [platform.ProcessHandle(pid) for pid in platform.processes_with(LAUNCH_ID, self._launch_id)]
            left = [process for process in marked if process.alive()]
            for process in left:
                process.send(signal.SIGKILL)
            if launcher is not None and launcher.poll() is None:
                launcher.kill()
            for handle in self._handles.values():
                handle.process.send(signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):  # ours to collect only if we are process 1
                    os.waitpid(handle.pid, os.WNOHANG)
            await self._wait(lambda: launcher is None or launcher.poll() is not None, 1.0)
            for process in marked:
                process.close()
            if not left and not self._ranks_alive():
                return
            await asyncio.sleep(_POLL_SECONDS)

    def _ranks_alive(self) -> bool:
        return any(handle.process.alive() for handle in self._handles.values())

    async def _wait(self, done: Callable[[], bool], seconds: float) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while not done() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)

    # --- small things -----------------------------------------------------------------------------------------

    @property
    def _launcher_log(self) -> Path:
        return self.options.log_dir / "launcher.log"

    def _log_of(self, rank: int) -> Path:
        return self.options.log_dir / f"rank-{rank}.log"

    def _handle_of(self, connection: Connection) -> RankHandle:
        return next(handle for handle in self._handles.values() if handle.connection is connection)

    def _background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
