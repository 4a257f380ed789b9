"""Frames: messages as bytes, and errors as data.

    u32 header length | u64 body length | header | body          little-endian

Header and body are msgpack. The header contains the method and the kind; headers and bodies are typed, unknown
fields and methods are refused, and lengths are checked before a byte is stored. This module does no input or output.
"""

from __future__ import annotations

import struct
import traceback
from array import array
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

import msgspec

from harmony_core.errors import EngineError, HarmonyError, RankError, all_errors
from harmony_core.rpc.methods import METHODS
from harmony_core.rpc.protocol import PROTOCOL_VERSION, Beat, Event, Hello, Message

Kind = Literal["call", "ok", "err", "event", "cast"]

MAX_HEADER_BYTES = 4096
MAX_BODY_BYTES = 1 << 30
MAX_HELLO_BYTES = 1 << 16
"""The most bytes that a peer may send before its Hello is accepted."""

MAX_VALUE_BYTES = 1 << 20
"""The maximum size of one value in the ranks' store."""

_PREFIX = struct.Struct("<IQ")


class WireError(Exception):
    """Bytes that are not a valid frame; the stream that contained them cannot be used any more."""


class Header(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """`id` pairs an answer with its call; `seq` orders global requests."""

    v: int = PROTOCOL_VERSION
    id: int = 0
    kind: Kind
    method: str
    seq: int | None = None


class Failure(Message):
    """An exception as data: the body of an `err` frame. `type` is a class of the error tree."""

    type: str
    message: str
    hint: str
    details: dict[str, Any]


Key = Annotated[str, msgspec.Meta(max_length=1024)]
Value = Annotated[bytes, msgspec.Meta(max_length=MAX_VALUE_BYTES)]


class StoreSet(Message):
    """Put a value under a key. The answer is empty."""

    key: Key
    value: Value


class StoreAdd(Message):
    """Add to the number under a key, or to 0 without one. The answer is the sum, as digits."""

    key: Key
    amount: int


class StoreGet(Message):
    """Ask for the values of keys, and `wait` until all of them exist."""

    keys: Annotated[list[Key], msgspec.Meta(max_length=4096)]
    wait: bool


class StoreValues(Message):
    """The answer to each store request; None when a key is missing."""

    values: list[Value] | None


ASKED: tuple[type[Message], ...] = (StoreSet, StoreAdd, StoreGet)
"""The closed table of requests from ranks to the driver."""


class Frame(msgspec.Struct):
    """One decoded frame."""

    header: Header
    body: Message


_EVENTS: dict[str, type[Message]] = {"Hello": Hello, "Beat": Beat, "Event": Event}
_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(Header)
_decoders: dict[tuple[str, str], msgspec.msgpack.Decoder[Any]] = {
    **{("call", name): msgspec.msgpack.Decoder(request) for name, (request, _) in METHODS.items()},
    **{("cast", name): msgspec.msgpack.Decoder(request) for name, (request, _) in METHODS.items()},
    **{("ok", name): msgspec.msgpack.Decoder(answer) for name, (_, answer) in METHODS.items()},
    **{("call", asked.__name__): msgspec.msgpack.Decoder(asked) for asked in ASKED},
    **{("ok", asked.__name__): msgspec.msgpack.Decoder(StoreValues) for asked in ASKED},
    **{("event", name): msgspec.msgpack.Decoder(event) for name, event in _EVENTS.items()},
}
_failure_decoder = msgspec.msgpack.Decoder(Failure)


def encode(kind: Kind, message: Message, *, id: int = 0, method: str = "", seq: int | None = None) -> bytes:
    """Encode one frame. `method` defaults to the message's class; an answer has the method of its request."""
    header = _encoder.encode(Header(id=id, kind=kind, method=method or type(message).__name__, seq=seq))
    body = _encoder.encode(message)
    if len(body) > MAX_BODY_BYTES:
        raise EngineError(f"a {type(message).__name__} of {len(body)} bytes; a message holds at most {MAX_BODY_BYTES}")
    return b"".join((_PREFIX.pack(len(header), len(body)), header, body))


class FrameDecoder:
    """Bytes in, frames out. Memory grows with the bytes that arrived, never with the lengths they announce."""

    def __init__(self, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.max_body_bytes = max_body_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Frames completed by `data`, each decoded on demand. Raises WireError; the stream cannot be used after it."""
        self._buffer += data
        return self._frames()

    def _frames(self) -> Iterator[Frame]:
        while len(self._buffer) >= _PREFIX.size:
            header_bytes, body_bytes = _PREFIX.unpack_from(self._buffer)
            if header_bytes > MAX_HEADER_BYTES or body_bytes > self.max_body_bytes:
                raise WireError(f"a frame that announces {header_bytes} + {body_bytes} bytes")
            end = _PREFIX.size + header_bytes + body_bytes
            if len(self._buffer) < end:
                return
            header = bytes(self._buffer[_PREFIX.size : _PREFIX.size + header_bytes])
            body = bytes(self._buffer[_PREFIX.size + header_bytes : end])
            del self._buffer[:end]
            yield _decode(header, body)


def _decode(header_bytes: bytes, body: bytes) -> Frame:
    try:
        header = _header_decoder.decode(header_bytes)
        if header.v != PROTOCOL_VERSION:
            raise WireError(f"a frame of protocol {header.v}; this side speaks {PROTOCOL_VERSION}")
        decoder = _failure_decoder if header.kind == "err" else _decoders.get((header.kind, header.method))
        if decoder is None:
            raise WireError(f"there is no {header.kind} {header.method[:80]!r}")
        return Frame(header, decoder.decode(body))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"a frame that cannot be read: {error}") from error


def failure_of(error: BaseException, rank: int) -> Failure:
    """An exception as data. An exception of another library becomes a RankError with its traceback."""
    if not isinstance(error, HarmonyError):
        lines = traceback.format_exception(error)
        text = str(error).strip() or "no message"
        message = f"rank {rank}: {type(error).__name__}: {text}"
        error = RankError(message, rank=rank, type=type(error).__name__, traceback="".join(lines)[-16_000:])
    return Failure(
        type=type(error).__name__,
        message=_plain_text(error.message),
        hint=_plain_text(error.hint),
        details={_plain_text(key): _plain(value) for key, value in error.details.items()},
    )


def _plain(value: Any) -> Any:
    """`value` if msgpack can encode it, else its representation."""
    try:
        return msgspec.msgpack.decode(_encoder.encode(value))
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        return ascii(value)


def _plain_text(text: str) -> str:
    return str(text).encode("utf-8", "backslashreplace").decode()


def error_of(failure: Failure) -> HarmonyError:
    """The exception that a `Failure` describes, looked up in the error tree. An unknown class becomes a RankError."""
    known = all_errors().get(failure.type)
    if known is not None:
        try:
            return known(failure.message, hint=failure.hint, **failure.details)
        except TypeError:  # the details do not fit this class
            pass
    return RankError(f"{failure.type}: {failure.message}", hint=failure.hint, type=failure.type)


def pack_ints(values: Iterable[int]) -> bytes:
    """Pack as int32."""
    return array("i", values).tobytes()


def unpack_ints(data: bytes) -> list[int]:
    """Inverse of `pack_ints`."""
    return array("i", data).tolist()


def pack_floats(values: Iterable[float]) -> bytes:
    """Pack as float32."""
    return array("f", values).tobytes()


def unpack_floats(data: bytes) -> list[float]:
    """Inverse of `pack_floats`."""
    return array("f", data).tolist()


def pack_doubles(values: Iterable[float]) -> bytes:
    """Pack as float64."""
    return array("d", values).tobytes()
