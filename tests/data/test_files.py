"""Files of rows: every kind, damaged ones, directories and splits, bounds, and datasets too large to be held."""

from __future__ import annotations

import copy
import csv
import gzip
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from dataset_table import WRITERS, as_parquet, json_lines
from harmony_core.algorithms.checkpointing import digest_of_samples
from harmony_core.data import datasets, files as dataset_files
from harmony_core.data.datasets import DataSet, load_threads
from harmony_core.data.files import Threads
from harmony_core.errors import DataError, HarmonyError, NotFoundError, ResourceError


def rows(*answers: str) -> list[dict[str, Any]]:
    return [{"question": f"{answer}?", "answer": answer, "at": index} for index, answer in enumerate(answers)]


def answers(path: Path) -> list[str | None]:
    return [thread.completion() for thread in load_threads(path)]


def refused(path: Path, kind: type[HarmonyError] = DataError) -> str:
    with pytest.raises(kind) as error:
        load_threads(path)
    return str(error.value).replace(str(path), "d")


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("packed", [False, True])
def test_kinds_of_files(name: str, packed: bool, tmp_path: Path) -> None:
    data = WRITERS[name](rows("ä\n\u2028", "b", "c"))
    packed = packed and not name.endswith(".gz")
    file = tmp_path / (f"{name}.gz" if packed else name)
    file.write_bytes(gzip.compress(data) if packed else data)
    assert answers(file) == ["ä\n\u2028", "b", "c"]
    file.with_suffix(".txt").write_bytes(file.read_bytes())
    if "csv" not in name:
        assert answers(file.with_suffix(".txt")) == ["ä\n\u2028", "b", "c"]


def test_tsv_byte_order_marks_and_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("\ufeffquestion\tanswer\na?\t7\n")
    assert answers(tmp_path / "a.tsv") == ["7"]
    (tmp_path / "a.json").write_text('\ufeff [{"question": "a?", "answer": "7"}]\n')
    assert answers(tmp_path / "a.json") == ["7"]
    (tmp_path / "b.json").write_bytes(json_lines(rows("8")))
    assert answers(tmp_path / "b.json") == ["8"]
    (tmp_path / "c.csv").write_text('question,answer\na?,"7\n8"\n\nb?,\nc?,9\n')
    assert refused(tmp_path / "c.csv").startswith("d:5: has the fields of prompts, row 3 those of completions")


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    rng, whole, file = random.Random(1), WRITERS[name](rows(*"abcdefgh")), tmp_path / name
    for _ in range(60):
        data = bytearray(whole[: rng.randint(1, len(whole))] if rng.random() < 0.3 else whole)
        for _ in range(rng.randint(0, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(bytes(data))
        try:
            load_threads(file)
        except DataError as error:
            assert str(file) in error.message


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("d.csv", b"a,a\n1,2\n", "d:1: two columns have one name"),
        ("d.csv", b"question,answer\nx\n", "d:2: has 1 cells for 2 columns"),
        ("d.csv", b'question,answer\n"x"y,1\n', "d:2: not CSV"),
        ("d.csv", b"question,answer\n\xff,1\n", "not UTF-8"),
        ("d.csv", b"question,answer\n", "has no line with a sample"),
        ("d.json", b'[{"question": "a", "answer": "b"},\n', "not JSON: Input data was truncated"),
        ("d.json", b'{\n "rows": []\n}\n', "is one JSON object over several lines"),
        ("d.json", b'[{"question": "a", "answer": "b"}, 3]', "d:2: must be one JSON object, not a number"),
        ("d.jsonl", b'[{"role": "user"}]\n[{"role": "user"}]\n', "d:1: must be one JSON object, not an array"),
        ("d.parquet", b"PAR1 nothing", "not Parquet, or damaged"),
        ("d.arrow", b"ARROW1 nothing", "not Arrow, or damaged"),
        ("d.jsonl.zst", b"\x28\xb5\x2f\xfd....", "compressed in a way that is not read (gzip is): zstd -d d"),
        ("d.zip", b"PK\x03\x04....", "unzip d"),
        ("d.jsonl.gz", gzip.compress(b"{}" * 100, mtime=0)[:-9], "is damaged"),
        ("d.jsonl.gz", b"\x1f\x8b....", "is damaged"),
    ],
)
def test_files_that_are_refused(name: str, data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert reason in refused(tmp_path / name).replace(name, "d")


def test_what_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_files, "LEAST_UNPACKED_BYTES", 1 << 20)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b" " * (8 << 20)))
    assert "unpacks to more than" in refused(tmp_path / "d.jsonl.gz")
    monkeypatch.setattr(dataset_files, "_MAX_GROUP_BYTES", 10)
    (tmp_path / "d.parquet").write_bytes(as_parquet(rows("a")))
    assert "has a row group of more than 10 bytes" in refused(tmp_path / "d.parquet")


def test_values_that_json_has_not(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "raw": [b"\x00"], "at": pa.array([0], pa.timestamp("s")), "nan": [float("nan")]})
    parquet.write_table(table, tmp_path / "d.parquet")
    (thread,) = load_threads(tmp_path / "d.parquet")
    assert thread.metadata == {"raw": "AA==", "at": "1970-01-01T00:00:00", "nan": None}


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "d.parquet").write_bytes(as_parquet(rows("a")))
    assert "pip install 'harmony-core[data]'" in refused(tmp_path / "d.parquet", ResourceError)


def test_directories_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.parquet").write_bytes(as_parquet(rows("b")))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(rows("a"))))
    for other in ("README.md", ".hidden.jsonl", "dataset_info.json"):
        (tmp_path / other).write_text("{")
    assert answers(tmp_path) == ["a", "b"]
    assert answers(tmp_path / "*.gz") == ["a"]
    (tmp_path / "c.jsonl.zst").touch()
    assert "holds c.jsonl.zst, which is no file of rows" in refused(tmp_path)


