"""Numbers in a GGUF file that cannot be true are found before anything is read by them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import small_gguf
from harmony_core.engine.convert_gguf import check_header
from harmony_core.errors import VerificationError


def text(content: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if size is None else size) + content


def file(values: bytes, tensors: int = 0, count: int = 1, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + values


def array(kind: int, size: int) -> bytes:
    return text(b"a") + struct.pack("<IIQ", 9, kind, size)


LIES: dict[str, tuple[bytes, str]] = {
    "another format": (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
    "another version": (file(b"", version=77), "version 2 or 3"),
    "empty": (b"", "ends in the middle"),
    "a thousand billion bytes": (file(array(0, 2**40) + bytes(4000)), "holds 1099511627777 values"),
    "a thousand billion texts": (file(array(8, 2**40) + bytes(4000)), "holds 1099511627777 values"),
    "arrays of arrays": (file(array(9, 1) + bytes(4000)), "values of kind 9"),
    "a kind that is none": (file(text(b"a") + struct.pack("<I", 99)), "a value of kind 99"),
    "a long name": (file(text(b"a", 2**63)), "longer than the file"),
    "many values": (file(b"", count=2**60), "values"),
    "many tensors": (file(b"", tensors=2**60, count=0), "values"),
    "many dimensions": (file(text(b"t") + struct.pack("<I", 2**31), 1, 0), "2147483648 dimensions"),
    "wide values": (file(array(12, 3000) + bytes(4000)), "longer than the file"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused(tmp_path: Path, name: str) -> None:
    content, reason = LIES[name]
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(VerificationError, match=reason) as caught:
        check_header(tmp_path / "x.gguf")
    assert str(tmp_path / "x.gguf") in caught.value.message


def test_a_true_file_passes(tmp_path: Path) -> None:
    import numpy as np

    check_header(small_gguf.write(tmp_path / "x.gguf", {"model.norm.weight": np.ones(8, dtype=np.float32)}))
