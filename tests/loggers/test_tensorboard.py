"""Event files, read back by a reader of their own and, where it is installed, by TensorBoard's."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from harmony_core.errors import ResourceError
from harmony_core.loggers import TBMetricsLogger
from harmony_core.loggers.event_file import crc32c, record_of
from harmony_core.logging_table import Table
from installed import needs


def bitwise_crc32c(data: bytes) -> int:
    """The checksum by its definition: division by the polynomial, bit for bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 & -(crc & 1))
    return crc ^ 0xFFFFFFFF


def unmasked(stored: bytes) -> int:
    rotated = (int(struct.unpack("<I", stored)[0]) - 0xA282EAD8) & 0xFFFFFFFF
    return ((rotated >> 17) | (rotated << 15)) & 0xFFFFFFFF


def records(data: bytes) -> Iterator[bytes]:
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert unmasked(data[8:12]) == bitwise_crc32c(data[:8])
        body = data[12 : 12 + length]
        assert unmasked(data[12 + length : 16 + length]) == bitwise_crc32c(body)
        yield body
        data = data[16 + length :]


def fields(data: bytes) -> dict[int, list[object]]:
    """The fields of one protocol buffer, by number; nested messages stay bytes."""
    found: dict[int, list[object]] = {}

    def varint() -> int:
        nonlocal data
        value = shift = 0
        while True:
            byte, data = data[0], data[1:]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while data:
        key = varint()
        value: object
        if key & 7 == 0:
            value = varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or varint()
            value, data = data[:size], data[size:]
            if key & 7 != 2:
                value = struct.unpack("<d" if size == 8 else "<f", value)[0]  # type: ignore[arg-type]
        found.setdefault(key >> 3, []).append(value)
    return found


def steps(directory: Path) -> list[tuple[int, dict[str, object]]]:
    """(step, values by tag) of every event but the first."""
    (file,) = directory.glob("events.out.tfevents.*")
    first, *rest = (fields(record) for record in records(file.read_bytes()))
    assert first[3] == [b"brain.Event:2"]
    found = []
    for event in rest:
        values: dict[str, object] = {}
        for raw in fields(event[5][0])[1]:  # type: ignore[arg-type]
            value = fields(raw)  # type: ignore[arg-type]
            tag = value[1][0].decode()  # type: ignore[attr-defined]
            values[tag] = value[2][0] if 2 in value else fields(value[8][0])[8][0].decode()  # type: ignore[arg-type,attr-defined]
        found.append((event[2][0], values))
    return found  # type: ignore[return-value]


def test_checksums_are_those_of_the_standard() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes([0xFF] * 32)) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_a_record_begins_as_every_event_file_does() -> None:
    """The first record of an event file has 24 bytes; its length and checksum are the same in all of them."""
    assert record_of(bytes(24))[:12] == bytes.fromhex("1800000000000000a37f4b22")


def test_what_is_logged_is_read_back(tmp_path: Path) -> None:
    logger = TBMetricsLogger("my-run", str(tmp_path))
    logger.log_config({"lr": 0.001})
    logger({"loss": 2.5, "tokens": 7, "note": "words"})
    logger.set_state({"step": 300})
    logger({"loss": float("nan"), "huge": 1e300})
    logger.close()
    found = steps(tmp_path / "my-run")
    assert found[0] == (0, {"config": "    lr: 0.001"})
    assert found[1:3] == [(1, {"loss": 2.5, "tokens": 7.0}), (1, {"note": "words"})]
    step, last = found[3]
    assert step == 301 and math.isnan(last["loss"]) and last["huge"] == math.inf  # type: ignore[arg-type]


def test_tables_are_pages_with_an_index(tmp_path: Path) -> None:
    logger = TBMetricsLogger("run", str(tmp_path), "http://here")
    logger({"generation/samples": Table(["prompt"]).add_row(["<script>alert(1)</script>"])})
    logger.close()
    folder = tmp_path / "run" / "tables"
    page = (folder / "generation-samples-step-000001.html").read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page
    assert 'href="generation-samples-step-000001.html"' in (folder / "index.html").read_text()
    assert logger.training_monitoring_link == "http://here"
    assert steps(tmp_path / "run") == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot write TensorBoard events"):
        TBMetricsLogger("run", str(tmp_path / "file"))


@pytest.mark.slow
@needs("tensorboard")
def test_tensorboard_reads_the_file(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TBMetricsLogger("run", str(tmp_path))
    for value in (1.0, 0.5):
        logger({"loss": value, "note": "words"})
    logger.close()
    read = EventAccumulator(str(tmp_path / "run"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    assert "note/text_summary" in read.Tags()["tensors"] or "note" in read.Tags()["tensors"]
