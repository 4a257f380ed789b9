"""Adapters: low-rank additions to the linear layers of a shared base model (Hu et al., LoRA, 2021).

peft creates the layers and reads the settings in its files. The forward context selects the adapter of a forward pass;
peft's own switches are not used, because they turn off gradients of all other adapters. Only this file imports peft. On
tensor-parallel ranks A and B are split like their layer: B by rows in a column-parallel layer, A by columns in a
row-parallel layer.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harmony_core.engine.models.context import current_context
from harmony_core.engine.models.heads import SCORE, new_head
from harmony_core.engine.models.layers import ColumnParallelLinear, RowParallelLinear
from harmony_core.engine.models.loading import CheckpointReader
from harmony_core.engine.models.parallel import (
    Shard,
    TensorParallel,
    copy_to,
    full_shape,
    reduce_from,
    set_shard,
    shard_of,
)
from harmony_core.errors import ConflictError, ModelRefused, VerificationError, did_you_mean
from harmony_core.model.weight_files import ADAPTER_SETTINGS, check_adapter_config
from harmony_core.plain_files import read_json
from harmony_core.rpc.protocol import LoraSettings

if TYPE_CHECKING:
    from harmony_core.engine.models.model import CausalLM

PREFIX = "base_model.model."
"""Prefix of module names in peft's files."""


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter of a model: its settings, and this rank's parameters by stored name (without peft's prefix)."""

    settings: LoraSettings
    parameters: dict[str, nn.Parameter]


Draw = Callable[[str, Shard | None, tuple[int, ...]], Tensor]
"""(stored name, slice, full shape) -> this rank's values."""


def add_lora(model: CausalLM, name: str, settings: LoraSettings) -> None:
    """Add a new adapter with random A and zero B, which does not change the model's output.

    The full A is drawn from (seed, module name) and then sliced, so it is the same for every number of ranks. Raises
    `ModelRefused` for targets that the model lacks, `ConflictError` for a name in use.
    """

    def draw(stored_name: str, shard: Shard | None, shape: tuple[int, ...]) -> Tensor:
        if stored_name.endswith("lora_B.weight"):
            full = torch.zeros(shape)
        else:
            generator = torch.Generator().manual_seed(_hash(settings.seed, stored_name))
            # peft's default: nn.init.kaiming_uniform_ with a = sqrt(5).
            full = (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])
        return full if shard is None else shard.take(full)

    _attach(model, name, settings, draw)


def load_adapter(model: CausalLM, name: str, directory: Path) -> None:
    """Add the peft adapter stored in `directory`. Raises `ModelRefused` for the first unsupported setting."""
    with CheckpointReader(directory, "adapter_model") as stored:
        settings = read_settings(model, directory, stored)
        _attach(model, name, settings, lambda key, shard, shape: _read(stored, key, shard, shape, model.dtype))
        if PREFIX + SCORE in stored.names:
            add_score(model, name, _read(stored, SCORE, None, (1, model.hidden_size), model.dtype))
        surplus = sorted(stored.names - {PREFIX + key for key in model.adapters[name].parameters})
    if surplus:
        remove_adapter(model, name)
        raise VerificationError(f"{directory}: {surplus[0]} belongs to no layer of this model")


def load_into_adapter(model: CausalLM, name: str, directory: Path) -> None:
    """Overwrite a live adapter's values with those of a stored adapter of the same rank, scale and layers."""
    info = model.adapters[name]
    with CheckpointReader(directory, "adapter_model") as stored:
        found = read_settings(model, directory, stored)
        if (found.rank, found.alpha) != (info.settings.rank, info.settings.alpha):
            raise ModelRefused(
                f"{directory}: stored with rank {found.rank} and alpha {found.alpha}; adapter {name!r} has rank "
                f"{info.settings.rank} and alpha {info.settings.alpha}"
            )
        if stored.names != {PREFIX + key for key in info.parameters}:
            raise ModelRefused(f"{directory}: stored for other layers than those of adapter {name!r}")
        values = {
            key: _read(stored, key, shard_of(parameter), full_shape(parameter), model.dtype)
            for key, parameter in info.parameters.items()
        }
    with torch.no_grad():
        for key, parameter in info.parameters.items():
            parameter.copy_(values[key])


def copy_adapter(model: CausalLM, source: str, name: str) -> None:
    """Add a frozen copy of a live adapter under a new name, on the same base."""
    info = model.adapters[source]
    _attach(model, name, info.settings, lambda key, _shard, _shape: info.parameters[key].detach().clone())
    if SCORE in info.parameters:
        add_score(model, name, info.parameters[SCORE].detach().clone())


def add_score(model: CausalLM, name: str, values: Tensor | None = None) -> None:
    """Give an adapter its own scalar head `[1, d]`, trained and stored with it; `values`, or a new head."""
    head = new_head(model)
    if values is not None:
        head.data = values.to(model.device, model.dtype)
    model.adapters[name].parameters[SCORE] = head


