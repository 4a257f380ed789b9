"""What a stored model is, read from config.json and safetensors headers: enough to plan with, without torch.

A family (`families.py`) says which tensors an architecture has.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harmony_core.errors import ModelRefused
from harmony_core.model.families import FAMILIES, Family, family_of, is_scalar, layer_windows, refuse_unsupported
from harmony_core.model.weight_files import INDEX, SINGLE, Tensor, read_headers
from harmony_core.plain_files import damaged, exists, read_json, refuse_code

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' name of a type -> torch's."""


@dataclass(frozen=True)
class ModelSpec:
    """A causal language model's shape. `num_parameters` counts tied embeddings once.

    `post_norms`: four norms a layer, not two. `window`: the tokens that one sees, itself included, in
    `windowed_layers` of the layers; None where there are none. `scalar`: stored with a scalar head in place of the
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
        """The spec of a model directory, every tensor's shape checked against the config.

        Raises ModelRefused for what is not supported, VerificationError (naming the file) for what is damaged.
        """
        config = read_config(directory)
        fields = _Fields(directory / "config.json", config)
        family = FAMILIES[fields.model_type]
        expected = _expected_shapes(fields, family)
        windows = [w for w in layer_windows(fields.path, config, fields.num_layers) if w is not None]
        tensors = read_headers(directory)
        _compare(directory, tensors, expected, fields)
        used = [tensors[name] for name in expected]
        sizes: Counter[str] = Counter()
        for tensor in used:
            sizes[tensor.dtype] += tensor.bytes
        return cls(
            architecture=family.scalar_architecture if fields.scalar else family.architecture,
            model_type=fields.model_type,
            vocab_size=fields.vocab_size,
            hidden_size=fields.hidden_size,
            intermediate_size=fields.intermediate_size,
            num_layers=fields.num_layers,
            num_heads=fields.num_heads,
            num_kv_heads=fields.num_kv_heads,
            head_dim=fields.head_dim,
            tied=fields.tied,
            max_positions=fields.max_positions,
            stored_dtype=DTYPES[sizes.most_common(1)[0][0]],
            num_parameters=sum(tensor.elements for tensor in used),
            attention_bias=fields.qkv_bias(family),
            qk_norm=family.qk_norm,
            post_norms=family.post_norms,
            window=windows[0] if windows else None,
            windowed_layers=len(windows),
            scalar=fields.scalar,
        )


def read_config(directory: Path) -> dict[str, Any]:
    """config.json, if it is a model that is taken: family, layers, no code of its own, not quantised."""
    path = directory / "config.json"
    config = read_json(path)
    refuse_code(path, config)
    family_of(path, config)
    refuse_unsupported(path, config)
    layer_windows(path, config, _Fields(path, config).num_layers)
    return config


class _Fields:
    """Typed access to the numbers of a config."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self._config = path, config
        self.model_type: str = config["model_type"]
        self._defaults = FAMILIES[self.model_type].defaults
        self.vocab_size = self._number("vocab_size")
        self.hidden_size = self._number("hidden_size")
        self.intermediate_size = self._number("intermediate_size")
        self.num_layers = self._number("num_hidden_layers", most=10_000)
        self.num_heads = self._number("num_attention_heads")
        self.num_kv_heads = self._number("num_key_value_heads", self.num_heads)
        self.head_dim = self._number("head_dim", self.hidden_size // self.num_heads)
        self.max_positions = self._number("max_position_embeddings")
        self.tied = self._flag("tie_word_embeddings")
        self.attention_bias = self._flag("attention_bias")
        self.mlp_bias = self._flag("mlp_bias")
        self.scalar = is_scalar(config)
        if self.num_heads % self.num_kv_heads:
            raise damaged(path, f"{self.num_heads} heads cannot share {self.num_kv_heads} key-value heads")

    def _number(self, name: str, default: int | None = None, most: int = 2**31) -> int:
        value = self._config.get(name, self._defaults.get(name))
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= most:
            raise damaged(self.path, f"{name} is {str(value)[:40]!r}, not a positive whole number")
        return value

    def _flag(self, name: str) -> bool:
        value = self._config.get(name, self._defaults.get(name))
        if value is not None and type(value) is not bool:
            raise damaged(self.path, f"{name} is {str(value)[:40]!r}, not true or false")
        return bool(value)

    def qkv_bias(self, family: Family) -> bool:
        return self.attention_bias if family.qkv_bias is None else family.qkv_bias


def _layer_shapes(fields: _Fields, family: Family) -> dict[str, tuple[int, ...]]:
    d, i = fields.hidden_size, fields.intermediate_size
    q, kv = fields.num_heads * fields.head_dim, fields.num_kv_heads * fields.head_dim
    shapes: dict[str, tuple[int, ...]] = {
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
    if fields.qkv_bias(family):
        shapes |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if family.qkv_bias is None and fields.attention_bias:
        shapes["self_attn.o_proj.bias"] = (d,)
    if family.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (fields.head_dim,), "self_attn.k_norm.weight": (fields.head_dim,)}
    if family.post_norms:
        shapes |= {"pre_feedforward_layernorm.weight": (d,), "post_feedforward_layernorm.weight": (d,)}
    if family.mlp_bias and fields.mlp_bias:
        shapes |= {"mlp.gate_proj.bias": (i,), "mlp.up_proj.bias": (i,), "mlp.down_proj.bias": (d,)}
    return shapes


def _expected_shapes(fields: _Fields, family: Family) -> dict[str, tuple[int, ...]]:
    layer = _layer_shapes(fields, family)
    expected: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (fields.vocab_size, fields.hidden_size)}
    for index in range(fields.num_layers):
        expected |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    expected["model.norm.weight"] = (fields.hidden_size,)
    if fields.scalar:
        expected["score.weight"] = (1, fields.hidden_size)
    elif not fields.tied:
        expected["lm_head.weight"] = (fields.vocab_size, fields.hidden_size)
    return expected


def _compare(
    directory: Path, tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], fields: _Fields
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
    # A tied head stored again, and the rotary tables of old checkpoints, say nothing new.
    spare = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}
    if fields.tied:
        spare.add("lm_head.weight")
    extra = sorted(tensors.keys() - expected.keys() - spare)
    if extra:
        raise ModelRefused(
            f"{directory / tensors[extra[0]].file}: tensor {extra[0][:100]!r} is not part of a {fields.model_type} "
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
        """Those of a model split over `tp` ranks."""
        split = spec.num_kv_heads % tp == 0
        return cls(
            d=spec.hidden_size,
            q=spec.num_heads // tp * spec.head_dim,
            # With fewer key-value heads than ranks each rank computes all of them and attends to one.
            kv=(spec.num_kv_heads // tp if split else 1) * spec.head_dim,
            projected_kv=(spec.num_kv_heads // tp if split else spec.num_kv_heads) * spec.head_dim,
            heads=spec.num_heads // tp,
            i=spec.intermediate_size // tp,
            v=-(-spec.vocab_size // tp),
        )


def check_tp(spec: ModelSpec, tp: int, world: int) -> None:
    """Raise ModelRefused, naming the values that work, unless `tp` fits the model and `world` ranks.

    Key-value heads fewer than tp are replicated.
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
    """The tensor-parallel sizes that divide the model, whatever the ranks."""
    return [
        tp
        for tp in range(1, spec.num_heads + 1)
        if spec.num_heads % tp == 0
        and spec.intermediate_size % tp == 0
        and (spec.num_kv_heads % tp == 0 or tp % spec.num_kv_heads == 0)
    ]
