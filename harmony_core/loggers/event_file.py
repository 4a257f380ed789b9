"""The files that TensorBoard reads: records of protocol buffers, written by hand.

A record is its length, a checksum of the length, the data and a checksum of the data; the data is a
`tensorflow.Event` message. Only scalars and texts are written, for which this needs no package.

Source: tensorflow/core/lib/io/record_writer.h, tensorflow/core/util/event.proto and framework/summary.proto.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from pathlib import Path

_POLYNOMIAL = 0x82F63B78
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_STRING_TENSOR = 7


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def record_of(data: bytes) -> bytes:
    """One record of the file."""
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _varint(value: int) -> bytes:
    out = bytearray()
    value &= 0xFFFFFFFFFFFFFFFF
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _key(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _integer(number: int, value: int) -> bytes:
    return _key(number, _VARINT) + _varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _key(number, _BYTES) + _varint(len(value)) + value


def _event(body: bytes, step: int | None = None) -> bytes:
    head = _key(1, _FIXED64) + struct.pack("<d", time.time())
    return head + (b"" if step is None else _integer(2, step)) + body


def _scalar(tag: str, value: float) -> bytes:
    try:
        number = struct.pack("<f", value)
    except OverflowError:  # beyond float32
        number = struct.pack("<f", float("inf") if value > 0 else float("-inf"))
    return _bytes(1, _bytes(1, tag.encode()) + _key(2, _FIXED32) + number)


def _text(tag: str, text: str) -> bytes:
    shape = _bytes(2, _bytes(2, _integer(1, 1)))
    tensor = _integer(1, _STRING_TENSOR) + shape + _bytes(8, text.encode())
    metadata = _bytes(1, _bytes(1, b"text"))
    return _bytes(1, _bytes(1, tag.encode()) + _bytes(8, tensor) + _bytes(9, metadata))


class EventFile:
    """Appends steps of scalars and texts to a new event file in `directory`. Raises OSError."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard takes any file with `tfevents` in its name and reads those of one folder in the order of names.
        stamp = f"{time.time():.6f}"
        self.path = directory / f"events.out.tfevents.{stamp}.{socket.gethostname()}.{os.getpid()}"
        self._file = self.path.open("xb")
        self._append(_event(_bytes(3, b"brain.Event:2")))

    def _append(self, event: bytes) -> None:
        self._file.write(record_of(event))
        self._file.flush()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """The numbers of one step, kept as float32."""
        self._append(_event(_bytes(5, b"".join(_scalar(tag, value) for tag, value in values.items())), step))

    def text(self, step: int, tag: str, text: str) -> None:
        """A text, which TensorBoard shows as Markdown."""
        self._append(_event(_bytes(5, _text(tag, text)), step))

    def close(self) -> None:
        """Close the file."""
        self._file.close()
