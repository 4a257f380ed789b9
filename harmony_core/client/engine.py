"""The driver's side of the ranks: the order of all requests, the ranks of each replica, and the promised memory."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from harmony_core.errors import ConflictError, HarmonyError, InternalError, ResourceError, UsageError
from harmony_core.launch.launcher import Launch, resolve
from harmony_core.launch.processes import private_directory
from harmony_core.launch.supervisor import RankHandle, Supervisor
from harmony_core.memory.ledger import Ledger, host_capacity, parse_assume
from harmony_core.notifiers import say
from harmony_core.options import EngineOptions
from harmony_core.registry import ModelVersion, Registry
from harmony_core.rpc.protocol import Cancel, Clone, Event, Load, Message, OptimStep, Regroup, Save, SetStep, Spawn

CUDA_BASELINE_BYTES = 1 << 30
"""Bytes of device memory that a rank uses before its first model: context, libraries, communication buffers."""
CUDA_USABLE = 0.95
"""Fraction of the free memory to plan with; torch's allocator keeps the rest in pieces too small to use."""


def find_machine(options: EngineOptions) -> tuple[Launch, Ledger]:
    """The ranks that the options and this machine (or the assumed one) give, and their memory, all of it free.

    Raises ResourceError, ConfigError.
    """
    if options.assume:
        _check_mode(options, "cuda")
        devices = parse_assume(options.assume)
        world_size = options.num_processes or len(devices)
        if world_size > len(devices):
            raise UsageError(f"--num-processes {world_size} on an assumed machine of {len(devices)} devices")
        return Launch("cuda", world_size), Ledger(devices[:world_size])
    launch = resolve(options.num_processes, options.device, options.accelerate_config)
    _check_mode(options, launch.device)
    if launch.device == "cpu":
        host = host_capacity(options.memory, ranks=launch.world_size)
        return launch, Ledger(host, ranks=launch.world_size)
    return launch, Ledger([min(b, options.memory or b) for b in cuda_free_bytes(launch.devices)])


def _check_mode(options: EngineOptions, device: str) -> None:
    if options.deterministic and device != "cpu":
        raise ResourceError(
            "--deterministic is for ranks on CPU: on CUDA sampler and trainer use kernels whose last bits differ",
            hint="--device cpu, or leave it out: optim_step's sampler_logprob_* metrics report the difference",
        )


def cuda_free_bytes(devices: list[str]) -> list[int]:
    """Free bytes of the named CUDA devices, as the driver's own tool reports them, less the cost of a process."""
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "-i", ",".join(devices)]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ResourceError("the memory of the CUDA devices cannot be read: nvidia-smi failed") from error
    return [max(0, int(int(line) * 2**20 * CUDA_USABLE) - CUDA_BASELINE_BYTES) for line in shown.split()]


Answer = TypeVar("Answer", bound=Message)
EventSink = Callable[[str, dict[str, Any], int | None], None]

FAILED = "engine.failed"
"""The type of the event that reports the failure that ended the engine."""

_CHANGES = (OptimStep, Load, SetStep)
"""Requests that change the weights of a model."""


class Request:
    """A request to one replica, already placed in the order. Await `future`; `cancel()` withdraws it."""

    def __init__(self, future: asyncio.Future[Message]) -> None:
        self.future = future
        self.handle: RankHandle | None = None
        self.call = 0
        self.cancelled = False

    def cancel(self) -> None:
        """Tell the replica that the answer is no longer needed. It still answers, when it is ready."""
        self.cancelled = True
        if self.handle is not None and not self.future.done():
            self.handle.connection.cast(Cancel(call=self.call))


