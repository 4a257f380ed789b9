"""The shape of a stored model, read from config.json and safetensors headers: enough to plan with, without torch.

The family (`families.py`) determines the tensors of an architecture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harmony_core.errors import ModelRefused
from harmony_core.model.families import FAMILIES, family_of, is_scalar, layer_windows, refuse_unsupported
from harmony_core.model.weight_files import INDEX, SINGLE, Tensor, read_headers
from harmony_core.plain_files import damaged, exists, read_json, refuse_code

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' name of a type -> torch's."""


@dataclass(frozen=True)
class ModelSpec:
    """A causal language model's shape. `num_parameters` counts tied embeddings once.

    `post_norms`: four norms per layer, not two. `window`: window in tokens, including the current one, of
    `windowed_layers` layers; None if there are none. `scalar`: stored with a scalar head in place of the
    vocabulary's.
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool
    max_positions: int
    stored_dtype: str
    num_parameters: int
    attention_bias: bool
    qk_norm: bool
    post_norms: bool = False
    window: int | None = None
    windowed_layers: int = 0
    scalar: bool = False

    @classmethod
    def read(cls, directory: Path) -> ModelSpec:
        """Read the spec of a model directory, and check every tensor's shape against the config.

        Raises ModelRefused for an unsupported model, VerificationError (naming the file) for a damaged one.
        """
        config = read_config(directory)
        spec = _shape(directory / "config.json", config)
        expected = _expected_shapes(spec, config)
        tensors = read_headers(directory)
        _compare(directory, tensors, expected, spec)
        sizes: Counter[str] = Counter()
        for name in expected:
            sizes[tensors[name].dtype] += tensors[name].bytes
        stored_dtype = DTYPES[sizes.most_common(1)[0][0]]
        return replace(spec, stored_dtype=stored_dtype, num_parameters=sum(tensors[name].elements for name in expected))


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json and check it: a supported family, known layers, no remote code, not quantised."""
    path = directory / "config.json"
    config = read_json(path)
    refuse_code(path, config)
    family_of(path, config)
    refuse_unsupported(path, config)
    _shape(path, config)
    return config