def remove_adapter(model: CausalLM, name: str) -> None:
    """Remove an adapter and its parameters; after the last one the layers are restored."""
    del model.adapters[name]
    key = _module_key(name)
    for path, layer in _lora_layers(model.module):
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            container = getattr(layer, attribute)
            if key in container:
                del container[key]
        layer.harmony_keys.pop(name, None)
        if not layer.lora_A:
            model.module.set_submodule(path, layer.base_layer)


def settings_as_stored(info: AdapterInfo, base: str, revision: str = "") -> dict[str, Any]:
    """The content of `adapter_config.json`, readable by every version of peft; `base` is a path or a hub id."""
    more: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if SCORE in info.parameters:
        more = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    if revision:
        more["revision"] = revision
    config = _lora_config(info.settings, base_model_name_or_path=base, inference_mode=True, **more)
    raw: dict[str, Any] = config.to_dict()
    # Omit defaults: each version of peft has settings that others do not know.
    kept = ADAPTER_SETTINGS | {"base_model_name_or_path", "inference_mode", "peft_version", *more}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in raw.items() if key in kept}


def read_settings(model: CausalLM, directory: Path, stored: CheckpointReader) -> LoraSettings:
    """The settings of a stored adapter. Refuses settings that we would have to ignore."""
    path = directory / "adapter_config.json"
    raw = read_json(path)
    check_adapter_config(path, raw)
    if raw.get("modules_to_save") and PREFIX + SCORE not in stored.names:
        # If there is a head, other modules that are saved whole are found in the file.
        raise ModelRefused(f"{path}: modules_to_save={raw['modules_to_save']!r} is not supported")
    try:
        rank, alpha, dropout = int(raw["r"]), float(raw["lora_alpha"]), float(raw.get("lora_dropout") or 0.0)
    except (KeyError, TypeError, ValueError) as error:
        raise VerificationError(f"{path}: r, lora_alpha or lora_dropout: {error!r}") from None
    if rank < 1:
        raise VerificationError(f"{path}: r={rank}")
    # rsLoRA divides by the square root of the rank; convert to an ordinary alpha.
    alpha = alpha * math.sqrt(rank) if raw.get("use_rslora") else alpha
    # Take the layers from the file: target_modules may be a pattern, or missing.
    modules = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in stored.names - {PREFIX + SCORE}}
    leaves = tuple(sorted({module.rpartition(".")[2] for module in modules}))
    named_by_leaves = {path for path in _linear_layers(model) if path.rpartition(".")[2] in leaves}
    targets = leaves if named_by_leaves == modules else tuple(sorted(modules))
    return LoraSettings(rank=rank, alpha=alpha, dropout=dropout, targets=targets)


def _attach(model: CausalLM, name: str, settings: LoraSettings, draw: Draw) -> None:
    if name in model.adapters:
        raise ConflictError(f"the model has an adapter {name!r} already")
    # All checks come before the first change of a layer.
    targets = _find_targets(model, settings)
    parameters: dict[str, nn.Parameter] = {}
    for path in targets:
        layer = model.module.get_submodule(path)
        base: Any = getattr(layer, "base_layer", layer)
        shapes = {"lora_A": (settings.rank, base.in_features), "lora_B": (base.out_features, settings.rank)}
        for half, shape in shapes.items():
            shard = _shard(base, half, shape, model.tp)
            values = draw(f"{path}.{half}.weight", shard, shape).to(model.device, model.dtype).contiguous()
            parameter = nn.Parameter(values, requires_grad=False)
            set_shard(parameter, shard)
            parameters[f"{path}.{half}.weight"] = parameter
    key = _module_key(name)
    _inject(model.module, key, settings)
    for path in targets:
        wrapped: Any = model.module.get_submodule(path)
        wrapped.lora_A[key].weight = parameters[f"{path}.lora_A.weight"]
        wrapped.lora_B[key].weight = parameters[f"{path}.lora_B.weight"]
        wrapped.harmony_name, wrapped.harmony_tp, wrapped.harmony_matmul = path, model.tp, model.matmul
        wrapped.harmony_keys = {**getattr(wrapped, "harmony_keys", {}), name: key}
        wrapped.__class__ = _adapted(type(wrapped))  # type: ignore[arg-type]
    model.adapters[name] = AdapterInfo(settings, parameters)


def _find_targets(model: CausalLM, settings: LoraSettings) -> list[str]:
    """Paths of the layers to adapt; every target must name at least one linear layer inside the decoder."""
    if settings.rank < 1 or settings.alpha <= 0 or not 0 <= settings.dropout < 1 or not settings.targets:
        raise ModelRefused(
            f"an adapter with rank={settings.rank}, alpha={settings.alpha}, dropout={settings.dropout}, "
            f"targets={settings.targets}",
            hint="rank at least 1, alpha above 0, dropout from 0 to below 1, at least one target",
        )
    linears = _linear_layers(model)
    chosen: set[str] = set()
    for target in settings.targets:
        found = {path for path in linears if path == target or path.endswith("." + target)}
        if not found:
            leaves = {path.rpartition(".")[2] for path in linears}
            raise ModelRefused(f"no linear layer {target!r} to adapt", hint=did_you_mean(target, leaves))
        chosen |= found
    return [path for path in linears if path in chosen]