class Engine:
    """Starts the ranks in the background and puts every request in order.

    All requests pass through one FIFO. It is held only while ranks are regrouped into larger domains: regrouping waits
    until no replica request is in flight, and requests that arrive meanwhile are sent afterwards, in order.
    """

    def __init__(self, options: EngineOptions, registry: Registry, events: EventSink) -> None:
        self.options = options
        self.registry = registry
        self.events = events
        self.launch, self.ledger = find_machine(options)
        self.spawns: dict[str, Spawn] = {}
        """By model name: every model that lives or is being made."""
        self.request_numbers: dict[str, int] = {}
        """By live model: the number of its next request that draws a seed."""
        self.unsaved: set[object] = set()
        """One entry for each model, live or freed, whose weights have changed since it was last saved."""
        self.tp_values: set[int] = set()
        self.planned: list[dict[str, Any]] = []
        self.planned_copies: dict[str, Spawn] = {}
        """By live model: its copy whose memory is promised and that is not made yet."""
        self.closing = contextlib.AsyncExitStack()
        """What is to be closed with the engine."""
        self._held_versions = contextlib.ExitStack()
        self._held_references: set[str] = set()
        self.spawn_order = asyncio.Lock()
        self._launching: asyncio.Task[Supervisor] | None = None
        self._ranks: list[RankHandle] = []
        self._domain_size = 1
        self._next_seq = 0
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._held: deque[Callable[[], None]] | None = None
        self._unchanged: dict[str, deque[Callable[[], None] | asyncio.Future[None]]] = {}
        """By model that is being saved: the requests and the further saves that wait for it."""
        self._closed = False

    @property
    def world_size(self) -> int:
        """Number of ranks, known before they are up."""
        return self.launch.world_size

    @property
    def compiles(self) -> bool:
        """Whether to compile layers, if a compiler is found."""
        return self.options.compile and self.launch.device == "cuda"

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def start(self) -> None:
        """Begin to start the ranks; returns at once. Does nothing in a dry run.

        The ranks are stopped when the last reference to this engine is gone; the watching tasks hold no reference.
        """
        if self.options.dry_run:
            return
        options = replace(self.options, cache=self.registry.home.cache / "compiled")
        loop, write = asyncio.get_running_loop(), self.events

        def on_event(rank: int, event: Event) -> None:
            write(event.type, event.data, rank)

        self._launching = loop.create_task(Supervisor.start(options, self.launch, on_event), name="start-ranks")
        # A failure is reported now, and raised by calls that need the ranks; without such a call it is no error.
        self._launching.add_done_callback(partial(_launched, write))
        logs = self.options.log_dir if self.options.temporary_logs else None
        weakref.finalize(self, _end_forgotten, loop, self._launching, self._held_versions, logs)

    async def ready(self) -> None:
        """Wait until every rank has reported. Raises RankDied or LauncherDied."""
        if self._closed or self._launching is None:
            raise ConflictError("the client is closed", hint="spawn and use models before close()")
        supervisor = await asyncio.shield(self._launching)
        self._ranks = await supervisor.ready()

    async def wait_failed(self) -> HarmonyError:
        """Return the failure of the engine, when there is one; wait forever otherwise."""
        if self._launching is None:
            await asyncio.get_running_loop().create_future()
        try:
            await self.ready()
        except HarmonyError as error:
            return error
        assert self._launching is not None
        return await asyncio.shield(self._launching.result().failure)

    def forget(self, name: str) -> None:
        """Give back the memory promised to a model, and to its copy if that was not made."""
        self.spawns.pop(name, None)
        self.request_numbers.pop(name, None)
        for promised in (name, part_of(name, "loaded weights"), part_of(name, "pool")):
            self.ledger.release(promised)
        if (copy := self.planned_copies.pop(name, None)) is not None:
            self.forget(copy.name)

    def hold(self, version: ModelVersion) -> None:
        """Keep a version from being removed while this session lives."""
        if version.ref not in self._held_references:
            self._held_versions.enter_context(self.registry.hold(version))
            self._held_references.add(version.ref)

    async def close(self, grace: float = 10.0) -> None:
        """Stop the ranks; nothing of the run is left afterwards."""
        self._closed = True
        self._held_versions.close()
        if self._launching is not None:
            await _stop(self._launching, grace)
        await self.closing.aclose()

    @contextlib.asynccontextmanager
    async def unchanged(self, model: str) -> AsyncIterator[None]:
        """Hold back requests that would change the model's weights, and all later ones, but not the model's `Save`."""
        if model in self._unchanged:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._unchanged[model].append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():
                    self._go_on(model)
                raise
        self._unchanged.setdefault(model, deque())
        try:
            yield
        finally:
            self._go_on(model)

    def _go_on(self, model: str) -> None:
        """Send the waiting requests, up to the next save of the model."""
        waiting = self._unchanged[model]
        while waiting:
            following = waiting.popleft()
            if not isinstance(following, asyncio.Future):
                following()
            elif not following.done():
                following.set_result(None)
                return
        del self._unchanged[model]

    def _in_order(self, message: Message, send: Callable[[], None]) -> None:
        waiting = self._unchanged.get(getattr(message, "source" if isinstance(message, Clone) else "model", ""))
        if waiting is None or isinstance(message, Save) or not (waiting or isinstance(message, _CHANGES)):
            self._pass_on(send)
        else:
            waiting.append(partial(self._pass_on, send))

    def _pass_on(self, send: Callable[[], None]) -> None:
        if self._held is not None:
            self._held.append(send)
        else:
            send()

    def post_replica(self, tp: int, replica: int, message: Message) -> Request:
        """Place a request to one replica of a model with `tp` in the order, now."""
        request = Request(_own_future())
        self._in_order(message, lambda: self._send_replica(tp, replica, message, request))
        return request

    def _send_replica(self, tp: int, replica: int, message: Message, request: Request) -> None:
        if request.cancelled:
            request.future.cancel()
            return
        leader = replica * tp // self._domain_size * self._domain_size
        request.handle = self._ranks[leader]
        self._in_flight += 1
        self._idle.clear()
        request.call, answer = request.handle.connection.submit(message)
        answer.add_done_callback(lambda done: self._replica_answered(request.future, done))

    def _replica_answered(self, future: asyncio.Future[Message], answer: asyncio.Future[Message]) -> None:
        self._in_flight -= 1
        if self._in_flight == 0:
            self._idle.set()
        _copy_result([answer], future, lambda messages: messages[0])

    def post_global(self, message: Message) -> asyncio.Future[list[Message]]:
        """Place a request to all ranks in the order, now. Resolves to the leaders' answers."""
        future: asyncio.Future[list[Message]] = _own_future()
        self._in_order(message, lambda: self._send_global(message, future))
        return future

    def _send_global(self, message: Message, future: asyncio.Future[list[Message]]) -> None:
        seq = self._next_seq
        self._next_seq += 1
        answers = [handle.connection.submit(message, seq)[1] for handle in self._ranks[:: self._domain_size]]
        waiting = asyncio.gather(*answers, return_exceptions=True)
        waiting.add_done_callback(lambda _: _copy_result(answers, future, lambda messages: messages))

    async def run_global(self, message: Message, answer: type[Answer]) -> list[Answer]:
        """`post_global`, awaited. Cancelling the caller does not withdraw the request."""
        return cast("list[Answer]", await asyncio.shield(self.post_global(message)))

    async def regroup(self, tp: int) -> None:
        """Regroup ranks so that one leader decides for at least `tp` of them; waits for requests in flight."""
        if tp <= self._domain_size:
            return
        held: deque[Callable[[], None]] = deque()
        self._held = held
        try:
            await self._idle.wait()
            future: asyncio.Future[list[Message]] = _own_future()
            self._send_global(Regroup(size=tp), future)
            await asyncio.shield(future)
            self._domain_size = tp
        finally:
            self._held = None
            while held:
                held.popleft()()


