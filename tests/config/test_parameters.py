from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import BaseModel, ValidationError

from harmony_core.config.parameters import Dataset, Model, dataset_kinds, model_kinds, shipped_data
from harmony_core.errors import DataError, ModelRefused, NotFoundError, UsageError
from harmony_core.graders import Grader
from harmony_core.home import Home
from harmony_core.recipe import InputConfig
from harmony_core.recipe.context import RecipeContext
from harmony_core.registry import Registry


class Config(BaseModel):
    policy: Model[model_kinds.Trainable]
    judge: Model = Model(model_key="builtin:tiny-lm")
    data: Dataset[dataset_kinds.Prompt] | None = None
    graders: set[Grader] = set()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Home.open(tmp_path / "home"))


class Builder:
    """Stands where the client's builder stands: remembers what was set on it."""

    def __init__(self, calls: tuple[Any, ...] = ()) -> None:
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: Builder((*self.calls, (name, args, kwargs)))

    async def spawn_train(self, name: str, max_batch_size: int) -> Any:
        if name == "refused":
            raise ModelRefused("no")
        return self.calls, name, max_batch_size

    async def spawn_inference(self, name: str) -> Any:
        return self.calls, name


class Context:
    """As much of a context as a builder needs."""

    def __init__(self) -> None:
        self.client = self

    def model(self, path: str, **limits: Any) -> Builder:
        return Builder((("model", path, limits),))


def context() -> RecipeContext:
    return cast(RecipeContext, Context())


# --- as configuration -------------------------------------------------------------------------------------------


def test_a_bare_string_or_an_object_makes_a_parameter_with_its_kind() -> None:
    for policy in ("my-model", {"model_key": "my-model"}, Model(model_key="my-model")):
        config = Config.model_validate({"policy": policy, "data": "prompts.jsonl", "graders": ["a", "b", "a"]})
        assert config.policy.model_key == "my-model"
        assert config.policy.kind() is model_kinds.Trainable
        assert config.data is not None
        assert config.data.kind().kind == "prompts"
        assert len(config.graders) == 2
    assert config.judge.kind().kind == "all"


def test_a_subclass_keeps_the_kind() -> None:
    class Policy(Model[model_kinds.Trainable]):
        pass

    assert Policy.kind() is model_kinds.Trainable


