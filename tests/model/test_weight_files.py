from __future__ import annotations

import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

import small_models
from harmony_core.errors import VerificationError
from harmony_core.model.weight_files import model_names, read_header, read_headers, weight_names
from harmony_core.plain_files import read_json


def entry(shape: list[int], begin: int, end: int, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_raw(path: Path, header: Any, data: int = 0) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


def test_a_header_is_read(tmp_path: Path) -> None:
    small_models.write_safetensors(tmp_path / "x.safetensors", {"a": (3, 5), "b": (), "c": (0, 4)}, dtype="BF16")
    found = read_header(tmp_path / "x.safetensors")
    assert {name: (tensor.shape, tensor.dtype, tensor.bytes) for name, tensor in found.items()} == {
        "a": ((3, 5), "BF16", 30),
        "b": ((), "BF16", 2),
        "c": ((0, 4), "BF16", 0),
    }


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ({"a": entry([2], 0, 8)}, 7, "not fully covered"),
        ({"a": entry([2], 0, 8)}, 9, "not fully covered"),
        ({"a": entry([2], 0, 8), "b": entry([1], 12, 16)}, 16, "invalid offset"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "invalid offset"),
        ({"a": entry([3], 0, 8)}, 8, "invalid shape"),
        ({"a": entry([2], 8, 0)}, 8, "invalid"),
        ({"a": entry([2], 0, 8, "I64")}, 8, "invalid shape"),
        ({"a": entry([1], 0, 8, "I64")}, 8, "has type I64"),
        ({"a": entry([2], 0, 8, ["F32"])}, 8, "invalid JSON"),
        ({"a": entry([-2], 0, -8)}, 8, "invalid"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "missing field"),
        ({"a": "text"}, 8, "invalid type"),
        (b"[1, 2]", 0, "not a safetensors file"),
        (b"{" * 100_000, 0, "invalid JSON"),
        (b'{"a": \xff}', 0, "not a safetensors file"),
    ],
)
def test_a_broken_header_is_refused(tmp_path: Path, header: Any, data: int, reason: str) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(VerificationError, match=reason) as caught:
        read_header(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("content", [b"", b"short", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 0) + b"{}"])
def test_what_is_no_safetensors_file_is_refused_without_reading_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(VerificationError, match="not a safetensors file, or truncated"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x04\x95"])
def test_a_pickle_under_a_safe_name_is_named_as_one(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(start + bytes(100))
    with pytest.raises(VerificationError, match="pickled"):
        read_header(tmp_path / "x.safetensors")


def test_mutated_headers_give_typed_errors_only(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    small_models.write_safetensors(path, {"a": (3, 5), "b": (2,)})
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(2000):
        mutated = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            mutated[rng.randrange(len(mutated) - 60)] = rng.randrange(256)
        path.write_bytes(mutated[: rng.choice([len(mutated), rng.randrange(len(mutated))])])
        try:
            read_header(path)
        except VerificationError:
            refused += 1
    assert refused > 1500  # a changed letter in a name cannot be seen here


def test_an_index_must_agree_with_its_files(tmp_path: Path) -> None:
    directory = small_models.write_model(tmp_path / "m", shards=3)
    assert len(weight_names(directory)) == 3
    assert read_headers(directory).keys() == small_models.shapes().keys()
    index = directory / "model.safetensors.index.json"
    good = json.loads(index.read_text())

    def refuse(change: dict[str, Any], reason: str) -> None:
        small_models.write_json(index, {"weight_map": good["weight_map"] | change})
        with pytest.raises(VerificationError, match=reason):
            read_headers(directory)

    refuse({"extra": "model-00001-of-00003.safetensors"}, "'extra' is missing")
    refuse({"model.norm.weight": "model-00001-of-00003.safetensors"}, "is missing")
    for escape in ("../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", ".hidden.safetensors", "x.bin", 7):
        refuse({"extra": escape}, "not to a safetensors file here")
    small_models.write_json(index, {"weight_map": []})
    with pytest.raises(VerificationError, match="no weight_map"):
        read_headers(directory)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    directory = small_models.write_model(tmp_path / "m", shards=2)
    small_models.write_safetensors(directory / "model-00001-of-00002.safetensors", small_models.shapes())
    with pytest.raises(VerificationError, match="is also in"):
        read_headers(directory)


def test_only_pickled_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(VerificationError, match=r"only pickled files, which are never read \(pytorch_model.bin\)"):
        read_headers(tmp_path)


def test_json_is_an_object_in_a_file(tmp_path: Path) -> None:
    for text, reason in ((b"[]", "not a JSON object"), (b"{", "not valid JSON"), (b"[" * 10**5, "not valid JSON")):
        (tmp_path / "x.json").write_bytes(text)
        with pytest.raises(VerificationError, match=reason):
            read_json(tmp_path / "x.json")
    with pytest.raises(VerificationError, match="No such file"):
        read_json(tmp_path / "none.json")


def shadowing_index(directory: Path) -> None:
    small_models.write_safetensors(directory / "other.safetensors", small_models.shapes(), seed=1)
    places = dict.fromkeys(small_models.shapes(), "other.safetensors")
    small_models.write_json(directory / "model.safetensors.index.json", {"weight_map": places})


def index_of_less(directory: Path) -> None:
    places = dict.fromkeys(list(small_models.shapes())[:-1], "model.safetensors")
    small_models.write_json(directory / "model.safetensors.index.json", {"weight_map": places})


def index_named_twice(directory: Path) -> None:
    places = json.dumps(dict.fromkeys(small_models.shapes(), "model.safetensors"))
    text = f'{{"weight_map": {{"a": "b.safetensors"}}, "weight_map": {places}}}'
    (directory / "model.safetensors.index.json").write_text(text)


def tensor_named_twice(directory: Path) -> None:
    data = (directory / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    name = '"model.norm.weight":'
    header = data[8 : 8 + size].decode()
    part = header[header.index(name) :].partition("}")[0] + "}, "
    header = "{" + part + header[1:]
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + data[8 + size :])


def stray_shard(directory: Path) -> None:
    shutil.copy(directory / "model.safetensors", directory / "model-00002-of-00002.safetensors")


def adapter_beside(directory: Path) -> None:
    small_models.write_adapter(directory)


@pytest.mark.parametrize(
    "spoil", [shadowing_index, index_of_less, index_named_twice, tensor_named_twice, stray_shard, adapter_beside]
)
def test_what_programs_would_read_differently_is_refused(tmp_path: Path, spoil: Any) -> None:
    directory = small_models.write_model(tmp_path / "m")
    assert model_names(directory)[:2] == ["config.json", "model.safetensors"]
    read_headers(directory)
    spoil(directory)
    with pytest.raises(VerificationError) as caught:
        model_names(directory), read_headers(directory)
    assert str(directory) in caught.value.message


def test_an_index_of_the_one_file_says_nothing_new(tmp_path: Path) -> None:
    directory = small_models.write_model(tmp_path / "m")
    places = dict.fromkeys(small_models.shapes(), "model.safetensors")
    small_models.write_json(directory / "model.safetensors.index.json", {"weight_map": places})
    (directory / "consolidated.safetensors").write_bytes(b"the same in another layout")
    assert read_headers(directory).keys() == small_models.shapes().keys()
    assert "consolidated.safetensors" not in model_names(directory)


def test_a_header_without_end_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 39) + b"{")
    os.truncate(path, 1 << 40)
    with pytest.raises(VerificationError, match="not a safetensors file"):
        read_header(path)
