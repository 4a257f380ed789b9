"""The hub source, with the real client against a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import small_models
from harmony_core.home import Home
from harmony_core.registry import Registry
from hub_server import COMMIT, Hub, serve

ADD = """
import json, sys
from harmony_core.errors import HarmonyError
from harmony_core.home import Home
from harmony_core.registry import Registry

registry = Registry(Home.open(sys.argv[1]))
answers = []
for key, source, options in json.loads(sys.argv[2]):
    try:
        answers.append({"ref": registry.add(key, source, **options).ref})
    except HarmonyError as error:
        answers.append({"exit": error.exit_code, "error": str(error)})
heavy = [name for name in ("torch", "transformers") if name in sys.modules]
print(json.dumps({"answers": answers, "heavy": heavy}))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve(tmp_path / "hub") as running:
        yield running


def add(tmp_path: Path, endpoint: str, *adds: tuple[str, str], offline: bool = False, **options: Any) -> list[Any]:
    """`registry.add` in a fresh process, because the client reads its environment when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_ETAG_TIMEOUT": "2",
        "NO_PROXY": "127.0.0.1",
    }
    work = json.dumps([(key, source, options) for key, source in adds])
    done = subprocess.run(
        [sys.executable, "-c", ADD, str(tmp_path / "home"), work],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["heavy"] == []
    return list(answer["answers"])


def test_a_model_comes_pinned_to_its_commit_and_without_the_rest(tmp_path: Path, hub: Hub) -> None:
    repository = small_models.write_model(hub.root / "Org" / "Small", shards=2)
    for name in ("pytorch_model.bin", "modeling_x.py", "README.md", "onnx/model.onnx", "tf_model.h5"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(b"x" * 50)
    assert add(tmp_path, hub.url, ("small", "hf:Org/Small"), ("small", "hf:Org/Small@v1")) == [
        {"ref": "small@1"},
        {"ref": "small@2"},
    ]
    registry = Registry(Home.open(tmp_path / "home"))
    version = registry.verify("small@1")
    assert version.source == f"hf:Org/Small@{COMMIT}"
    assert sorted(path.name for path in version.path.iterdir()) == [
        "config.json",
        "manifest.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not any(path.is_symlink() for path in version.path.iterdir())
    fetched = {path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path}
    assert fetched.isdisjoint({"pytorch_model.bin", "modeling_x.py", "README.md", "model.onnx", "tf_model.h5"})
    assert all(f"/resolve/{COMMIT}/" in path for path in hub.requests if "/resolve/" in path)
    # The weights lie once on the disk, shared with the client's cache.
    assert (version.path / "model-00001-of-00002.safetensors").stat().st_nlink >= 2


def test_once_fetched_it_needs_no_network(tmp_path: Path, hub: Hub) -> None:
    small_models.write_model(hub.root / "org" / "small")
    assert add(tmp_path, hub.url, ("small", "hf:org/small")) == [{"ref": "small@1"}]
    before = len(hub.requests)
    answers = add(tmp_path, hub.url, ("small", "hf:org/small"), ("other", "hf:org/other"), offline=True)
    assert answers[0] == {"ref": "small@2"}
    assert answers[1]["exit"] == 4
    assert len(hub.requests) == before
    assert Registry(Home.open(tmp_path / "home")).resolve("small@2").source == f"hf:org/small@{COMMIT}"


def test_a_reference_leaves_the_weights_in_the_cache(tmp_path: Path, hub: Hub) -> None:
    small_models.write_model(hub.root / "org" / "small")
    assert add(tmp_path, hub.url, ("small", "hf:org/small"), reference=True) == [{"ref": "small@1"}]
    version = Registry(Home.open(tmp_path / "home")).verify("small")
    assert version.path.is_relative_to(tmp_path / "hf")


def test_an_adapter_finds_the_base_that_came_from_the_hub(tmp_path: Path, hub: Hub) -> None:
    small_models.write_model(hub.root / "Org" / "Small")
    small_models.write_adapter(hub.root / "Org" / "Lora", base="Org/Small")
    answers = add(tmp_path, hub.url, ("lora", "hf:Org/Lora"), ("small", "hf:Org/Small"), ("lora", "hf:Org/Lora"))
    assert answers[0]["exit"] == 3
    assert "adaptive models add small hf:Org/Small" in answers[0]["error"]
    assert answers[1:] == [{"ref": "small@1"}, {"ref": "lora@1"}]
    base = Registry(Home.open(tmp_path / "home")).resolve("lora").base
    assert base and base.ref == "small@1"


def test_refusals_come_before_the_weights(tmp_path: Path, hub: Hub) -> None:
    def repository(name: str) -> Path:
        return small_models.write_model(hub.root / "org" / name)

    (repository("pickled") / "model.safetensors").rename(hub.root / "org" / "pickled" / "pytorch_model.bin")
    small_models.write_json(repository("code") / "config.json", small_models.config() | {"auto_map": {"A": "x.B"}})
    small_models.write_json(repository("other") / "config.json", {"model_type": "gpt2"})
    (repository("slow") / "tokenizer.json").rename(hub.root / "org" / "slow" / "tokenizer.model")
    repository("gated")
    hub.gated.add("org/gated")
    (hub.root / "org" / "empty").mkdir()
    (hub.root / "org" / "empty" / "README.md").write_text("x")
    cases = [
        ("hf:org/pickled", 7, "only pickled weights"),
        ("hf:org/code", 7, "never run"),
        ("hf:org/other", 2, "supported model types"),
        ("hf:org/slow", 7, "without tokenizer.json"),
        ("hf:org/gated", 4, "is gated"),
        ("hf:org/empty", 7, "no safetensors"),
        ("hf:org/missing", 3, "the hub has no model"),
        ("hf:org/slow@v9", 3, "no revision 'v9'"),
        ("hf:org", 2, "not a hub id"),
        ("hf:../../x", 2, "not a hub id"),
    ]
    answers = add(tmp_path, hub.url, *(("x", source) for source, _, _ in cases))
    for (source, code, words), answer in zip(cases, answers, strict=True):
        assert (answer["exit"], words in answer["error"]) == (code, True), (source, answer)
    assert not any(path.endswith(".safetensors") for path in hub.requests)
    assert Registry(Home.open(tmp_path / "home")).list() == []


def test_a_hub_that_is_away_or_breaks_off_is_a_typed_error(tmp_path: Path, hub: Hub) -> None:
    small_models.write_model(hub.root / "org" / "small")
    hub.cut.add("model.safetensors")
    (answer,) = add(tmp_path, hub.url, ("small", "hf:org/small"))
    assert answer["exit"] == 4, answer
    (answer,) = add(tmp_path, "http://127.0.0.1:9", ("small", "hf:org/small"))
    assert answer["exit"] == 4, answer
    assert Registry(Home.open(tmp_path / "home")).list() == []