def test_several_splits_are_not_one_dataset(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001", "train-00001-of-00002"):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines(rows(name)))
    assert len(answers(tmp_path)) == 2
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "data.jsonl").write_bytes(json_lines(rows("secret")))
    assert "holds several splits (test, train): name the files of one, as in d/train*" in refused(tmp_path)
    assert len(answers(tmp_path / "train*")) == 2


def test_paths_that_are_no_files_of_rows(tmp_path: Path) -> None:
    assert "holds no file of rows" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "is neither a file nor a directory" in refused(tmp_path / "pipe.jsonl")
    (tmp_path / "rows.csv").touch()
    assert "did you mean rows.csv" in refused(tmp_path / "rows.cvs", NotFoundError)


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Threads:
    monkeypatch.setattr(datasets, "HELD_ROWS", 10)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf\n" + json_lines(rows(*map(str, range(20)))))
    (tmp_path / "b.parquet").write_bytes(as_parquet(rows("x" * 100_000, "21", "22")))
    threads = load_threads(tmp_path)
    assert isinstance(threads, Threads)
    return threads


def test_a_large_dataset_is_read_when_it_is_used(large: Threads, tmp_path: Path) -> None:
    expected = [*map(str, range(20)), "x" * 100_000, "21", "22"]
    assert [thread.completion() for thread in large] == expected and len(large) == 23
    assert [thread.completion() for thread in large[1:9:3]] == ["1", "4", "7"] and large[-1].completion() == "22"
    assert [thread.completion() for thread in large[2:][:2]] == ["2", "3"]
    with pytest.raises(IndexError):
        large[23]
    order = [thread.completion() for thread in DataSet(large, seed=3)]
    assert order == [thread.completion() for thread in DataSet(list(large), seed=3)]
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"a\.jsonl: was changed while it was in use"):
        large[0]
    assert large[21].completion() == "21"


ODD = [
    '{"messages": []}',
    '{"messages": null}',
    '{"messages": [{"role": "user", "content": "a"}]}',
    '{"messages": [{"role": "assistant", "content": "a"}]}',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "images": ["x"]}',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "choices": ["x"]}',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": false}',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 1e999}',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "weight": -1}',
    '{"messages": [{"role": "user", "content": "a"}], "choices": ["x"]}',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": -1}]}',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 2}]}',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "ASSISTANT", "content": "b"}]}',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "pirate", "content": "b"}]}',
    '{"messages": [{"role": "user", "content": "\\u003cimage>"}, {"role": "assistant", "content": "b"}]}',
    '{"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "b"}]}',
    '{"messages": [{"role": "user", "content": "\udcff"}, {"role": "assistant", "content": "b"}]}',
    '{"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}',
    '{"messages": [{"from": "human", "value": "a"}, {"role": "assistant", "content": "b"}]}',
    '{"messages": ["a", "b"]}',
    '{"prompt": "a", "completion": "b"}',
    '{"id": 1}',
    '{"messages": [',
]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("more", [{}, {"choices": None}, {"images": None, "weight": 1}])
@pytest.mark.parametrize("options", [{}, {"kind": "prompts"}, {"kind": "completions"}, {"feedback_key": "id"}])
def test_a_large_dataset_is_checked_as_a_small_one_is(
    count: int, more: dict[str, Any], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}][:count]
    usual = json.dumps({"messages": turns, "id": 3, **more})
    for line in ODD:
        shared = [line, usual, usual]
        for old, new in {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}.items():
            shared = [text.replace(f'"{old}"', f'"{new}"') for text in shared]
        for lines in ([usual] * 4 + [line, usual], [shared[1]] * 4 + shared)[: 1 if more else 2]:
            (tmp_path / "d.jsonl").write_text("\n".join(lines), errors="surrogateescape")
            found: list[Any] = []
            for held in (10, 2):
                monkeypatch.setattr(datasets, "HELD_ROWS", held)
                try:
                    threads = load_threads(tmp_path / "d.jsonl", **options)
                    assert isinstance(threads, Threads) == (held == 2)
                    found.append([(thread.turns, thread.metadata) for thread in threads])
                except DataError as error:
                    found.append(error.message)
            assert found[0] == found[1], line


def test_what_is_written_into_the_metadata_of_a_large_dataset_is_kept(large: Threads) -> None:
    large[3].metadata["score"] = 1
    large[4].metadata |= {"at": "four"}
    assert large[3].metadata == {"at": 3, "score": 1} and large[2:][2].metadata == {"at": "four"}
    sample = next(DataSet(large))
    assert sample.metadata["sample_index"] == 0 and all("sample_index" not in thread.metadata for thread in large)
    copied = copy.deepcopy(large[5].metadata)
    copied["mine"] = 1
    assert large[5].metadata == {"at": 5} and json.loads(json.dumps(large[5].metadata)) == {"at": 5}


def test_the_digest_of_a_large_dataset(large: Threads, tmp_path: Path) -> None:
    digest = digest_of_samples(large)
    assert digest == digest_of_samples(load_threads(tmp_path)) and digest != digest_of_samples(large[1:])
    assert digest != digest_of_samples(load_threads(tmp_path, kind="prompts"))
    (tmp_path / "a.jsonl").write_bytes(json_lines(rows(*map(str, range(19)))))
    assert digest != digest_of_samples(load_threads(tmp_path))


def test_cells_may_be_long(tmp_path: Path) -> None:
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["question", "answer"], ["a", "b" * 1_000_000]])
    assert answers(tmp_path / "d.csv") == ["b" * 1_000_000]
