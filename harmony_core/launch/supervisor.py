"""Starts, watches and ends the ranks of a launch. It does not depend on the client, so it also runs with fake ranks.

It detects the first failure from three signals: the end of a rank's socket (immediate), the launcher's exit (the
fallback), and a beat every second that distinguishes a stuck rank from a dead one. The first failure ends the engine:
every pending and later call raises it.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import os
import secrets
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from harmony_core import __version__
from harmony_core.errors import EngineError, HarmonyError, LauncherDied, RankDied, RankError, ResourceError
from harmony_core.launch import diagnosis
from harmony_core.launch.diagnosis import TICK_SECONDS, RankHandle, Watch
from harmony_core.launch.launcher import Launch
from harmony_core.launch.processes import LaunchedProcesses, private_directory, wait_for
from harmony_core.options import INIT_TIMEOUT, EngineOptions
from harmony_core.rpc import platform
from harmony_core.rpc.connection import Answer, Connection, Listener, RankStore
from harmony_core.rpc.protocol import PROTOCOL_VERSION, Beat, Event, Hello, Message, Shutdown
from harmony_core.rpc.rank_channel import PhaseNote

__all__ = ["RankHandle", "Supervisor"]

READY_EVENT = "rank_ready"
_SETTLE_SECONDS = 2.0
_POLL_SECONDS = 0.05


class Supervisor(Listener):
    """One launch. `failure` resolves to the first failure; `on_event` receives the ranks' events."""

    def __init__(self, options: EngineOptions, launch: Launch, on_event: Callable[[int, Event], None]) -> None:
        loop = asyncio.get_running_loop()
        self.options = options
        self.failure: asyncio.Future[HarmonyError] = loop.create_future()
        self._launch = launch
        self._on_event = on_event
        self._directory = private_directory.create()
        self._token = secrets.token_hex(32)
        self._server: asyncio.Server | None = None
        self._processes = LaunchedProcesses(options, launch)
        self._handles: dict[int, RankHandle] = {}
        self._store = RankStore()
        self._all_ready: asyncio.Future[None] = loop.create_future()
        self._stopping = False
        self._stop: asyncio.Task[None] | None = None
        self._patience = math.inf
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch = Watch(options, self._handles, self._log_of)
        self._oom_kills = platform.oom_kills()
        self._ended: list[RankHandle] = []
        """Ranks whose end was seen, in the order in which it was seen."""

    @classmethod
    async def start(cls, options: EngineOptions, launch: Launch, on_event: Callable[[int, Event], None]) -> Supervisor:
        """Start the launcher and return. Call on the main thread: when it ends, the kernel ends the ranks."""
        self = cls(options, launch, on_event)
        try:
            path = self._directory / "s"
            loop = asyncio.get_running_loop()
            # Two calls: if one call were cancelled while it begins to serve, the open socket would be lost.
            self._server = await loop.create_unix_server(lambda: Connection(self), str(path), start_serving=False)
            os.chmod(path, 0o600)
            await self._server.start_serving()
            environment = {"ADAPTIVE_RANK_SOCKET": str(path), "ADAPTIVE_RANK_TOKEN": self._token}
            self._processes.spawn(self._directory, environment)
        except BaseException as error:
            await self.stop(0)
            if isinstance(error, OSError):
                raise ResourceError(f"cannot start the ranks: {error}") from error
            raise
        for work in (self._watch_launcher(), self._watch_start(), self._watch_ranks()):
            self._background(work)
        return self

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._launch.world_size

    async def ready(self) -> list[RankHandle]:
        """Wait until every rank takes requests. Returns the ranks in order; raises the failure that prevented it."""
        await asyncio.shield(self._all_ready)
        return [self._handles[rank] for rank in range(self.world_size)]

    def hello(self, connection: Connection, message: Hello) -> None:
        """A process presents itself as a rank. It is accepted if it knows the token."""
        if not hmac.compare_digest(message.token.encode(), self._token.encode()):
            connection.close()
            return
        if reason := self._misfit(connection, message):
            error = ResourceError(f"rank {message.rank} does not fit this run: {reason}")
            connection.refuse(error)
            self._fail(error)
            return
        connection.accept()
        connection.hold_error = self._hold_error
        note = PhaseNote(self._directory / "s", message.rank)
        self._handles[message.rank] = RankHandle(connection, message, note, asyncio.get_running_loop().time())

    def _misfit(self, connection: Connection, hello: Hello) -> str:
        if (hello.protocol, hello.version) != (PROTOCOL_VERSION, __version__):
            theirs = f"harmony-core {hello.version} (protocol {hello.protocol})"
            return f"it runs {theirs}, the driver {__version__} (protocol {PROTOCOL_VERSION})"
        if hello.world_size != self.world_size:
            return f"it was started as one of {hello.world_size}, {self.world_size} ranks were asked for"
        if hello.rank not in range(self.world_size) or hello.rank in self._handles:
            return f"rank {hello.rank} of {self.world_size} is not free"
        if connection.peer_pid not in (0, hello.pid):
            return f"it says it is process {hello.pid}, the kernel says {connection.peer_pid}"
        other = next((h for h in self._handles.values() if h.torch_version != hello.torch), None)
        return f"it has torch {hello.torch}, rank {other.rank} has {other.torch_version}" if other else ""

    def event(self, connection: Connection, message: Message) -> None:
        """A beat, or something for the event log."""
        handle = self._handle_of(connection)
        if isinstance(message, Beat):
            handle.beat, handle.last_beat = message, asyncio.get_running_loop().time()
        elif isinstance(message, Event):
            if message.type == READY_EVENT:
                handle.ready = True
                complete = len(self._handles) == self.world_size and all(h.ready for h in self._handles.values())
                if complete and not self._all_ready.done():
                    self._close_door()
                    self._all_ready.set_result(None)
            self._on_event(handle.rank, message)

    def asked(self, connection: Connection, message: Message, answer: Answer) -> None:
        """A rank uses the store through which ranks find each other."""
        self._store.ask(message, answer)

    def _close_door(self) -> None:
        """Accept no more connections, and remove the directory, so that a later kill leaves no files behind."""
        if self._server is not None:
            self._server.close()
        private_directory.remove(self._directory)

    async def _watch_start(self) -> None:
        await asyncio.wait([self._all_ready], timeout=INIT_TIMEOUT)
        late = [handle for _, handle in sorted(self._watch.ranks.items()) if not handle.ready]
        if not self._all_ready.done() and late:
            text = f"not all ranks were ready within {INIT_TIMEOUT:g} s: "
            error = await self._watch.diagnose(late, text)
            if error is not None and not self._stopping and not self._all_ready.done():
                self._fail(error)

    def fatal(self, connection: Connection, error: HarmonyError) -> None:
        """A rank reports that it cannot continue."""
        handle = self._handle_of(connection)
        handle.error = error
        self._incident(handle)

    def lost(self, connection: Connection, reason: str) -> None:
        """A socket is closed. For a rank, this means that it is dead."""
        handle = next((h for h in self._handles.values() if h.connection is connection), None)
        if handle is None or handle.lost:
            return
        handle.lost = True
        if reason:
            error = RankError(f"rank {handle.rank} (pid {handle.pid}) sent {reason}", rank=handle.rank, pid=handle.pid)
            handle.error = handle.error or error
        self._incident(handle)

    def _incident(self, handle: RankHandle) -> None:
        if self._stopping or self.failure.done() or handle in self._ended:
            return
        self._ended.append(handle)
        if len(self._ended) == 1:
            self._background(self._judge())

    async def _judge(self) -> None:
        """Find the rank that ended first, by itself. Ranks are examined in the order in which their end was seen.

        If an end follows from another rank's, wait a while for that one to show.
        """
        loop = asyncio.get_running_loop()
        judged, deadline = 0, math.inf
        while loop.time() < deadline:
            if judged == len(self._ended):
                await asyncio.sleep(_POLL_SECONDS)
            else:
                handle = self._ended[judged]
                handle.follows = await self._cause(handle)
                if not handle.follows:
                    break
                judged, deadline = judged + 1, loop.time() + _SETTLE_SECONDS
            if self._stopping or self.failure.done() or self._died_unheard_of():
                return
        else:
            handle = self._ended[0]
        if platform.is_ending(self._processes.launcher_pid):
            await wait_for(self._processes.launcher_gone, _SETTLE_SECONDS)
        signalled = diagnosis.launcher_signal(self._processes.launcher_status(), self._processes.log)
        if handle.error is None and signalled:
            self._launcher_died(-signalled)
        else:
            self._fail(self._describe(handle))

    async def _cause(self, handle: RankHandle) -> str:
        """The cause of a rank's end, if it is a consequence of another failure; "" if the rank ended by itself."""
        await self._processes.written(self._log_of(handle.rank))
        if handle.error is not None:
            return "its connection to another rank broke" if diagnosis.is_collateral_error(handle.error) else ""
        await self._processes.written(self._processes.log)
        handle.status = await diagnosis.exit_status(handle.process, self._processes.log)
        return await diagnosis.follows_from(handle.process, handle.status, self._processes.log)

    def _died_unheard_of(self) -> bool:
        """Fail for a rank that the launcher reports dead and that never connected, if there is one."""
        reported = diagnosis.reported_failure(self._processes.log)
        if reported is None or reported.rank in self._handles:
            return False
        lines = diagnosis.excerpt(self._processes.log)
        words = self._in_words(reported.status)
        text = f"rank {reported.rank} (pid {reported.pid or 'unknown'}) died before it reached the driver: {words}"
        where: dict[str, Any] = {"rank": reported.rank, "pid": reported.pid, "status": reported.status}
        shown = diagnosis.shown(self._processes.log, lines)
        self._fail(RankDied(text + shown, cause=words, phase="starting", log=lines, **where))
        return True

    def _in_words(self, status: int | None) -> str:
        return diagnosis.in_words(status, platform.oom_kills() - self._oom_kills)

    def _describe(self, handle: RankHandle) -> HarmonyError:
        log = self._log_of(handle.rank)
        lines = diagnosis.last_lines(log)
        where: dict[str, Any] = {"rank": handle.rank, "pid": handle.pid, "phase": handle.phase, "log": lines}
        if handle.error is not None:
            error = handle.error
            if isinstance(error, EngineError):
                error.details = where | error.details
                error.hint = error.hint or f"the whole output of rank {handle.rank} is in {log}"
                if handle.follows:
                    error.message += f" ({handle.follows}; what came before is not known)"
            return error
        alive = handle.process.alive()
        cause = "closed its connection, and runs on" if alive else self._in_words(handle.status)
        if handle.follows:
            cause += f" ({handle.follows}; what came before is not known)"
        text = f"rank {handle.rank} (pid {handle.pid}) died {handle.where()}: {cause}"
        return RankDied(text + diagnosis.shown(log, lines), cause=cause, status=handle.status, **where)

    def _hold_error(self, error: HarmonyError) -> float:
        """Seconds to hold back a call's error that follows from another rank's failure, until that failure shows."""
        return _SETTLE_SECONDS if diagnosis.is_collateral_error(error) else 0.0

    def _launcher_died(self, status: int) -> None:
        lines = diagnosis.excerpt(self._processes.log)
        text = f"the launcher of the ranks {self._in_words(status)}"
        self._fail(LauncherDied(text + diagnosis.shown(self._processes.log, lines), status=status, log=lines))

    def _fail(self, error: HarmonyError) -> None:
        """End the engine: every waiting call raises `error`, and the processes are ended."""
        if self.failure.done():
            return
        self.failure.set_result(error)
        self._fail_waiters(error)
        if not self._stopping:
            self._background(self._end_processes())

    def _fail_waiters(self, error: HarmonyError) -> None:
        if not self._all_ready.done():
            self._all_ready.set_exception(error)
            self._all_ready.exception()  # marks it as retrieved, if no call awaits it
        for handle in self._handles.values():
            handle.connection.fail(error)

    async def _watch_launcher(self) -> None:
        """The fallback: the launcher has ended without its ranks, or before they are known."""
        while not self.failure.done():
            await asyncio.sleep(_POLL_SECONDS)
            status = self._processes.launcher_status()
            if status is None:
                if self._processes.reader_died():
                    self._fail(LauncherDied("the process that keeps the ranks' output has ended"))
                continue
            await self._processes.written(self._processes.log)
            if self._handles:  # a rank's end just before or with it explains more, and comes soon
                await wait_for(lambda: bool(self._ended), 0.2 if status < 0 else 2 * _SETTLE_SECONDS)
            if self._ended:
                await asyncio.wait([self.failure], timeout=5 * _SETTLE_SECONDS)
            if not self._died_unheard_of():
                self._launcher_died(status)

    async def _watch_ranks(self) -> None:
        while not self.failure.done():
            await asyncio.sleep(TICK_SECONDS)
            if len(self._handles) < self.world_size:
                processes = await asyncio.to_thread(self._processes.of_ranks)
                self._watch.look(processes, self._processes.launcher_pid)
            for rank, silent in self._watch.newly_silent():
                self._on_event(rank, Event(type="rank_silent", data={"seconds": silent}))
            stuck = self._watch.stuck()
            if stuck and not self._stopping:
                error = await self._watch.diagnose(stuck)
                if error is not None and not self._stopping:
                    self._fail(error)

    async def stop(self, grace: float = 10.0) -> None:
        """Ask the ranks to leave, for at most `grace` seconds, then end all processes of the launch.

        A second call with less grace shortens the first. Cancelling a caller does not stop it.
        """
        self._patience = min(self._patience, asyncio.get_running_loop().time() + grace)
        if self._stop is None:
            self._stopping = True
            self._stop = asyncio.get_running_loop().create_task(self._stop_ladder())
        await asyncio.shield(self._stop)

    async def _stop_ladder(self) -> None:
        if self._all_ready.done() and not self.failure.done():
            for handle in self._handles.values():
                handle.connection.submit(Shutdown())
            clock, handles = asyncio.get_running_loop().time, self._handles.values()
            await wait_for(lambda: all(h.lost for h in handles) or clock() >= self._patience, math.inf)
            if not any(handle.process.alive() for handle in self._handles.values()):
                await wait_for(self._processes.launcher_gone, 1.0)
        self._fail_waiters(EngineError("the engine is stopped"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await self._end_processes()
        finally:
            for handle in self._handles.values():
                handle.close()
            self._close_door()

    def kill(self) -> None:
        """End everything at once, for callers without a running event loop."""
        self._stopping = True
        self._processes.kill()
        self._close_door()

    async def _end_processes(self) -> None:
        await self._processes.end(handle.process for handle in self._handles.values())

    def _log_of(self, rank: int) -> Path:
        return self.options.log_dir / f"rank-{rank}.log"

    def _handle_of(self, connection: Connection) -> RankHandle:
        return next(handle for handle in self._handles.values() if handle.connection is connection)

    def _background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