def _shape(path: Path, config: Mapping[str, Any]) -> ModelSpec:
    """The spec from a config, without the fields that follow from the tensors."""
    family = FAMILIES[config["model_type"]]

    def number(name: str, default: int | None = None, most: int = 2**31) -> int:
        value = config.get(name, family.defaults.get(name))
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= most:
            raise damaged(path, f"{name} is {str(value)[:40]!r}, not a positive whole number")
        return value

    vocab_size, hidden_size, heads = number("vocab_size"), number("hidden_size"), number("num_attention_heads")
    kv_heads, layers = number("num_key_value_heads", heads), number("num_hidden_layers", most=10_000)
    attention_bias, scalar = _flag(path, config, "attention_bias"), is_scalar(config)
    _flag(path, config, "mlp_bias")
    if heads % kv_heads:
        raise damaged(path, f"{heads} heads cannot share {kv_heads} key-value heads")
    windows = [window for window in layer_windows(path, config, layers) if window is not None]
    return ModelSpec(
        architecture=family.scalar_architecture if scalar else family.architecture,
        model_type=config["model_type"],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=number("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=number("head_dim", hidden_size // heads),
        tied=_flag(path, config, "tie_word_embeddings"),
        max_positions=number("max_position_embeddings"),
        stored_dtype="",
        num_parameters=0,
        attention_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        qk_norm=family.qk_norm,
        post_norms=family.post_norms,
        window=windows[0] if windows else None,
        windowed_layers=len(windows),
        scalar=scalar,
    )


def _flag(path: Path, config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name, FAMILIES[config["model_type"]].defaults.get(name))
    if value is not None and type(value) is not bool:
        raise damaged(path, f"{name} is {str(value)[:40]!r}, not true or false")
    return bool(value)


def _expected_shapes(spec: ModelSpec, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of the model, by name."""
    family, d, i = FAMILIES[spec.model_type], spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (q, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, q),
        "mlp.gate_proj.weight": (i, d),
        "mlp.up_proj.weight": (i, d),
        "mlp.down_proj.weight": (d, i),
    }
    if spec.attention_bias:
        layer |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if spec.attention_bias and family.qkv_bias is None:
        layer["self_attn.o_proj.bias"] = (d,)
    if family.qk_norm:
        layer |= {"self_attn.q_norm.weight": (spec.head_dim,), "self_attn.k_norm.weight": (spec.head_dim,)}
    if family.post_norms:
        layer |= {"pre_feedforward_layernorm.weight": (d,), "post_feedforward_layernorm.weight": (d,)}
    if family.mlp_bias and config.get("mlp_bias"):
        layer |= {"mlp.gate_proj.bias": (i,), "mlp.up_proj.bias": (i,), "mlp.down_proj.bias": (d,)}
    expected: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, d)}
    for index in range(spec.num_layers):
        expected |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    expected["model.norm.weight"] = (d,)
    if spec.scalar:
        expected["score.weight"] = (1, d)
    elif not spec.tied:
        expected["lm_head.weight"] = (spec.vocab_size, d)
    return expected


def _compare(
    directory: Path, tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], spec: ModelSpec
) -> None:
    for name, shape in expected.items():
        if name not in tensors:
            raise damaged(directory / (INDEX if exists(directory / INDEX) else SINGLE), f"tensor {name!r} is missing")
        if tensors[name].shape != shape:
            found = list(tensors[name].shape)
            raise damaged(
                directory / tensors[name].file,
                f"tensor {name!r} has shape {found}, and config.json says {list(shape)}",
            )
    # A tied head stored again, and the rotary tables of old checkpoints, are redundant.
    spare = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}
    if spec.tied:
        spare.add("lm_head.weight")
    extra = sorted(tensors.keys() - expected.keys() - spare)
    if extra:
        raise ModelRefused(
            f"{directory / tensors[extra[0]].file}: tensor {extra[0][:100]!r} is not part of a {spec.model_type} "
            f"model ({len(extra)} such)"
        )


@dataclass(frozen=True)
class LocalSizes:
    """A rank's part of the sizes of a model: d hidden, q and kv attention, i feed-forward, v vocabulary."""

    d: int
    q: int
    kv: int
    projected_kv: int
    heads: int
    i: int
    v: int

    @classmethod
    def of(cls, spec: ModelSpec, tp: int) -> LocalSizes:
        """The sizes of a model split over `tp` ranks."""
        split = spec.num_kv_heads % tp == 0
        return cls(
            d=spec.hidden_size,
            q=spec.num_heads // tp * spec.head_dim,
            # With fewer key-value heads than ranks, each rank computes all of them and attends to one.
            kv=(spec.num_kv_heads // tp if split else 1) * spec.head_dim,
            projected_kv=(spec.num_kv_heads // tp if split else spec.num_kv_heads) * spec.head_dim,
            heads=spec.num_heads // tp,
            i=spec.intermediate_size // tp,
            v=-(-spec.vocab_size // tp),
        )


def check_tp(spec: ModelSpec, tp: int, world: int) -> None:
    """Raise ModelRefused, listing the values that work, unless `tp` fits the model and `world` ranks.

    If there are fewer key-value heads than tp, they are replicated.
    """
    if tp in fitting_tp(spec, world):
        return
    values = ", ".join(map(str, fitting_tp(spec, world)))
    raise ModelRefused(
        f"tp={tp} does not fit {world} rank{'s' if world != 1 else ''} and a model with {spec.num_heads} heads, "
        f"{spec.num_kv_heads} key-value heads and intermediate size {spec.intermediate_size}",
        hint=f"tp may be {values}",
        tp=tp,
        allowed=fitting_tp(spec, world),
    )


def fitting_tp(spec: ModelSpec, world: int) -> list[int]:
    """The tensor-parallel sizes that divide `world` ranks and the model."""
    return [tp for tp in model_tp(spec) if world % tp == 0]


def model_tp(spec: ModelSpec) -> list[int]:
    """The tensor-parallel sizes that divide the model, for any number of ranks."""
    return [
        tp
        for tp in range(1, spec.num_heads + 1)
        if spec.num_heads % tp == 0
        and spec.intermediate_size % tp == 0
        and (spec.num_kv_heads % tp == 0 or tp % spec.num_kv_heads == 0)
    ]
