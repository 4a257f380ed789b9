"""peft adapters: whose they are, and whether their tensors fit."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harmony_core.errors import ModelRefused, NotFoundError
from harmony_core.model.spec import ModelSpec
from harmony_core.model.weight_files import (
    ADAPTER,
    Tensor,
    adapter_targets,
    check_adapter_config,
    read_headers,
    weight_names,
)
from harmony_core.plain_files import damaged, exists, read_json, refuse_code
from harmony_core.registry import manifest as manifests
from harmony_core.registry.keys import slugify
from harmony_core.registry.versions import ModelVersion
from harmony_core.rpc.protocol import LoraSettings

if TYPE_CHECKING:
    from harmony_core.registry.store import Registry

_HEAD = "base_model.model.score.weight"
"""A scalar head in peft's files."""
_HEAD_MODULES = frozenset({"score", "classifier"})
"""What peft saves whole for sequence classification: models have a module of one of these names."""
_NAME = re.compile(
    r"base_model\.model\.(model\.layers\.(\d{1,5})\.(?:self_attn|mlp)\.(\w+))\.lora_([AB])\.weight",
    re.ASCII,
)


def find_base(registry: Registry, directory: Path, base: ModelVersion | str | None) -> ModelVersion:
    """The version that an adapter belongs to: the one given, else the one its config names.

    A name is a reference, or what a registered model was imported from.
    """
    if isinstance(base, ModelVersion):
        return _whole(base)
    if base:
        return _whole(registry.resolve(base))
    path = directory / "adapter_config.json"
    config = read_json(path)
    name, commit = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise ModelRefused(f"{path}: names no base model", hint="say which one with --base KEY")
    with contextlib.suppress(NotFoundError):
        return _whole(registry.resolve(name))
    imported = _recorded(registry, directory)
    if imported is None:
        imported = registry.imported_from(name)
        if isinstance(commit, str) and re.fullmatch("[0-9a-f]{40}", commit):
            name = f"{name}@{commit}"
            # Another commit's weights may have the same shapes.
            imported = imported if imported and imported.source == f"hf:{name}" else None
    if imported is None:
        origin = name if name.startswith(("/", ".")) else f"hf:{name}"
        line = f"adaptive models add {slugify(name.rpartition('/')[2])} {origin}"
        raise NotFoundError(
            f"{path}: its base model {name[:200]!r} is not in the registry",
            hint=f"add it ({line}), or say which one with --base KEY",
        )
    return _whole(imported)


def _recorded(registry: Registry, directory: Path) -> ModelVersion | None:
    """The base that another home's record beside the adapter names, if this home has it, with the same bytes."""
    path = directory / manifests.NAME
    record = read_json(path).get("base") if exists(path) else None
    if isinstance(record, dict):
        with contextlib.suppress(NotFoundError):
            found = registry.resolve(str(record.get("ref")))
            return found if found.digest == record.get("digest") else None
    return None


def _whole(base: ModelVersion) -> ModelVersion:
    if base.base is not None:
        raise ModelRefused(f"{base.ref} is an adapter itself", hint=f"its base is {base.base.ref}")
    return base


def check_adapter(directory: Path, base: ModelVersion) -> bool:
    """Raise ModelRefused or VerificationError unless the adapter is a plain LoRA whose tensors fit the base.

    True if it has a scalar head beside its halves, as peft saves one: the module "score", whole.
    """
    path = directory / "adapter_config.json"
    config = read_json(path)
    refuse_code(path, config)
    _check_config(path, config)
    if weight_names(directory, "adapter_model") != [ADAPTER]:
        raise damaged(directory, f"an adapter in several files, and not in {ADAPTER}")
    tensors = read_headers(directory, "adapter_model")
    head = tensors.pop(_HEAD, None)
    if not tensors:
        raise damaged(directory / ADAPTER, "holds no tensor")
    if head is not None and head.shape != (1, base.spec.hidden_size):
        raise damaged(directory / ADAPTER, f"{_HEAD!r} has shape {list(head.shape)}, not [1, {base.spec.hidden_size}]")
    if head is None and _saves_head(path, config):
        raise damaged(directory / ADAPTER, f"{_HEAD!r} is missing, and {path.name} says it is there")
    for tensor in tensors.values():
        _check_tensor(directory / ADAPTER, tensor, config, base)
    halves = Counter(re.sub(r"lora_[AB]", "lora_?", name) for name in tensors)
    lonely = next((name for name, count in halves.items() if count != 2), None)
    if lonely:
        raise damaged(directory / ADAPTER, f"{lonely!r} has one of its two halves only")
    return head is not None


def _check_config(path: Path, config: dict[str, Any]) -> None:
    check_adapter_config(path, config)
    rank = config.get("r")
    if type(rank) is not int or not 0 < rank <= 65536:
        raise damaged(path, f"r is {str(rank)[:40]!r}, not a positive whole number")


def _saves_head(path: Path, config: dict[str, Any]) -> bool:
    """Whether an adapter's config says that a scalar head is saved whole. Raises ModelRefused for other modules."""
    named = config.get("modules_to_save")
    if not named:
        return False
    if not isinstance(named, list) or not set(named) <= _HEAD_MODULES or "score" not in named:
        raise ModelRefused(
            f"{path}: modules_to_save={str(named)[:80]} is not supported",
            hint="plain LoRA on a layer's linear modules is, and a scalar head named score",
        )
    return True


def module_shape(spec: ModelSpec, module: str) -> tuple[int, int]:
    """(output, input) features of a layer's linear module."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    d, i = spec.hidden_size, spec.intermediate_size
    shapes = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q), "down_proj": (d, i)}
    return shapes.get(module, (i, d))


def _check_tensor(path: Path, tensor: Tensor, config: dict[str, Any], base: ModelVersion) -> None:
    match = _NAME.fullmatch(tensor.name)
    if not match or match[3] not in LoraSettings().targets:
        raise ModelRefused(f"{path}: tensor {tensor.name[:120]!r} is not a LoRA half of a layer's linear module")
    if int(match[2]) >= base.spec.num_layers:
        raise ModelRefused(
            f"{path}: tensor {tensor.name!r} is for layer {match[2]}; {base.ref} has {base.spec.num_layers}"
        )
    if not adapter_targets(config, match[1]):
        raise ModelRefused(
            f"{path}: tensor {tensor.name!r} is for a module that target_modules and layers_to_transform in "
            "adapter_config.json leave out, so peft would read over it"
        )
    rank = config["r"]
    out_features, in_features = module_shape(base.spec, match[3])
    expected = (rank, in_features) if match[4] == "A" else (out_features, rank)
    if tensor.shape != expected:
        raise ModelRefused(
            f"{path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, and {base.ref} with rank {rank} needs "
            f"{list(expected)}",
            hint="is it another model's adapter?",
        )
