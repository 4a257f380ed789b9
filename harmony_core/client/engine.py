"""The driver's side of the ranks: one order for all requests, which replica runs where, and what memory is promised."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from harmony_core.client.capacity import Machine
from harmony_core.errors import ConflictError, HarmonyError, InternalError
from harmony_core.launch.launcher import LaunchOptions
from harmony_core.launch.supervisor import RankHandle, Supervisor
from harmony_core.recipe_file import RecipeFile
from harmony_core.registry import ModelVersion, Registry
from harmony_core.rpc.protocol import Cancel, Event, Message, Reblock

Answer = TypeVar("Answer", bound=Message)
EventSink = Callable[[str, dict[str, Any], int | None], None]


@dataclass(frozen=True)
class EngineOptions:
    """How many ranks to start, where, and under which limits. `memory` in bytes; `log_dir` takes each rank's output.

    `recipe`: the file whose functions the ranks may import as losses.
    `deterministic`: a token's log-prob has the same bits from sampler and trainer; CPU and float32 only.
    `resumed`: the run goes on from a checkpoint, and may save again what it had saved before.
    """

    log_dir: Path
    run_id: str
    num_processes: int | None = None
    device: str = "auto"
    accelerate_config: Path | None = None
    memory: int | None = None
    seed: int = 0
    rehearse: bool = False
    deterministic: bool = False
    compile: bool = True
    dry_run: bool = False
    assume: str | None = None
    recipe: RecipeFile | None = None
    resumed: bool = False


class Request:
    """A request to one replica that has its place in the order. Await `future`; `cancel()` withdraws it."""

    def __init__(self, future: asyncio.Future[Message]) -> None:
        self.future = future
        self.handle: RankHandle | None = None
        self.call = 0
        self.cancelled = False

    def cancel(self) -> None:
        """Tell the replica that nobody waits any more; it answers in its own time."""
        self.cancelled = True
        if self.handle is not None and not self.future.done():
            self.handle.connection.cast(Cancel(call=self.call))


class Engine:
    """Starts the ranks in the background and gives every request its place.

    All requests pass through one FIFO. It is held only while ranks are regrouped into larger blocks, which waits
    until no replica request is in flight; what arrives meanwhile is sent afterwards, in order.
    """

    def __init__(self, options: EngineOptions, registry: Registry, events: EventSink) -> None:
        self.options = options
        self.registry = registry
        self.events = events
        self.machine = Machine.find(options)
        self.ledger = self.machine.ledger()
        self.names: set[str] = set()
        self.request_numbers: dict[str, int] = {}
        """Of each live model, the number of its next request that draws a seed."""
        self.tp_values: set[int] = set()
        self.planned: list[dict[str, Any]] = []
        self._held_versions = contextlib.ExitStack()
        self._held_references: set[str] = set()
        self.spawn_order = asyncio.Lock()
        self._supervisor: Supervisor | None = None
        self._starting: asyncio.Task[list[RankHandle]] | None = None
        self._ranks: list[RankHandle] = []
        self._block_size = 1
        self._next_seq = 0
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._held: deque[Callable[[], None]] | None = None
        self._closed = False

    @property
    def world_size(self) -> int:
        """Number of ranks, known before they are up."""
        return self.machine.world_size

    @property
    def compiles(self) -> bool:
        """Whether layers are to be compiled, where a compiler is found."""
        return self.options.compile and self.machine.device == "cuda"

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def start(self) -> None:
        """Begin to start the ranks; returns at once. Does nothing in a dry run."""
        if not self.options.dry_run:
            self._starting = asyncio.get_running_loop().create_task(self._start(), name="start-ranks")
            # A failure is raised to whoever needs the ranks first; nobody may, and then it is not an error.
            self._starting.add_done_callback(lambda task: None if task.cancelled() else task.exception())

    async def _start(self) -> list[RankHandle]:
        options = LaunchOptions(
            log_dir=self.options.log_dir,
            run_id=self.options.run_id,
            deterministic=self.options.deterministic,
            cache=self.registry.home.cache / "compiled",
        )
        self._supervisor = await Supervisor.start(options, self.machine.launch, self._on_event)
        return await self._supervisor.ready()

    def _on_event(self, rank: int, event: Event) -> None:
        self.events(event.type, event.data, rank)

    async def ready(self) -> None:
        """Wait until every rank has reported. Raises RankDied or LauncherDied."""
        if self._closed or self._starting is None:
            raise ConflictError("the client is closed", hint="spawn and use models before close()")
        self._ranks = await asyncio.shield(self._starting)

    async def wait_failed(self) -> HarmonyError:
        """Return the failure of the engine, when there is one; wait forever otherwise."""
        if self._starting is None:
            await asyncio.get_running_loop().create_future()
        try:
            await self.ready()
        except HarmonyError as error:
            return error
        assert self._supervisor is not None
        return await asyncio.shield(self._supervisor.failure)

    def hold(self, version: ModelVersion) -> None:
        """Keep a version from being removed while this session lives."""
        if version.ref not in self._held_references:
            self._held_versions.enter_context(self.registry.hold(version))
            self._held_references.add(version.ref)

    async def close(self, grace: float = 10.0) -> None:
        """Stop the ranks; nothing of the run is left afterwards."""
        self._closed = True
        self._held_versions.close()
        if self._starting is None:
            return
        if self._supervisor is None and not self._starting.done():
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._supervisor is not None:
            await self._supervisor.stop(grace)
            await asyncio.gather(self._starting, return_exceptions=True)

    def _in_order(self, send: Callable[[], None]) -> None:
        if self._held is not None:
            self._held.append(send)
        else:
            send()

    def post_replica(self, tp: int, replica: int, message: Message) -> Request:
        """Give a request to one replica of a model with `tp` its place in the order, now."""
        request = Request(_own_future())
        self._in_order(lambda: self._send_replica(tp, replica, message, request))
        return request

    def _send_replica(self, tp: int, replica: int, message: Message, request: Request) -> None:
        if request.cancelled:
            request.future.cancel()
            return
        leader = replica * tp // self._block_size * self._block_size
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
        """Give a request to all ranks its place in the order, now. Resolves to the leaders' answers."""
        future: asyncio.Future[list[Message]] = _own_future()
        self._in_order(lambda: self._send_global(message, future))
        return future

    def _send_global(self, message: Message, future: asyncio.Future[list[Message]]) -> None:
        seq = self._next_seq
        self._next_seq += 1
        answers = [handle.connection.submit(message, seq)[1] for handle in self._ranks[:: self._block_size]]
        waiting = asyncio.gather(*answers, return_exceptions=True)
        waiting.add_done_callback(lambda _: _copy_result(answers, future, lambda messages: messages))

    async def run_global(self, message: Message, answer: type[Answer]) -> list[Answer]:
        """`post_global`, awaited. Cancelling the caller does not withdraw the request."""
        return cast("list[Answer]", await asyncio.shield(self.post_global(message)))

    async def reblock(self, tp: int) -> None:
        """Regroup ranks so that one leader decides for at least `tp` of them; waits for requests in flight."""
        if tp <= self._block_size:
            return
        held: deque[Callable[[], None]] = deque()
        self._held = held
        try:
            await self._idle.wait()
            future: asyncio.Future[list[Message]] = _own_future()
            self._send_global(Reblock(size=tp), future)
            await asyncio.shield(future)
            self._block_size = tp
        finally:
            self._held = None
            while held:
                held.popleft()()


def _own_future() -> asyncio.Future[Any]:
    """A future whose error is no news to asyncio when nobody awaits it any more, as after a cancelled call."""
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
