from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import small_models
from harmony_core.errors import ModelRefused, VerificationError
from harmony_core.model.families import FAMILIES, layer_windows
from harmony_core.model.spec import ModelSpec, check_tp, fitting_tp


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) | changes
    small_models.write_json(path, {name: value for name, value in values.items() if value != "DROP"})


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_scalar_head_is_read_as_transformers_reads_it(tmp_path: Path, family: str) -> None:
    import transformers

    spec = ModelSpec.read(small_models.make_scalar(small_models.write_model(tmp_path, family), family))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.num_labels == 1
    assert spec.scalar and spec.architecture == type(model).__name__
    assert spec.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_classifier_with_several_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="3 labels"):
        ModelSpec.read(small_models.make_scalar(small_models.write_model(tmp_path), labels=3))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_read_as_transformers_reads_it(tmp_path: Path, family: str, tied: bool) -> None:
    import transformers

    spec = ModelSpec.read(small_models.write_model(tmp_path, family, tied=tied, shards=2, dtype="BF16"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    config = model.config
    assert spec.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (spec.architecture, spec.model_type) == (type(model).__name__, config.model_type)
    assert (spec.num_heads, spec.num_kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert (spec.hidden_size, spec.intermediate_size) == (config.hidden_size, config.intermediate_size)
    assert (spec.num_layers, spec.vocab_size) == (config.num_hidden_layers, config.vocab_size)
    assert (spec.tied, spec.stored_dtype, spec.max_positions) == (tied, "bfloat16", 64)
    attention = model.model.layers[0].self_attn
    assert spec.attention_bias == (attention.q_proj.bias is not None)
    assert spec.qk_norm == hasattr(attention, "q_norm")
    assert spec.head_dim == attention.head_dim
    assert spec.post_norms == hasattr(model.model.layers[0], "pre_feedforward_layernorm")


WINDOWS: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 7, "layer_types": ["sliding_attention"] * 4}),
    ("gemma3_text", {}),
    ("gemma3_text", {"sliding_window": 5, "sliding_window_pattern": 2}),
    ("gemma3_text", {"layer_types": ["full_attention", *["sliding_attention"] * 3], "sliding_window_pattern": 2}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}),
    ("qwen2", {"use_sliding_window": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": None}),
    ("qwen2", {"sliding_window": 9}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}),
    ("qwen3", {"use_sliding_window": True, "layer_types": [*["sliding_attention"] * 2, *["full_attention"] * 2]}),
    ("llama", {"sliding_window": 9, "layer_types": ["full_attention"] * 4}),
]


@pytest.mark.parametrize(("family", "changes"), WINDOWS)
def test_windows_are_those_of_transformers(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    import transformers

    path = tmp_path / "config.json"
    small_models.write_json(path, small_models.config(family, layers=4) | changes)
    found = layer_windows(path, json.loads(path.read_text()), 4)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    kinds = getattr(config, "layer_types", None)
    if family == "mistral":
        assert found == (config.sliding_window,) * 4
    elif kinds is None or "sliding_attention" not in kinds:
        assert found == (None,) * 4
    else:
        assert found == tuple(config.sliding_window if kind == "sliding_attention" else None for kind in kinds)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_a_config_leaves_out_is_what_transformers_takes(family: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family).to_dict() | {"sliding_window_pattern": 6}
    for name, value in FAMILIES[family].defaults.items():
        # The window's size is there in the class, and gone from an instance that does not use it.
        found = type(AutoConfig.for_model(family)).sliding_window if name == "sliding_window" else config[name]
        assert found == value, name
    assert FAMILIES[family].defaults.get("tie_word_embeddings", False) == config["tie_word_embeddings"]


def test_biases_that_the_config_asks_for_are_expected(tmp_path: Path) -> None:
    small_models.write_model(tmp_path)
    edit(tmp_path / "config.json", attention_bias=True)
    with pytest.raises(VerificationError, match=r"self_attn.q_proj.bias' is missing"):
        ModelSpec.read(tmp_path)
    edit(tmp_path / "config.json", attention_bias=False, mlp_bias=True)
    with pytest.raises(VerificationError, match=r"mlp.gate_proj.bias' is missing"):
        ModelSpec.read(tmp_path)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, "supported model types: gemma3_text, llama, mistral, qwen2, qwen3"),
    ({"model_type": ["llama"]}, "supported model types"),
    ({"model_type": "DROP"}, "supported model types"),
    ({"architectures": ["LlamaForTokenClassification"]}, "must be LlamaForCausalLM"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "classifier with 2 labels"),
    ({"architectures": "LlamaForCausalLM"}, "must be LlamaForCausalLM"),
    ({"quantization_config": {"bits": 4}}, "unquantised"),
    ({"use_sliding_window": True}, "sliding-window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
    ({"layer_types": "sliding_attention"}, "layer_types"),
    ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
    ({"model_type": "mistral", "architectures": "DROP", "layer_types": ["full_attention"] * 2}, "sliding-window"),
    ({"model_type": "gemma2"}, "soft-capped"),
    ({"model_type": "gemma3"}, "its text part alone"),
    ({"final_logit_softcapping": 30.0}, "soft-capped"),
    ({"attn_logit_softcapping": 50.0}, "soft-capped"),
    ({"use_bidirectional_attention": True}, "causal"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling of type 'dynamic'"),
    ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "rope_parameters of type 'longrope'"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_what_is_not_supported_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    edit(small_models.write_model(tmp_path) / "config.json", **change)
    with pytest.raises(ModelRefused) as caught:
        ModelSpec.read(tmp_path)
    assert words in str(caught.value)


DAMAGED: list[tuple[dict[str, Any], str]] = [
    ({"auto_map": {"AutoModel": "code.Model"}}, "never run"),
    ({"text_config": {"inner": [{"auto_map": {"AutoConfig": "code.C"}}]}}, "never run"),
    ({"vision": {"trust_remote_code": True}}, "never granted"),
    ({"hidden_size": 0}, "hidden_size is '0'"),
    ({"hidden_size": "8"}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"vocab_size": 2**40}, "vocab_size"),
    ({"num_hidden_layers": 10**8}, "num_hidden_layers"),
    ({"num_key_value_heads": 3}, "cannot share"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"layer_types": ["full_attention"] * 3}, "names 3 layers, and there are 2"),
    ({"model_type": "gemma3_text", "architectures": "DROP", "sliding_window": None}, "sliding_window is 'None'"),
    ({"model_type": "gemma3_text", "architectures": "DROP", "sliding_window_pattern": "6"}, "sliding_window_pattern"),
    ({"model_type": "qwen3", "architectures": "DROP", "layer_types": ["sliding_attention"] * 2}, "sliding_window is"),
    ({"hidden_size": 16}, "has shape"),
    ({"num_hidden_layers": 3}, "is missing"),
]


