"""Models and datasets that a configuration names: found, or refused where they were written."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from harmony_core.config import Assignment, Layer, Resolved, Schema, Source, load_yaml, resolve, settle_names, validate
from harmony_core.config.parameters import Dataset, Model, model_kinds
from harmony_core.errors import ModelRefused, NotFoundError
from harmony_core.home import Home
from harmony_core.recipe import InputConfig
from harmony_core.registry import Registry


class Block(BaseModel):
    data: Dataset | None = None
    others: list[Dataset] = Field([])


class Config(InputConfig):
    model: Model[model_kinds.Trainable] = Model(model_key="builtin:tiny-lm")
    judges: list[Model] = Field([])
    data: Dataset = Dataset(dataset_key="own.jsonl", local_file_path="own.jsonl")
    block: Block = Block()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Home.open(tmp_path / "home"))


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three folders: the recipe's, the YAML file's, the working directory."""
    for name in ("recipe", "yaml", "cwd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.jsonl").write_text("")
        (tmp_path / name / "other.jsonl").write_text("")
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


def _settled(folders: Path, registry: Registry, yaml: str, *flags: str) -> tuple[Config, dict[str, dict[str, str]]]:
    schema = Schema(Config.model_json_schema())
    layers: list[Layer] = [load_yaml(yaml, "../yaml/c.yaml")]
    layers += [Assignment.parse(flag, Source("flag", f"--{flag.partition('=')[0]}")) for flag in flags]
    resolved: Resolved = resolve(schema, layers)
    return settle_names(validate(Config, resolved, schema), resolved, registry, folders / "recipe")


def test_files_are_meant_from_where_they_were_named(folders: Path, registry: Registry) -> None:
    config, models = _settled(folders, registry, "block: {data: other.jsonl, others: [./own.jsonl]}")
    assert config.data.path().samefile(folders / "recipe" / "own.jsonl")
    assert config.block.data is not None
    assert config.block.data.path().samefile(folders / "yaml" / "other.jsonl")
    assert config.block.others[0].path().samefile(folders / "yaml" / "own.jsonl")
    assert list(models) == ["model"]
    assert models["model"]["ref"] == "builtin:tiny-lm"
    config, _ = _settled(folders, registry, "data: other.jsonl", "data=other.jsonl", "block={data: own.jsonl}")
    assert config.data.path().samefile(folders / "cwd" / "other.jsonl")
    assert config.block.data is not None
    assert config.block.data.path().samefile(folders / "cwd" / "own.jsonl")


def test_what_is_missing_is_named_all_at_once(folders: Path, registry: Registry) -> None:
    with pytest.raises(NotFoundError) as caught:
        _settled(folders, registry, "model: builtin:tiny-ml\ndata: othr.jsonl\njudges: [hf/some-model]")
    issues = caught.value.details["issues"]
    assert len(issues) == 3
    assert issues[0].startswith("../yaml/c.yaml:1:8: model: ")
    assert "builtin:tiny-lm" in issues[0]
    assert issues[1].startswith("../yaml/c.yaml:3:10: judges.0: ")
    assert "adaptive models add" in issues[1]
    assert issues[2].startswith("../yaml/c.yaml:2:7: data: ")
    assert "other.jsonl" in issues[2]


def test_a_model_that_cannot_be_trained_is_refused_where_training_is_asked(
    folders: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    tiny = registry.resolve("builtin:tiny-lm")
    monkeypatch.setattr(registry, "resolve", lambda ref: dataclasses.replace(tiny, trainable=False))
    with pytest.raises(ModelRefused, match=r"--model: .*cannot be trained"):
        _settled(folders, registry, "judges: [builtin:tiny-lm]", "model=builtin:tiny-lm")
