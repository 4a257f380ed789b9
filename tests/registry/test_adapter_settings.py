"""Each setting that peft's LoRA has: we compute what peft computes, or refuse it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models
from harmony_core.engine.models.adapters import load_adapter
from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.errors import ModelRefused
from harmony_core.home import Home
from harmony_core.model.weight_files import check_adapter_config
from harmony_core.registry import Registry

IDS = torch.arange(3, 20)
TARGETS = ["q_proj", "down_proj"]

HONOURED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank": {"r": 3, "lora_alpha": 5},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.3},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "one layer": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "some layers": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["down_proj"]},
    "pattern": {"target_modules": r".*\.(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "full names": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "ensure_weight_tying": {"ensure_weight_tying": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "not initialised": {"init_lora_weights": False},
}
REFUSED: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, fast": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "dora": {"use_dora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 3}},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [4, 5]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "alora": {"alora_invocation_tokens": [4, 5]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
}
"""A part of what is refused, made by peft. What else it has is in NAMES."""
NAMES = {
    *("target_parameters", "use_qalora", "megatron_config", "velora_config", "monteclora_config"),
    *("use_bdlora", "arrow_config", "kasa_config"),
}


@pytest.fixture
def home(tmp_path: Path) -> Registry:
    registry = Registry(Home.open(tmp_path / "home"))
    registry.add("base", str(tiny_models.build(tmp_path / "base", "llama", attention_bias=True)))
    return registry


def adapted(registry: Registry, directory: Path, settings: dict[str, Any]) -> torch.Tensor:
    """Save an adapter that peft made; the log-probs that it gives when it is read back."""
    base = registry.resolve("base").path
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings}
    )
    model: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    again: Any = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory).eval()
    with torch.no_grad():
        logits: torch.Tensor = again(IDS[None]).logits[0]
    return logits.log_softmax(-1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HONOURED)
def test_what_is_taken_gives_what_peft_gives(home: Registry, tmp_path: Path, name: str) -> None:
    expected = adapted(home, tmp_path / "adapter", HONOURED[name])
    version = home.add("adapter", str(tmp_path / "adapter"))
    model = load_model(version.weights_dir, TensorParallel.single(), torch.device("cpu"), torch.float32)
    load_adapter(model, "a", version.path)
    with torch.no_grad(), forward_context(ForwardContext(PackedAttention((len(IDS),)), "a")):
        found = model.logits(model.hidden_states(IDS, torch.arange(len(IDS)))).log_softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_give_something_else_is_refused(home: Registry, tmp_path: Path, name: str) -> None:
    adapted(home, tmp_path / "adapter", REFUSED[name])
    with pytest.raises(ModelRefused) as caught:
        home.add("adapter", str(tmp_path / "adapter"))
    setting = next(iter(REFUSED[name]))
    assert setting in str(caught.value) or setting == "target_modules", caught.value
    assert home.versions("adapter") == []


def test_every_setting_of_peft_has_a_place() -> None:
    known = {field.name for field in fields(peft.LoraConfig)} - {"peft_type"}
    tried = {name for settings in (*HONOURED.values(), *REFUSED.values()) for name in settings}
    silent = {name for name in known if not refused({name: {"on": 1}})}
    assert known - silent - tried == NAMES, "new settings: are they what the table of the documentation says?"
    for start in ("corda", "loftq", "lora_ga", "PiSSA", "something_new"):
        assert refused({"init_lora_weights": start})
    assert not any(refused({"init_lora_weights": start}) for start in ("eva", True, False, None))
    assert refused({"exclude_modules": ".*"}) and refused({"layers_pattern": "h"})


def refused(settings: dict[str, Any]) -> bool:
    try:
        check_adapter_config(Path("adapter_config.json"), {"peft_type": "LORA"} | settings)
    except ModelRefused:
        return True
    return False