@pytest.mark.parametrize(("change", "words"), DAMAGED)
def test_a_config_that_lies_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    edit(small_models.write_model(tmp_path) / "config.json", **change)
    with pytest.raises(VerificationError, match=words) as caught:
        ModelSpec.read(tmp_path)
    assert str(tmp_path) in caught.value.message


def test_fewer_layers_than_stored_is_refused(tmp_path: Path) -> None:
    edit(small_models.write_model(tmp_path) / "config.json", num_hidden_layers=1)
    with pytest.raises(ModelRefused, match=r"model.layers.1.* is not part of a llama model \(9 such\)"):
        ModelSpec.read(tmp_path)


def test_a_tied_head_that_is_stored_again_is_not_counted(tmp_path: Path) -> None:
    counted = ModelSpec.read(small_models.write_model(tmp_path / "a", tied=True)).num_parameters
    small_models.write_model(tmp_path / "b", tied=False)
    edit(tmp_path / "b" / "config.json", tie_word_embeddings=True)
    assert ModelSpec.read(tmp_path / "b").num_parameters == counted


def spec_with(tmp_path: Path, **changes: Any) -> ModelSpec:
    from dataclasses import replace

    return replace(ModelSpec.read(small_models.write_model(tmp_path)), **changes)


FITS: list[tuple[dict[str, int], int, list[int]]] = [
    ({}, 8, [1, 2, 4]),
    ({}, 6, [1, 2]),
    ({}, 1, [1]),
    ({"num_heads": 9, "num_kv_heads": 3, "intermediate_size": 1536}, 6, [1, 3]),
    ({"num_heads": 8, "num_kv_heads": 2, "intermediate_size": 16}, 8, [1, 2, 4, 8]),
    ({"num_heads": 12, "num_kv_heads": 2, "intermediate_size": 24}, 12, [1, 2, 4, 6, 12]),
    ({"num_heads": 12, "num_kv_heads": 4, "intermediate_size": 24}, 12, [1, 2, 4, 12]),
    ({"num_heads": 8, "num_kv_heads": 8, "intermediate_size": 12}, 8, [1, 2, 4]),
]


@pytest.mark.parametrize(("changes", "world", "fitting"), FITS)
def test_tp_divides_ranks_heads_and_layers(
    tmp_path: Path, changes: dict[str, int], world: int, fitting: list[int]
) -> None:
    spec = spec_with(tmp_path, **changes)
    assert fitting_tp(spec, world) == fitting
    assert [tp for tp in range(-1, 20) if _accepts(spec, tp, world)] == fitting


def _accepts(spec: ModelSpec, tp: int, world: int) -> bool:
    try:
        check_tp(spec, tp, world)
    except ModelRefused as error:
        assert error.hint == f"tp may be {', '.join(map(str, fitting_tp(spec, world)))}"
        return False
    return True
