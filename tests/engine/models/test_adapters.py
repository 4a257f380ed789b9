"""Several adapters on one base: the context chooses, peft's switches stay untouched, removal leaves nothing."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from harmony_core.engine.models.adapters import add_lora, copy_adapter, load_adapter, remove_adapter
from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.engine.models.weights import load_into, save_adapter
from harmony_core.errors import ConflictError, HarmonyError, ModelRefused, VerificationError
from harmony_core.rpc.protocol import LoraSettings

TOKENS = torch.arange(3, 20)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build(tmp_path_factory.mktemp("model"), "qwen2", attention_bias=True)


@pytest.fixture
def model(directory: Path) -> CausalLM:
    return load_model(directory, TensorParallel.single(), torch.device("cpu"), torch.float32)


def hidden(model: CausalLM, adapter: str | None, seed: int | None = None) -> torch.Tensor:
    layout = PackedAttention((len(TOKENS),))
    with forward_context(ForwardContext(layout, adapter, seed or 0, dropout=seed is not None)):
        return model.hidden_states(TOKENS, torch.arange(len(TOKENS)))


def randomise(model: CausalLM, name: str) -> None:
    with torch.no_grad():
        for parameter in model.adapters[name].parameters.values():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))


def test_training_one_adapter_touches_neither_the_base_nor_another(model: CausalLM) -> None:
    for name in ("one", "two"):
        add_lora(model, name, LoraSettings(rank=2))
        randomise(model, name)
    first, second = model.trainable_parameters("one"), model.trainable_parameters("two")
    hidden(model, "one").sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in first.values())
    assert all(p.grad is None for p in second.values())
    assert all(p.grad is None for p in model.base_parameters.values())
    add_lora(model, "three", LoraSettings(rank=2))
    remove_adapter(model, "three")
    assert all(p.requires_grad for p in (*first.values(), *second.values()))
    assert not any(p.requires_grad for p in model.base_parameters.values())


def test_adding_an_adapter_leaves_a_base_in_training_trainable(model: CausalLM) -> None:
    model.trainable_parameters(None)
    add_lora(model, "one", LoraSettings(rank=2))
    assert all(p.requires_grad for p in model.base_parameters.values())


def test_a_new_adapter_changes_nothing_and_none_means_the_base(model: CausalLM) -> None:
    before = hidden(model, None)
    add_lora(model, "one", LoraSettings(rank=2))
    assert torch.equal(hidden(model, "one"), before)
    randomise(model, "one")
    assert not torch.allclose(hidden(model, "one"), before, atol=1e-2)
    assert torch.equal(hidden(model, None), before)


def test_names_may_hold_dots_and_anything_else(model: CausalLM) -> None:
    add_lora(model, "policy.v2/é keys", LoraSettings(rank=2))
    hidden(model, "policy.v2/é keys")
    with pytest.raises(ConflictError, match=r"policy\.v2/é keys"):
        add_lora(model, "policy.v2/é keys", LoraSettings(rank=2))


def test_removal_frees_the_parameters_and_unwraps_the_layers(model: CausalLM) -> None:
    shape = {name: type(child) for name, child in model.module.named_modules()}
    before = hidden(model, None)
    add_lora(model, "one", LoraSettings(rank=2))
    add_lora(model, "two", LoraSettings(rank=2, targets=("q_proj",)))
    references = [weakref.ref(p) for p in model.adapters["one"].parameters.values()]
    remove_adapter(model, "one")
    gc.collect()
    assert all(reference() is None for reference in references)
    hidden(model, "two")
    remove_adapter(model, "two")
    assert {name: type(child) for name, child in model.module.named_modules()} == shape
    assert torch.equal(hidden(model, None), before)


def test_a_copy_does_not_follow_its_source(model: CausalLM) -> None:
    add_lora(model, "one", LoraSettings(rank=2))
    randomise(model, "one")
    copy_adapter(model, "one", "frozen")
    before = hidden(model, "frozen")
    assert torch.equal(before, hidden(model, "one"))
    with torch.no_grad():
        for parameter in model.adapters["one"].parameters.values():
            parameter.zero_()
    assert torch.equal(hidden(model, "frozen"), before)
    assert not any(p.requires_grad for p in model.adapters["frozen"].parameters.values())


def test_a_private_copy_of_the_base_has_no_adapter_and_its_own_memory(model: CausalLM) -> None:
    add_lora(model, "one", LoraSettings(rank=2))
    private = model.copy_weights()
    assert private.adapters == {} and private.base_parameters.keys() == model.base_parameters.keys()
    assert torch.equal(hidden(private, None), hidden(model, None))
    with torch.no_grad():
        private.base_parameters["model.norm.weight"].zero_()
    assert hidden(model, None).abs().max() > 0


def test_dropout_draws_from_the_seed_and_only_in_training(model: CausalLM) -> None:
    add_lora(model, "one", LoraSettings(rank=4, dropout=0.5))
    randomise(model, "one")
    frozen = hidden(model, "one")
    assert torch.equal(frozen, hidden(model, "one", seed=1)), "an adapter that is not trained drops nothing"
    model.trainable_parameters("one")
    first = hidden(model, "one", seed=1)
    assert torch.equal(first, hidden(model, "one", seed=1))
    assert not torch.equal(first, hidden(model, "one", seed=2))
    assert torch.equal(frozen, hidden(model, "one")), "only where it is asked for"
    with torch.no_grad():
        assert torch.equal(first, hidden(model, "one", seed=1)), "the same without gradients"


def test_recomputed_layers_drop_the_same(model: CausalLM) -> None:
    add_lora(model, "one", LoraSettings(rank=4, dropout=0.5))
    randomise(model, "one")
    parameters = model.trainable_parameters("one")
    gradients = []
    for count in (0, 2):
        model.set_checkpointed_layers(count)
        with forward_context(ForwardContext(PackedAttention((len(TOKENS),)), "one", seed=9, dropout=True)):
            model.hidden_states(TOKENS, torch.arange(len(TOKENS))).square().sum().backward()
        gradients.append([p.grad.clone() for p in parameters.values() if p.grad is not None])
        for parameter in parameters.values():
            parameter.grad = None
    assert len(gradients[0]) == len(parameters)
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("q_prj",)}, "did you mean q_proj"),
        ({"targets": ("lm_head",)}, "lm_head"),
        ({"targets": ("embed_tokens",)}, "embed_tokens"),
        ({"targets": ()}, "at least one target"),
        ({"rank": 0}, "rank=0"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_settings_that_make_no_adapter_are_refused(model: CausalLM, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelRefused, match=message):
        add_lora(model, "one", LoraSettings(**settings))
    assert model.adapters == {}
    assert not any("lora" in name for name, _ in model.module.named_modules())


def save(model: CausalLM, directory: Path, **settings: Any) -> Path:
    directory.mkdir()
    add_lora(model, "saved", LoraSettings(**{"rank": 4, "alpha": 6.0, **settings}))
    randomise(model, "saved")
    save_adapter(model, "saved", directory, "base@3", write=True)
    return directory


def edit(directory: Path, **values: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_stored_adapter_names_its_base(model: CausalLM, tmp_path: Path) -> None:
    config = json.loads((save(model, tmp_path / "a") / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base@3"
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 6, "LORA")


def test_only_the_layers_that_the_file_holds_are_adapted(model: CausalLM, tmp_path: Path) -> None:
    path = save(model, tmp_path / "a", targets=("layers.1.self_attn.q_proj", "down_proj"))
    load_adapter(model, "back", path)
    assert model.adapters["back"].parameters.keys() == model.adapters["saved"].parameters.keys()
    assert torch.equal(hidden(model, "back"), hidden(model, "saved"))


def test_rank_stabilised_scaling_is_converted(model: CausalLM, tmp_path: Path) -> None:
    path = save(model, tmp_path / "a")
    edit(path, use_rslora=True)
    load_adapter(model, "back", path)
    settings = model.adapters["back"].settings
    assert settings.alpha / settings.rank == pytest.approx(6.0 / 4**0.5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"use_dora": True}, ModelRefused, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, ModelRefused, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, ModelRefused, "rank_pattern"),
        ({"bias": "all"}, ModelRefused, "bias=all"),
        ({"peft_type": "IA3"}, ModelRefused, "IA3"),
        ({"something_new": 3}, ModelRefused, "something_new=3"),
        ({"r": 5}, VerificationError, r"lora_A.weight has shape \[4, 32\], the model needs \[5, 32\]"),
        ({"r": "many"}, VerificationError, "r, lora_alpha or lora_dropout"),
    ],
)
def test_stored_settings_that_would_be_ignored_are_refused(
    model: CausalLM, tmp_path: Path, change: dict[str, Any], error: type[HarmonyError], message: str
) -> None:
    path = save(model, tmp_path / "a")
    edit(path, **change)
    with pytest.raises(error, match=message):
        load_adapter(model, "back", path)
    assert list(model.adapters) == ["saved"]
    remove_adapter(model, "saved")
    assert not any("lora" in name for name, _ in model.module.named_modules())


def test_loading_over_an_adapter_of_another_shape_is_refused(model: CausalLM, tmp_path: Path) -> None:
    path = save(model, tmp_path / "a")
    add_lora(model, "other", LoraSettings(rank=2, alpha=6.0))
    with pytest.raises(ModelRefused, match="stored with rank 4"):
        load_into(model, path, "other")
    add_lora(model, "fewer", LoraSettings(rank=4, alpha=6.0, targets=("q_proj",)))
    with pytest.raises(ModelRefused, match="other layers"):
        load_into(model, path, "fewer")
