"""Datasets of a hub on this machine: configs, splits, a commit that stays, and no network the second time."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataset_table import as_parquet, json_lines
from harmony_core.config.parameters import Dataset
from harmony_core.data import datasets as dataset_hub
from harmony_core.data.datasets import convert_sample_dict, load_from_hf, load_threads
from harmony_core.errors import DataError, HarmonyError, NotFoundError, ResourceError, UsageError, VerificationError
from hub_server import COMMIT, Hub, serve

CARD = """---
configs:
- config_name: algebra
  data_files:
  - split: train
    path: algebra/train-*.parquet
  - split: test
    path: algebra/test.parquet
- config_name: geometry
  data_files: geometry.jsonl
---
"""


def rows(*answers: str) -> list[dict[str, object]]:
    return [{"question": "2+2?", "answer": answer, "tools": [{"name": "a", "b": None}]} for answer in answers]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    (root / "org/sums/algebra").mkdir(parents=True)
    (root / "org/sums/README.md").write_text(CARD)
    (root / "org/sums/algebra/train-00000.parquet").write_bytes(as_parquet(rows("4", "5")))
    (root / "org/sums/algebra/test.parquet").write_bytes(as_parquet(rows("6")))
    (root / "org/sums/geometry.jsonl").write_bytes(json_lines(rows("7")))
    (root / "org/sums/sums.py").write_text("raise SystemExit('a script was run')")
    (root / "org/plain").mkdir()
    (root / "org/plain/train.jsonl").write_bytes(json_lines(rows("8", "9")))
    with serve(root) as running:
        yield running


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Path:
    monkeypatch.setenv("ADAPTIVE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    return tmp_path / "home"


def answers(source: str) -> list[str | None]:
    return [thread.completion() for thread in load_threads(source)]


def test_a_split_of_a_config_is_fetched_once(home: Path, hub: Hub) -> None:
    assert answers("hf:org/sums:algebra:train") == ["4", "5"]
    asked = len(hub.requests)
    assert not any("geometry" in path or path.endswith(".py") for path in hub.requests)
    assert answers("hf:org/sums:algebra:test") == ["6"] and answers("hf:org/sums:algebra:train") == ["4", "5"]
    assert len(hub.requests) == asked
    (note,) = (home / "datasets" / "pins").iterdir()
    assert json.loads(note.read_text())["commit"] == COMMIT


def test_the_only_split_needs_no_name_and_nulls_inside_objects_are_absent() -> None:
    (thread,) = load_threads("hf:org/sums:geometry")
    assert thread.completion() == "7"
    (first, _) = asyncio.run(Dataset.model_validate("hf:org/plain@v1:train").load())
    assert first.completion() == "8" and first.metadata["tools"] == [{"name": "a"}]


@pytest.mark.parametrize(
    ("source", "kind", "reason"),
    [
        ("hf:org/none", NotFoundError, "the hub has no dataset 'org/none'"),
        ("hf:org/plain@v9", NotFoundError, "has no revision 'v9'"),
        ("hf:org/sums", NotFoundError, "has several configs: algebra, geometry"),
        ("hf:org/sums:algebra", NotFoundError, "has several splits: train, test"),
        ("hf:org/sums:algebra:tset", NotFoundError, r"has no split 'tset'[\s\S]*did you mean test"),
        ("hf:org/sums:algbra:test", NotFoundError, r"has no config 'algbra'[\s\S]*did you mean algebra"),
        ("hf:plain", UsageError, "is no dataset of the hub"),
        ("hf:../../x", UsageError, "is no dataset of the hub"),
    ],
)
def test_names_that_mean_nothing(source: str, kind: type[HarmonyError], reason: str) -> None:
    with pytest.raises(kind, match=reason):
        load_threads(source)


def test_a_hub_that_is_away_and_a_damaged_file(home: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answers("hf:org/plain") == ["8", "9"]
    (table,) = (home / "datasets" / "files").rglob("train.jsonl")
    table.resolve().write_text("{")
    shutil.rmtree(home / "datasets" / "tables")
    with pytest.raises(DataError, match="hf:org/plain: cannot be read: "):
        load_threads("hf:org/plain")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ResourceError, match="hf:org/sums cannot be fetched"):
        load_threads("hf:org/sums:algebra:train")


@pytest.mark.parametrize("path", ["/etc/passwd", "../../x.jsonl", "https://127.0.0.1:9/x.jsonl"])
def test_a_card_that_names_files_elsewhere(path: str, hub: Hub) -> None:
    folder = hub.root / "org/card"
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {path}\n---\n")
    with pytest.raises(VerificationError, match="which is no file of the dataset"):
        load_threads("hf:org/card")


def test_load_from_hf(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = convert_sample_dict(None)
    threads = load_from_hf("org/plain", "train", lambda row: convert([{"role": "user", "content": row["answer"]}]))
    assert [thread.last_content() for thread in threads] == ["8", "9"]
    monkeypatch.setattr(dataset_hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"harmony-core\[data\]"):
        load_from_hf("org/plain", "train", convert)