def _linear_layers(model: CausalLM) -> list[str]:
    """Paths of the linear layers inside the decoder, wrapped or not."""
    heads = (model.module.get_output_embeddings(), getattr(model.module, "score", None))  # type: ignore[operator]
    return [
        path.removesuffix(".base_layer")
        for path, module in model.module.named_modules()
        if isinstance(module, nn.Linear) and module not in heads and ".lora_" not in path
    ]


def _inject(module: nn.Module, key: str, settings: LoraSettings) -> None:
    """Let peft wrap the target layers, on the meta device, and undo its other changes."""
    from peft import inject_adapter_in_model

    required = {parameter: parameter.requires_grad for parameter in module.parameters()}
    training = {child: child.training for child in module.modules()}
    with warnings.catch_warnings():
        # Several adapters on one model are intended here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(_lora_config(settings), module, key, low_cpu_mem_usage=True)
    # We keep our own record; with peft's, further adapters would cause a warning.
    del module.peft_config
    for parameter, flag in required.items():
        parameter.requires_grad_(flag)
    for child in module.modules():
        child.training = training.get(child, False)


def _lora_config(settings: LoraSettings, **more: Any) -> Any:
    from peft import LoraConfig

    # peft declares an integer but accepts any number.
    alpha: Any = int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha
    targets = list(settings.targets)
    return LoraConfig(r=settings.rank, lora_alpha=alpha, lora_dropout=settings.dropout, target_modules=targets, **more)


@cache
def _adapted(kind: Any) -> Any:
    """Subclass a peft class with our forward pass. A method set on the layer itself would be a reference cycle, which
    keeps the layer and its weights until a garbage collection."""
    return kind if kind.__dict__.get("forward") is _forward else type(kind.__name__, (kind,), {"forward": _forward})


def _forward(layer: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """`base(x) + scaling * B(A(x))` with the context's adapter, in place of peft's own.

    When compiled, values that it reads are guards, checked before each call: from the context only the adapter's name
    and whether it has dropout, which change rarely.
    """
    result: Tensor = layer.base_layer(x)
    context = current_context()
    adapter = context.adapter
    if adapter is None or adapter not in layer.harmony_keys:
        return result
    key = layer.harmony_keys[adapter]
    a, b = layer.lora_A[key].weight, layer.lora_B[key].weight
    dropout = layer.lora_dropout[key]
    if isinstance(dropout, nn.Dropout) and dropout.p and context.dropout and a.requires_grad:
        x = _drop(layer, x, dropout.p)
    low = layer.harmony_matmul(x, a)
    if isinstance(layer.base_layer, ColumnParallelLinear):
        low = copy_to(low, layer.harmony_tp)
    elif isinstance(layer.base_layer, RowParallelLinear):
        low = reduce_from(low, layer.harmony_tp)
    return torch.add(result, layer.harmony_matmul(low, b), alpha=layer.scaling[key])


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _drop(layer: Any, x: Tensor, p: float) -> Tensor:
    """Apply dropout. Not compiled, because the seed changes with each micro-batch."""
    return x * _dropout_mask(layer, x, p, current_context().seed)


def _dropout_mask(layer: Any, x: Tensor, p: float, seed: int) -> Tensor:
    """Draw a mask of full width from (seed, layer), then slice it: equal for every tp and in a recomputation."""
    generator = torch.Generator(device=x.device).manual_seed(_hash(seed, layer.harmony_name))
    keep = torch.rand((*x.shape[:-1], layer.in_features), generator=generator, device=x.device) >= p
    if keep.shape[-1] != x.shape[-1]:
        keep = Shard.of(layer.harmony_tp, x.dim() - 1, layer.in_features).take(keep)
    return keep.to(x.dtype) / (1 - p)


def _shard(base: nn.Module, half: str, shape: tuple[int, ...], tp: TensorParallel) -> Shard | None:
    if isinstance(base, ColumnParallelLinear) and half == "lora_B":
        return Shard.of(tp, 0, shape[0])
    if isinstance(base, RowParallelLinear) and half == "lora_A":
        return Shard.of(tp, 1, shape[1])
    return None


def _lora_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return iter([(path, child) for path, child in module.named_modules() if hasattr(child, "lora_A")])


def _module_key(name: str) -> str:
    # Names of module dictionaries may not contain dots; spawn names may.
    return "adapter_" + name.encode().hex()


def _hash(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1


def _read(
    stored: CheckpointReader, name: str, shard: Shard | None, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    if PREFIX + name not in stored.names:
        raise VerificationError(f"{stored.directory}: {PREFIX + name} is missing")
    return stored.read(PREFIX + name, shard, shape, dtype)
