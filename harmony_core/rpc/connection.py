"""The driver's end of one socket: calls out, answers and events in; and the store that the ranks share over it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import cast

from harmony_core.errors import EngineError, HarmonyError
from harmony_core.rpc import platform
from harmony_core.rpc.methods import METHODS
from harmony_core.rpc.protocol import Hello, Message
from harmony_core.rpc.wire import (
    ASKED,
    MAX_BODY_BYTES,
    MAX_HELLO_BYTES,
    Failure,
    Frame,
    FrameDecoder,
    StoreAdd,
    StoreGet,
    StoreSet,
    StoreValues,
    WireError,
    encode,
    error_of,
    failure_of,
)

HELLO_SECONDS = 10.0
"""Seconds after which a peer that has not sent its Hello is disconnected."""


MAX_STORE_BYTES = 64 << 20
"""The maximum size of the ranks' store: keys, values, and waiting ranks."""
_ENTRY_BYTES = 256
"""The cost of an entry in addition to its own bytes."""

Answer = Callable[[StoreValues], None]


class Listener:
    """Receives the events of a connection. `lost` comes once, as the last."""

    def hello(self, connection: Connection, message: Hello) -> None:
        """The first frame, and the only one until `accept`."""

    def event(self, connection: Connection, message: Message) -> None:
        """A Beat or an Event."""

    def asked(self, connection: Connection, message: Message, answer: Answer) -> None:
        """The rank sends a request from the table `ASKED`. A HarmonyError raised here is sent as the answer."""

    def fatal(self, connection: Connection, error: HarmonyError) -> None:
        """The rank cannot continue: an `err` frame that does not answer a call."""

    def lost(self, connection: Connection, reason: str) -> None:
        """The socket is closed. `reason` is "" when the other side closed it."""