def test_it_serialises_to_what_it_is_written_as() -> None:
    config = Config.model_validate_json('{"policy": "a/b@3", "data": "d/x.jsonl", "graders": ["g"]}')
    dumped = json.loads(config.model_dump_json())
    assert dumped["policy"] == "a/b@3"
    assert dumped["judge"] == "builtin:tiny-lm"
    assert dumped["graders"] == ["g"]
    assert dumped["data"] == {"dataset_key": "d/x.jsonl", "feedback_key": None, "local_file_path": "d/x.jsonl"}
    assert Config.model_validate(dumped) == config


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "at least 1 character"),
        (3, "expected a name as a string, got int"),
        (None, "expected a name as a string, got NoneType"),
        ({"model_key": "a", "tp": 2}, "Extra inputs"),
        (Dataset(dataset_key="d"), "expected a name as a string, got Dataset"),
    ],
)
def test_anything_else_is_refused(value: object, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Config.model_validate({"policy": value})


def test_the_schema_describes_strings_for_flags() -> None:
    definitions = Config.model_json_schema()["$defs"]
    assert definitions["Model_Trainable_"] == {
        "type": "string",
        "format": "model-key",
        "kind": "trainable",
        "minLength": 1,
    }
    assert definitions["Grader"]["type"] == "string"
    text, fields = definitions["Dataset_Prompt_"]["anyOf"]
    assert (text["type"], text["format"], text["kind"]) == ("string", "dataset-key", "prompts")
    assert fields["type"] == "object"


def test_parameters_are_immutable_and_hashable() -> None:
    model = Model(model_key="a")
    assert {model, Model(model_key="a"), model.tp(2)} == {model, model.tp(2)}
    with pytest.raises(ValidationError, match="frozen"):
        model.model_key = "b"  # type: ignore[misc]
    assert len({Grader(grader_key="a"), Grader(grader_key="a")}) == 1
    assert len({Dataset(dataset_key="a"), Dataset(dataset_key="a", feedback_key="f")}) == 2


# --- models -----------------------------------------------------------------------------------------------------


def test_a_known_key_is_checked_to_its_version(registry: Registry) -> None:
    version = Model[model_kinds.Trainable](model_key="builtin:tiny-lm").check(registry)
    assert version.ref == "builtin:tiny-lm"


def test_an_unknown_key_is_not_found(registry: Registry) -> None:
    with pytest.raises(NotFoundError, match="builtin:tiny-ml") as caught:
        Model(model_key="builtin:tiny-ml").check(registry)
    assert "tiny-lm" in caught.value.hint


def test_what_cannot_be_trained_is_refused_where_training_is_asked(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    frozen = dataclasses.replace(registry.resolve("builtin:tiny-lm"), trainable=False, kind="embedding")
    monkeypatch.setattr(registry, "resolve", lambda ref: frozen)
    with pytest.raises(ModelRefused, match="'e' is of kind embedding and cannot be trained"):
        Model[model_kinds.Trainable](model_key="e").check(registry)
    assert Model(model_key="e").check(registry) is frozen


def test_recorded_calls_are_replayed_after_the_arguments() -> None:
    model = Model[model_kinds.Trainable](model_key="m")
    chosen = model.with_adapter(rank=4).tp(2)
    assert model != chosen, "recording leaves the original as it was"
    builder = cast(Builder, asyncio.run(chosen.to_builder(context(), kv_cache_len=10, tokens_to_generate=5, tp=1)))
    assert builder.calls == (
        ("model", "m", {"kv_cache_len": 10, "tokens_to_generate": 5}),
        ("tp", (1,), {}),
        ("with_adapter", (True,), {"rank": 4}),
        ("tp", (2,), {}),
    )
    plain = cast(Builder, asyncio.run(model.to_builder(context())))
    assert plain.calls == (("model", "m", {"kv_cache_len": None, "tokens_to_generate": None}),)


def test_recorded_calls_survive_validation() -> None:
    config = Config(policy=cast(Any, Model(model_key="m").tp(2)))
    builder = cast(Builder, asyncio.run(config.policy.to_builder(context())))
    assert builder.calls[1] == ("tp", (2,), {})


def test_every_setter_of_the_builder_can_be_recorded() -> None:
    model = Model(model_key="m").with_draft("d", 3).into_scoring_model().extra_params(a=1).tools(["t"]).api_key("k")
    builder = cast(Builder, asyncio.run(model.to_builder(context(), extra_params={"b": 2})))
    assert [name for name, *_ in builder.calls] == [
        "model",
        "extra_params",
        "with_draft",
        "into_scoring_model",
        "extra_params",
        "tools",
        "api_key",
    ]


def test_spawning_in_one_call() -> None:
    model = Model(model_key="m")
    calls, name, size = cast(Any, asyncio.run(model.spawn_train("policy", context(), 4096, tp=2)))
    assert (calls[1], name, size) == (("tp", (2,), {}), "policy", 4096)
    calls, name = cast(Any, asyncio.run(model.spawn_inference("judge", context(), kv_cache_len=64)))
    assert (calls[0][2]["kv_cache_len"], name) == (64, "judge")


def test_a_refused_spawn_keeps_its_class_and_names_the_key() -> None:
    with pytest.raises(ModelRefused) as caught:
        asyncio.run(Model(model_key="m").spawn_train("refused", context(), 1))
    assert any("'m'" in note for note in caught.value.__notes__)


def test_a_grader_is_looked_up_and_not_run(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no grader 'jsno'") as caught:
        Grader(grader_key="jsno").check(registry)
    assert "builtin:json" in caught.value.hint
    (tmp_path / "mine.py").write_text("raise SystemExit\ndef reward(thread): return 1.0\n")
    beside = Grader(grader_key="mine.py:reward").with_base(tmp_path)
    assert beside.check(registry).function == "reward"
    with pytest.raises(NotFoundError, match="no function 'rewards'") as caught:
        Grader(grader_key="mine.py:rewards").with_base(tmp_path).check(registry)
    assert "reward" in caught.value.hint


# --- datasets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "is_file"), [("sort-letters", False), ("x.jsonl", True), ("a/b", True), ("./d", True), ("v1", False)]
)
def test_a_suffix_or_a_slash_makes_a_file(text: str, is_file: bool) -> None:
    assert (Dataset.model_validate(text).local_file_path == text) is is_file


def test_a_relative_file_is_meant_from_its_base(tmp_path: Path) -> None:
    dataset = Dataset.model_validate("data/x.jsonl").with_base(tmp_path)
    assert dataset.local_file_path == str(tmp_path / "data/x.jsonl")
    assert dataset.dataset_key == "data/x.jsonl"
    assert dataset.with_base(Path("/elsewhere")) == dataset, "an absolute path stays"
    named = Dataset.model_validate("sort-letters")
    assert named.with_base(tmp_path) == named
    home = Dataset.model_validate("~/x.jsonl").with_base(tmp_path)
    assert home.local_file_path == str(Path("~/x.jsonl").expanduser())


def test_a_file_is_loaded_as_its_kind(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "q"}], "completion": "a"}\n')
    threads = asyncio.run(Dataset.model_validate(str(file)).load())
    assert [thread.get_turns() for thread in threads] == [[("user", "q"), ("assistant", "a")]]
    prompts = asyncio.run(Dataset[dataset_kinds.Prompt].model_validate(str(file)).load())
    assert [thread.get_turns() for thread in prompts] == [[("user", "q")]]
    file.write_text('{"messages": [{"role": "user", "content": "q"}]}\n{"mess": 1}\n')
    with pytest.raises(DataError, match=r"d\.jsonl:2: "):
        asyncio.run(Dataset.model_validate(str(file)).load())


