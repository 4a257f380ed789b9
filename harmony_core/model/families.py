"""The supported model families, in the format of transformers' config.json: their tensors and their defaults.

To add one, add a `Family` to FAMILIES and, if it has other tensors, a line to `spec._expected_shapes`.
`refuse_unsupported` refuses settings that transformers supports and the engine does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harmony_core.errors import ModelRefused
from harmony_core.plain_files import damaged

FULL, SLIDING = "full_attention", "sliding_attention"
"""transformers' names of the kinds of layers."""

LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
"""Rotary embeddings whose frequencies depend on the longest sequence of a pass; caches and packed rows exclude them."""


@dataclass(frozen=True)
class Family:
    """A model type: its architecture and the settings that are not in its config."""

    architecture: str
    scalar_architecture: str
    """Architecture with a scalar head instead: transformers' sequence classification with one label."""
    qkv_bias: bool | None = None
    """None: the config's `attention_bias`, which then applies to the output projection too."""
    qk_norm: bool = False
    post_norms: bool = False
    """Whether attention and feed-forward are also followed by a norm, and norms multiply by 1 + weight."""
    mlp_bias: bool = False
    """Whether the config's `mlp_bias` applies."""
    windows: str = ""
    """Which layers have a sliding window: "all", "pattern" (all but every n-th), "upper" (if switched on), or none."""
    defaults: Mapping[str, int | bool] = field(default_factory=dict)
    """transformers' defaults for entries that are missing in the config."""


FAMILIES = {
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextForSequenceClassification",
        qk_norm=True,
        post_norms=True,
        windows="pattern",
        defaults={
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "tie_word_embeddings": True,
            "vocab_size": 262208,
        },
    ),
    "llama": Family(
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        mlp_bias=True,
        defaults={"max_position_embeddings": 2048},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        "MistralForSequenceClassification",
        qkv_bias=False,
        windows="all",
        defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "Qwen2ForSequenceClassification",
        qkv_bias=True,
        windows="upper",
        defaults={"max_position_embeddings": 32768, "max_window_layers": 28, "sliding_window": 4096},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "Qwen3ForSequenceClassification",
        qk_norm=True,
        windows="upper",
        defaults={
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "sliding_window": 4096,
        },
    ),
}

_RELATED = {
    "gemma2": "its attention and its logits are soft-capped, which is not computed here",
    "gemma3": "it reads images too; its text part alone, a Gemma3ForCausalLM, can be added",
    "ministral": "a model whose layers all have the same window can be added as mistral",
    "mistral3": "it reads images too; its text part alone, a MistralForCausalLM, can be added",
}


def family_of(path: Path, config: Mapping[str, Any]) -> Family:
    """The family of a config read from `path`. Raises ModelRefused with name and reason if it is not supported."""
    model_type = config.get("model_type")
    known = f"supported model types: {', '.join(sorted(FAMILIES))}"
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        name = str(model_type)[:60]
        reason = _RELATED.get(name)
        raise ModelRefused(
            f"{path}: model type {name!r} is not supported" + (f": {reason}" if reason else ""),
            hint=known,
            model_type=name,
        )
    family = FAMILIES[model_type]
    declared = config.get("architectures") or [family.architecture]
    if declared not in ([family.architecture], [family.scalar_architecture]):
        raise ModelRefused(
            f"{path}: architecture {str(declared)[:80]} is not supported",
            hint=f"a {model_type} model must be {family.architecture}; {known}",
        )
    if is_scalar(config) and _labels(config) != 1:
        raise ModelRefused(
            f"{path}: a classifier with {_labels(config)} labels is not supported",
            hint="one label is: a scalar head, as of reward and value models",
        )
    return family


def is_scalar(config: Mapping[str, Any]) -> bool:
    """Whether a config of a supported model type has a scalar head in place of the vocabulary's."""
    return config.get("architectures") == [FAMILIES[config["model_type"]].scalar_architecture]


def _labels(config: Mapping[str, Any]) -> int:
    names = config.get("id2label")
    count = len(names) if isinstance(names, dict) else config.get("num_labels", 2)
    return count if isinstance(count, int) else 0


def refuse_unsupported(path: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelRefused for settings of a supported family that the engine does not support."""
    if config.get("quantization_config"):
        raise ModelRefused(f"{path}: quantised weights are not supported", hint="add the unquantised model")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(name):
            raise ModelRefused(f"{path}: {name}={str(config[name])[:40]}: soft-capped logits are not supported")
    if config.get("use_bidirectional_attention"):
        raise ModelRefused(f"{path}: use_bidirectional_attention: only causal models are supported")
    for name in ("rope_parameters", "rope_scaling"):
        settings = config.get(name)
        # One set of settings, or one for each kind of layer.
        nested = [settings, *settings.values()] if isinstance(settings, dict) else []
        for kind in (each.get("rope_type", each.get("type")) for each in nested if isinstance(each, dict)):
            if isinstance(kind, str) and kind in LENGTH_DEPENDENT_ROPE:
                raise ModelRefused(f"{path}: {name} of type {kind!r} is not supported")


def layer_windows(path: Path, config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """The window of each layer in tokens, including the current one; None: no window. Follows transformers.

    Raises ModelRefused for unsupported layers, VerificationError for contradictory entries.
    """
    family = FAMILIES[config["model_type"]]
    window = config.get("sliding_window", family.defaults.get("sliding_window"))
    if family.windows == "upper" and not config.get("use_sliding_window"):
        window = None
    kinds = _kinds(path, config, family, layers, window is not None)
    stated = config.get("layer_types")
    if stated is not None:
        kinds = _stated(path, stated, family, kinds)
    if SLIDING not in kinds:
        return (None,) * layers
    if type(window) is not int or window < 1:
        raise damaged(path, f"sliding_window is {str(window)[:40]!r}, and there are layers with a window")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _kinds(path: Path, config: Mapping[str, Any], family: Family, layers: int, windowed: bool) -> list[str]:
    """The kind of each layer, from entries of the config other than `layer_types`."""

    def number(name: str) -> int:
        value = config.get(name, family.defaults[name])
        if type(value) is not int or value < 0:
            raise damaged(path, f"{name} is {str(value)[:40]!r}, not a whole number")
        return value

    if family.windows == "pattern":
        every = number("sliding_window_pattern") or 1
        return [SLIDING if (index + 1) % every else FULL for index in range(layers)]
    if family.windows == "upper":
        first = number("max_window_layers") if windowed else layers
        return [SLIDING if index >= first else FULL for index in range(layers)]
    if not family.windows and config.get("use_sliding_window"):
        raise ModelRefused(f"{path}: sliding-window attention is not supported in {config['model_type']} models")
    return [SLIDING if windowed and family.windows == "all" else FULL] * layers


def _stated(path: Path, stated: object, family: Family, kinds: list[str]) -> list[str]:
    """`layer_types`, which takes precedence in the families that have it."""
    if not isinstance(stated, list) or not all(kind in (FULL, SLIDING) for kind in stated):
        raise ModelRefused(
            f"{path}: layer_types {str(stated)[:80]!r} is not supported", hint=f"a list of {FULL} and {SLIDING} is"
        )
    if len(stated) != len(kinds):
        raise damaged(path, f"layer_types names {len(stated)} layers, and there are {len(kinds)}")
    if family.windows in ("", "all") and stated != kinds:
        # transformers would ignore it.
        raise ModelRefused(
            f"{path}: layer_types asks for sliding-window attention in other layers than a {family.architecture} has it"
        )
    return stated