class Connection(asyncio.Protocol):
    """One rank's socket. Answers are matched to calls by id, and their type is checked against the table."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.peer_pid = 0
        self.hold_error: Callable[[HarmonyError], float] = lambda error: 0.0
        """Seconds to hold back an error that answers a call, because the cause may be another rank's death."""
        self._transport: asyncio.Transport | None = None
        self._decoder = FrameDecoder(MAX_HELLO_BYTES)
        self._accepted = False
        self._reason = ""
        self._next_id = 1
        self._pending: dict[int, tuple[str, asyncio.Future[Message]]] = {}
        self._failure: HarmonyError | None = None

    def submit(self, message: Message, seq: int | None = None) -> tuple[int, asyncio.Future[Message]]:
        """Send a call now. Returns its id, and the future of its answer. Never raises: a failure is in the future."""
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        call = self._next_id
        self._next_id += 1
        method = type(message).__name__
        try:
            if self._failure is not None:
                raise self._failure
            frame = encode("call", message, id=call, seq=seq)
        except HarmonyError as error:
            _fail(future, error)
            return call, future
        assert method in METHODS
        self._pending[call] = method, future
        self._write(frame)
        return call, future

    def cast(self, message: Message, seq: int | None = None) -> None:
        """Send a message without an answer. It is dropped when the rank is gone."""
        if self._failure is None:
            self._write(encode("cast", message, seq=seq))

    def refuse(self, error: HarmonyError) -> None:
        """Tell the peer why it is refused, and close."""
        self._write(encode("err", failure_of(error, -1)))
        self.close()

    def _write(self, frame: bytes) -> None:
        # A socket that is closing is reported by `lost`; until then its calls stay pending.
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    def accept(self) -> None:
        """Accept the peer as a rank of ours: take frames of any length, and events."""
        self._accepted = True
        self._decoder.max_body_bytes = MAX_BODY_BYTES

    def fail(self, error: HarmonyError) -> None:
        """Make every pending and later call fail with `error`."""
        self._failure = error
        pending, self._pending = self._pending, {}
        for _, future in pending.values():
            _fail(future, error)

    def close(self) -> None:
        """Close the socket; bytes already written are still sent."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Refuse a peer of another user."""
        self._transport = cast("asyncio.Transport", transport)
        asyncio.get_running_loop().call_later(HELLO_SECONDS, self._expect_hello)
        credentials = platform.peer(cast("socket.socket", transport.get_extra_info("socket")))
        if credentials is not None:
            self.peer_pid, uid = credentials
            if uid != os.geteuid():
                self._abort(f"refused: the peer is user {uid}")

    def data_received(self, data: bytes) -> None:
        """Pass each complete frame on."""
        try:
            for frame in self._decoder.feed(data):
                self._dispatch(frame)
                if self._reason:
                    return
        except WireError as error:
            self._abort(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        """Notify the listener, which knows whether the end was expected."""
        self.listener.lost(self, self._reason)

    def _dispatch(self, frame: Frame) -> None:
        header, body = frame.header, frame.body
        if not self._accepted:
            if not isinstance(body, Hello):
                raise WireError(f"{header.method[:80]!r} before Hello")
            self.listener.hello(self, body)
        elif header.kind == "event":
            self.listener.event(self, body)
        elif header.kind == "err":
            self._error(header.id, error_of(cast("Failure", body)))
        elif header.kind == "ok":
            self._answer(header.id, header.method, body)
        elif header.kind == "call" and type(body) in ASKED:
            self._asked(header.id, header.method, body)
        else:
            raise WireError(f"a rank sent a {header.kind}")

    def _asked(self, call: int, method: str, body: Message) -> None:
        try:
            self.listener.asked(self, body, lambda answer: self._write(encode("ok", answer, id=call, method=method)))
        except HarmonyError as error:
            self._write(encode("err", failure_of(error, -1), id=call))

    def _answer(self, call: int, method: str, body: Message) -> None:
        asked, future = self._pending.pop(call, (method, None))
        if asked != method:
            raise WireError(f"an answer to {method} for call {call}, which was {asked}")
        if future is not None and not future.done():
            future.set_result(body)

    def _error(self, call: int, error: HarmonyError) -> None:
        if call == 0:
            self.listener.fatal(self, error)
            return
        if call not in self._pending:
            return
        seconds = self.hold_error(error)
        if seconds:
            asyncio.get_running_loop().call_later(seconds, self._deliver_error, call, error)
        else:
            self._deliver_error(call, error)

    def _deliver_error(self, call: int, error: HarmonyError) -> None:
        _, future = self._pending.pop(call, ("", None))
        if future is not None:
            _fail(future, error)

    def _expect_hello(self) -> None:
        if not self._accepted:
            self._abort("no Hello")

    def _abort(self, reason: str) -> None:
        self._reason = reason
        assert self._transport is not None
        self._transport.abort()


def _fail(future: asyncio.Future[Message], error: HarmonyError) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # marks it as retrieved: a call that is no longer awaited does not cause a warning


class RankStore:
    """The keys and values over which the process groups of one run's ranks find each other.

    The driver holds them, and ranks use their own connections: no port is opened, and only the run's ranks have access.
    Each answer is passed to the function that comes with its request.
    """

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._held = 0
        self._waiting: list[tuple[list[str], Answer]] = []

    def ask(self, request: Message, answer: Answer) -> None:
        """Answer now, or later for a `StoreGet` that waits. Raises EngineError when the store is full."""
        if isinstance(request, StoreGet):
            if not self._answered(request.keys, answer):
                if request.wait:
                    self._claim(_size(*request.keys))
                    self._waiting.append((request.keys, answer))
                else:
                    answer(StoreValues(values=None))
            return
        assert isinstance(request, StoreSet | StoreAdd)
        held = self._values.get(request.key)
        value = request.value if isinstance(request, StoreSet) else _sum(held or b"0", request)
        self._claim(_size(request.key, value) - (0 if held is None else _size(request.key, held)))
        self._values[request.key] = value
        answer(StoreValues(values=[value] if isinstance(request, StoreAdd) else []))
        waiting, self._waiting = self._waiting, []
        for keys, waiter in waiting:
            if self._answered(keys, waiter):
                self._held -= _size(*keys)
            else:
                self._waiting.append((keys, waiter))

    def _answered(self, keys: list[str], answer: Answer) -> bool:
        if found := all(key in self._values for key in keys):
            answer(StoreValues(values=[self._values[key] for key in keys]))
        return found

    def _claim(self, size: int) -> None:
        if self._held + size > MAX_STORE_BYTES:
            raise EngineError(
                f"the store of the ranks is full: {self._held} of {MAX_STORE_BYTES} bytes, {size} more wanted"
            )
        self._held += size


def _sum(held: bytes, request: StoreAdd) -> bytes:
    try:
        return b"%d" % (int(held) + request.amount)
    except ValueError:
        raise EngineError(f"{request.key!r} in the store of the ranks is not a number") from None


def _size(*parts: str | bytes) -> int:
    return sum(map(len, parts)) + _ENTRY_BYTES