def test_a_dataset_written_as_an_object(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "d.csv").write_text("ask,reply\nq,a\n,\n")
    columns = {"user": "ask", "assistant": "reply", "tools": None}
    written = {"dataset_key": "d.csv", "columns": columns, "max_refused": 1}
    data = Dataset[dataset_kinds.Completion].model_validate(written).with_base(tmp_path)
    assert data.check(registry) == tmp_path / "d.csv" and data.model_dump(exclude_none=True)["columns"] == columns
    assert Dataset[dataset_kinds.Completion].model_validate(data.model_dump()) == data
    assert [thread.get_turns() for thread in asyncio.run(data.load())] == [[("user", "q"), ("assistant", "a")]]
    with pytest.raises(UsageError, match="columns: there is no 'usr'"):
        Dataset.model_validate(written | {"columns": {"usr": "ask"}}).with_base(tmp_path).check(registry)


def test_a_dataset_of_the_hub_is_no_file(tmp_path: Path, registry: Registry) -> None:
    data = Dataset.model_validate("hf:org/name:train")
    assert data.with_base(tmp_path) == data and data.check(registry) == "hf:org/name:train"
    with pytest.raises(UsageError, match="is no dataset of the hub"):
        Dataset.model_validate("hf:name").check(registry)


def test_a_missing_file_names_its_neighbours(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(NotFoundError, match=r"tran\.jsonl") as caught:
        Dataset.model_validate(str(tmp_path / "tran.jsonl")).check(registry)
    assert "train.jsonl" in caught.value.hint


def test_shipped_data_is_known_by_name(registry: Registry) -> None:
    assert {"sort-letters", "sort-letters-held-out"} <= set(shipped_data())
    assert Dataset.model_validate("sort-letters").check(registry).is_file()
    with pytest.raises(NotFoundError, match="sort-leters") as caught:
        Dataset.model_validate("sort-leters").check(registry)
    assert "sort-letters" in caught.value.hint


def test_a_default_means_what_the_same_string_means_in_yaml(tmp_path: Path) -> None:
    written = Dataset.model_validate("data/train.jsonl")
    assert (
        Dataset("data/train.jsonl")
        == Dataset(dataset_key="data/train.jsonl")
        == Dataset(Path("data/train.jsonl"))
        == written
    )
    assert written.local_file_path == "data/train.jsonl" and Dataset("sort-letters").local_file_path is None
    assert Dataset(**written.model_dump()) == written and Model("builtin:tiny-lm").model_key == "builtin:tiny-lm"
    with pytest.raises(UsageError, match="a Dataset is named by a string, not by 3"):
        Dataset(3)  # type: ignore[arg-type]

    class Config(InputConfig):
        model: Model = "builtin:tiny-lm"  # type: ignore[assignment]
        train: Dataset = "train.jsonl"  # type: ignore[assignment]
        held_out: Dataset | None = "sort-letters"  # type: ignore[assignment]
        note: str = "text"

    config = Config()
    assert config.train.with_base(tmp_path).local_file_path == str(tmp_path / "train.jsonl")
    assert (config.model, config.held_out, config.note) == (Model("builtin:tiny-lm"), Dataset("sort-letters"), "text")
