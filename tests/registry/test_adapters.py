from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import small_models
from harmony_core.errors import HarmonyError, ModelRefused, NotFoundError, VerificationError
from harmony_core.home import Home
from harmony_core.registry import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(Home.open(tmp_path / "home"))
    registry.add("base", str(small_models.write_model(tmp_path / "base")))
    return registry


def test_an_adapter_names_its_base_exactly(registry: Registry, tmp_path: Path) -> None:
    source = small_models.write_adapter(tmp_path / "adapter")
    version = registry.add("lora", str(source), base="base")
    base = registry.resolve("base")
    assert (version.format, version.base, version.spec) == ("peft", base, base.spec)
    assert (version.weights_dir, version.weights_digest, version.tokenizer_dir) == (base.path, base.digest, base.path)
    assert version.path != base.path
    assert sorted(p.name for p in version.path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    # A newer version of the base changes nothing: the adapter keeps the one it was made for.
    registry.add("base", str(small_models.write_model(tmp_path / "newer", seed=9)))
    assert registry.resolve("lora").base == base


@pytest.mark.parametrize("name", ["base", "base@1", "model_registry://base@1"])
def test_the_config_may_name_the_base(registry: Registry, tmp_path: Path, name: str) -> None:
    version = registry.add("lora", str(small_models.write_adapter(tmp_path / "adapter", base=name)))
    assert version.base and version.base.ref == "base@1"


def test_the_base_may_be_named_by_where_it_came_from(registry: Registry, tmp_path: Path) -> None:
    version = registry.add("lora", str(small_models.write_adapter(tmp_path / "a", base=str(tmp_path / "base"))))
    assert version.base and version.base.ref == "base@1"


def test_a_base_from_the_hub_is_of_the_commit_that_is_named(registry: Registry, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    with registry.stage() as staging:
        small_models.write_model(staging.directory)
        staging.publish("hub", source=f"hf:org/name@{commit}")
    same = small_models.write_adapter(tmp_path / "a", base="org/name", revision=commit)
    assert (found := registry.add("lora", str(same)).base) and found.ref == "hub@1"
    other = small_models.write_adapter(tmp_path / "b", base="org/name", revision="f" * 40)
    with pytest.raises(NotFoundError, match=r"org/name@f{40}"):
        registry.add("lora", str(other))


def test_an_adapter_of_another_home_finds_a_base_with_the_same_bytes(registry: Registry, tmp_path: Path) -> None:
    source = small_models.write_adapter(tmp_path / "a", base="/nowhere/base")
    record = {"ref": "base@1", "digest": registry.resolve("base").digest}
    small_models.write_json(source / "manifest.json", {"base": record | {"digest": "0" * 64}})
    with pytest.raises(NotFoundError, match="/nowhere/base"):
        registry.add("lora", str(source))
    small_models.write_json(source / "manifest.json", {"base": record})
    assert (found := registry.add("lora", str(source)).base) and found.ref == "base@1"


def test_a_base_that_is_not_there(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        registry.add("lora", str(small_models.write_adapter(tmp_path / "a", base="meta/Llama-3")))
    assert "adaptive models add llama-3 hf:meta/Llama-3" in caught.value.hint
    assert "--base KEY" in caught.value.hint
    with pytest.raises(ModelRefused, match="names no base model"):
        registry.add("lora", str(small_models.write_adapter(tmp_path / "b")))
    with pytest.raises(NotFoundError):
        registry.add("lora", str(small_models.write_adapter(tmp_path / "c")), base="bass")


def test_an_adapter_is_no_base(registry: Registry, tmp_path: Path) -> None:
    source = str(small_models.write_adapter(tmp_path / "a"))
    registry.add("lora", source, base="base")
    with pytest.raises(ModelRefused, match="lora@1 is an adapter itself") as caught:
        registry.add("again", source, base="lora")
    assert "base@1" in caught.value.hint


def test_settings_come_from_the_base_until_they_are_set(registry: Registry, tmp_path: Path) -> None:
    registry.add("lora", str(small_models.write_adapter(tmp_path / "a")), base="base")
    registry.set_defaults("base", {"tp": 2, "kv_cache_len": 100})
    registry.set_defaults("lora", {"kv_cache_len": 50})
    effective = registry.resolve("lora").defaults.effective()
    assert effective["tp"] == (2, "stored with base")
    assert effective["kv_cache_len"] == (50, "stored with lora")


def test_a_base_that_changed_or_went_is_said(registry: Registry, tmp_path: Path) -> None:
    registry.add("lora", str(small_models.write_adapter(tmp_path / "a")), base="base")
    path = registry.directory("lora", 1) / "manifest.json"
    record = json.loads(path.read_text())
    small_models.write_json(path, record | {"base": {"ref": "base@1", "digest": "0" * 64}})
    with pytest.raises(VerificationError, match="not the same model any more"):
        registry.resolve("lora")
    small_models.write_json(path, record | {"base": {"ref": "gone@1", "digest": "0" * 64}})
    with pytest.raises(NotFoundError, match="an adapter of gone@1, which is gone"):
        registry.resolve("lora")


def spoil_weights(directory: Path, **tensors: Any) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj."
    found = {name + "lora_A.weight": (2, 8), name + "lora_B.weight": (8, 2)}
    found |= {key.replace("__", "."): shape for key, shape in tensors.items()}
    small_models.write_safetensors(directory / "adapter_model.safetensors", found)


def test_an_adapter_with_a_head_is_scalar_and_so_is_one_on_a_scalar_base(registry: Registry, tmp_path: Path) -> None:
    source = small_models.write_adapter(tmp_path / "a", modules_to_save=["classifier", "score"], task_type="SEQ_CLS")
    with pytest.raises(VerificationError, match=r"score\.weight.* is missing"):
        registry.add("critic", str(source), base="base")
    spoil_weights(source, base_model__model__score__weight=(1, 8))
    assert registry.add("critic", str(source), base="base").kind == "scalar"
    spoil_weights(source, base_model__model__score__weight=(2, 8))
    with pytest.raises(VerificationError, match=r"not \[1, 8\]"):
        registry.add("critic", str(source), base="base")
    registry.add("reward", str(small_models.make_scalar(small_models.write_model(tmp_path / "reward"))))
    assert registry.add("lora", str(small_models.write_adapter(tmp_path / "b")), base="reward").kind == "scalar"


PREFIX = "base_model__model__model__layers__"
REFUSED: list[tuple[dict[str, Any], dict[str, Any], type[HarmonyError], str]] = [
    ({"peft_type": "IA3"}, {}, ModelRefused, "IA3"),
    ({"use_dora": True}, {}, ModelRefused, "use_dora"),
    ({"modules_to_save": ["lm_head"]}, {}, ModelRefused, "modules_to_save"),
    ({"rank_pattern": {"q_proj": 4}}, {}, ModelRefused, "rank_pattern"),
    ({"bias": "all"}, {}, ModelRefused, "bias"),
    ({"r": 0}, {}, VerificationError, "not a positive whole number"),
    ({"r": 4}, {}, ModelRefused, "with rank 4"),
    ({}, {PREFIX + "9__self_attn__q_proj__lora_A__weight": (2, 8)}, ModelRefused, "is for layer 9; base@1 has 2"),
    ({}, {PREFIX + "1__self_attn__q_proj__lora_A__weight": (2, 9)}, ModelRefused, "another model's adapter"),
    ({}, {PREFIX + "1__self_attn__q_proj__lora_A__weight": (2, 8)}, VerificationError, "one of its two halves"),
    ({}, {"base_model__model__lm_head__lora_A__weight": (2, 8)}, ModelRefused, "not a LoRA half"),
    ({}, {"model__embed_tokens__weight": (12, 8)}, ModelRefused, "not a LoRA half"),
    ({"auto_map": {"A": "b.C"}}, {}, VerificationError, "never run"),
    ({"something_new": 1}, {}, ModelRefused, "something_new"),
    ({"init_lora_weights": "pissa_niter_4"}, {}, ModelRefused, "belongs to a base changed with it"),
    ({"target_modules": ["q_proj"]}, {}, ModelRefused, "leave out"),
    ({"layers_to_transform": 0}, {}, ModelRefused, "leave out"),
    ({"exclude_modules": ["q_proj"]}, {}, ModelRefused, "leave out"),
    ({"layers_pattern": "h"}, {}, ModelRefused, "layers_pattern"),
]


@pytest.mark.parametrize(("settings", "tensors", "error", "words"), REFUSED)
def test_what_does_not_fit_is_refused(
    registry: Registry,
    tmp_path: Path,
    settings: dict[str, Any],
    tensors: dict[str, Any],
    error: type[HarmonyError],
    words: str,
) -> None:
    source = small_models.write_adapter(tmp_path / "adapter", **settings)
    if tensors:
        spoil_weights(source, **tensors)
    with pytest.raises(error) as caught:
        registry.add("lora", str(source), base="base")
    assert words in str(caught.value)
    assert registry.versions("lora") == []


def test_pickled_adapters_are_refused(registry: Registry, tmp_path: Path) -> None:
    source = small_models.write_adapter(tmp_path / "adapter")
    (source / "adapter_model.safetensors").rename(source / "adapter_model.bin")
    with pytest.raises(VerificationError, match=r"never read \(adapter_model\.bin\)"):
        registry.add("lora", str(source), base="base")


def test_an_adapter_that_peft_saved_is_taken_and_loads_again(registry: Registry, tmp_path: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = registry.resolve("base")
    model: Any = AutoModelForCausalLM.from_pretrained(base.path)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    adapted: Any = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, 5, 3]])
    with torch.no_grad():
        before = adapted(ids).logits
    version = registry.add("lora", str(tmp_path / "adapter"))
    assert version.base and version.base.ref == "base@1"
    again: Any = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), str(version.path))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, before)