def part_of(name: str, part: str) -> str:
    """The name under which more memory is promised to the model `name`."""
    return f"{name}: {part}"


def _launched(write: EventSink, launching: asyncio.Task[Supervisor]) -> None:
    """Report the failure of the ranks when it happens, also while the recipe does something else."""
    if launching.cancelled():
        return
    error = launching.exception()
    if error is None:
        launching.result().failure.add_done_callback(lambda failure: _tell(write, failure.result()))
    elif isinstance(error, HarmonyError):
        _tell(write, error)


def _tell(write: EventSink, error: HarmonyError) -> None:
    said = error.message.partition("\n")[0]
    write(FAILED, {"error": error.code, "message": said, "details": error.details}, error.details.get("rank"))
    say(f"the engine has failed: {said}", error=True)


async def _stop(launching: asyncio.Task[Supervisor], grace: float) -> None:
    if not launching.done():
        launching.cancel()
        await asyncio.gather(launching, return_exceptions=True)
    if not launching.cancelled() and launching.exception() is None:
        await launching.result().stop(grace)


def _end_forgotten(
    loop: asyncio.AbstractEventLoop,
    launching: asyncio.Task[Supervisor],
    held: contextlib.ExitStack,
    logs: Path | None,
) -> None:
    """Stop the ranks of an engine without references, at the interpreter's end at the latest, and remove its logs.

    May be called by the garbage collector, on any thread.
    """

    async def end() -> None:
        await _stop(launching, 1.0)
        if logs is not None:
            private_directory.remove(logs)

    held.close()
    if loop.is_running():
        asyncio.run_coroutine_threadsafe(end(), loop)
        return
    if not launching.done():
        launching.cancel()
    elif not launching.cancelled() and launching.exception() is None:
        launching.result().kill()
    if logs is not None:
        private_directory.remove(logs)


def _own_future() -> asyncio.Future[Any]:
    """A future whose error asyncio does not report when it is never awaited, as after a cancelled call."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: None if done.cancelled() else done.exception())
    return future


def _copy_result(
    answers: list[asyncio.Future[Message]],
    future: asyncio.Future[Any],
    combine: Callable[[list[Message]], Any],
) -> None:
    """Resolve `future` from finished answers: the first error, else all of them combined."""
    if future.done():
        return
    for answer in answers:
        if answer.cancelled():
            future.set_exception(InternalError("a request was dropped while the engine closed"))
            return
        error = answer.exception()
        if error is not None:
            future.set_exception(error)
            return
    future.set_result(combine([answer.result() for answer in answers]))
