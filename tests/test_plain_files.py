from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from harmony_core import plain_files
from harmony_core.errors import VerificationError
from harmony_core.plain_files import open_plain, plain, read_json, read_plain, refuse_code


def sparse(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


SPECIAL: list[tuple[Callable[[Path], None], str]] = [
    (os.mkfifo, "neither a plain file"),
    (lambda path: path.mkdir(), "neither a plain file"),
    (lambda path: path.symlink_to("/dev/zero"), "leads out of its directory"),
    (lambda path: path.symlink_to("/etc/passwd"), "leads out of its directory"),
    (lambda path: path.symlink_to("nowhere"), "No such file"),
    (lambda path: path.symlink_to(path.name), "leads out|symbolic links"),
    (lambda path: sparse(path, 1 << 40), "larger than 16 MiB"),
    (lambda path: None, "No such file"),
]


@pytest.mark.parametrize(("make", "reason"), SPECIAL)
def test_only_plain_files_of_a_bounded_size_are_read(tmp_path: Path, make: Callable[[Path], None], reason: str) -> None:
    make(tmp_path / "config.json")
    with pytest.raises(VerificationError, match=reason) as caught:
        read_plain(tmp_path / "config.json")
    assert str(tmp_path / "config.json") in caught.value.message


@pytest.mark.parametrize("link", ["other.json", "below/other.json"])
def test_a_link_within_its_directory_is_followed(tmp_path: Path, link: str) -> None:
    target = tmp_path / "m" / link
    target.parent.mkdir(parents=True)
    target.write_bytes(b"{}")
    (tmp_path / "m" / "config.json").symlink_to(link)
    assert read_plain(tmp_path / "m" / "config.json") == b"{}"
    (tmp_path / "m2").mkdir()
    (tmp_path / "m2" / "config.json").symlink_to(target)  # its name begins as that of the directory does
    with pytest.raises(VerificationError, match="leads out"):
        open_plain(tmp_path / "m2" / "config.json")


def test_a_link_into_the_hubs_cache_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = tmp_path / "hf" / "hub" / "models--a--b" / "blobs" / "1"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"{}")
    (tmp_path / "hf" / "token").write_bytes(b"secret")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").symlink_to(blob)
    (tmp_path / "m" / "added_tokens.json").symlink_to(tmp_path / "hf" / "token")
    with pytest.raises(VerificationError, match="leads out"):
        read_plain(tmp_path / "m" / "config.json")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert read_plain(tmp_path / "m" / "config.json") == b"{}"
    with pytest.raises(VerificationError, match="leads out"):
        read_plain(tmp_path / "m" / "added_tokens.json")


def test_a_snapshot_of_another_cache_reaches_its_own_blobs_alone(tmp_path: Path) -> None:
    for name in ("real", "false"):
        (tmp_path / name / "snapshots" / "1").mkdir(parents=True)
        (tmp_path / name / "snapshots" / "1" / "config.json").symlink_to("../../blobs/x")
    (tmp_path / "real" / "blobs").mkdir()
    (tmp_path / "real" / "blobs" / "x").write_bytes(b"{}")
    (tmp_path / "false" / "blobs").symlink_to(tmp_path / "real" / "blobs")
    assert read_plain(tmp_path / "real" / "snapshots" / "1" / "config.json") == b"{}"
    with pytest.raises(VerificationError, match="leads out"):
        read_plain(tmp_path / "false" / "snapshots" / "1" / "config.json")


def test_the_bound_belongs_to_the_kind_of_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_files, "MAX_OTHER", 10)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(b" " * 11)
    assert len(read_plain(tmp_path / "tokenizer.json")) == 11
    with pytest.raises(VerificationError, match="larger than"):
        read_plain(tmp_path / "config.json")
    assert len(read_plain(tmp_path / "config.json", 11)) == 11


def test_a_name_that_stands_twice_in_an_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": {"b": 1, "c": 2}, "d": {"b": 1}}')
    assert read_json(path)["d"] == {"b": 1}
    path.write_text('{"a": [{"b": 1, "c": 2, "b": 1}]}')
    with pytest.raises(VerificationError, match="'b' stands in it twice"):
        read_json(path)


@pytest.mark.parametrize(
    "asking",
    [
        {"auto_map": {"AutoConfig": "x.C"}},
        {"text_config": {"auto_map": {"AutoModel": "x.M"}}},
        {"a": [{"trust_remote_code": True}]},
        {"custom_pipelines": {"p": {"impl": "x.P"}}},
        {"custom_generate": "someone/generate"},
        {"attn_implementation": "someone/kernel"},
        {"text_config": {"_attn_implementation": {"": "someone/kernel:attention"}}},
    ],
)
def test_whatever_asks_for_code_is_refused(tmp_path: Path, asking: dict[str, object]) -> None:
    with pytest.raises(VerificationError, match="asks for"):
        refuse_code(tmp_path / "config.json", asking)
    refuse_code(tmp_path / "config.json", {"auto_map": None, "trust_remote_code": False, "attn_implementation": "sdpa"})


class Odd:
    def __str__(self) -> str:
        return "odd"


class Colour(StrEnum):
    red = "r"


class Side(Enum):
    left = (1, math.inf)


@dataclass
class Pair:
    first: Any
    second: Any


class Model(BaseModel):
    path: Path = Path("x")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({1: (1, math.nan), "s": {2}}, {"1": [1, "nan"], "s": [2]}),
        (-math.inf, "-inf"),
        (Path("x"), "x"),
        (np.float32(0.5), 0.5),
        (np.array(math.nan), "nan"),
        (Odd(), "odd"),
        (Odd, str(Odd)),
        ([Colour.red, Side.left], ["r", [1, "inf"]]),
        (Pair(True, Model()), {"first": True, "second": {"path": "x"}}),
    ],
    ids=str,
)
def test_any_value_becomes_plain_data(value: Any, wanted: Any) -> None:
    found = plain(value)
    assert found == wanted and type(found) is type(wanted)
    assert json.loads(json.dumps(found, allow_nan=False)) == wanted


def test_a_list_in_itself_ends_as_text() -> None:
    nested: list[object] = []
    nested.append(nested)
    json.dumps(plain(nested))
