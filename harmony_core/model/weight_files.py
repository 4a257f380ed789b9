"""The files of a model's directory, its weights among them, and the settings that an adapter's config may have.

Registry and ranks both use this module, which is independent of architectures. Every defect is an error that names the
file and the reason. Format of the weights: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from harmony_core.errors import ModelRefused
from harmony_core.plain_files import damaged, exists, open_plain, parse_json, read_json, real_path

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
TEMPLATES = {"default": "chat_template.jinja", "tool_use": "additional_chat_templates/tool_use.jinja"}
"""Files of chat templates, by the names of transformers. The second is for conversations with tools."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *TEMPLATES.values(),
    "generation_config.json",
)
"""Files of a model besides its config and its weights."""

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz"})
"""Suffixes of files that may hold pickled objects; such a file is never opened."""

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""The supported stored types, with their size in bytes."""

_MAX_HEADER = 64 * 1024 * 1024
_CHUNK = 8 * 1024 * 1024


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors header. `dtype` is the format's name, such as "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the values in the file."""
        return self.elements * ITEM_BYTES[self.dtype]


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Checks the header against the file's size; reads no data."""
    with open_plain(path) as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = opened.read(min(size, _MAX_HEADER))
        opened.seek(0)
        start = opened.read(2)
    try:
        if size > _MAX_HEADER:
            raise SafetensorError(f"a header of {size} bytes")
        with safe_open(real_path(path), "numpy") as file:
            entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {n: Tensor(n, e.get_dtype(), tuple(e.get_shape()), path.name) for n, e in entries.items()}
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from error
    except SafetensorError as error:
        if start == b"PK" or start[:1] == b"\x80":
            raise damaged(path, "not a safetensors file but a pickled one, which is never read") from error
        raise damaged(path, f"not a safetensors file, or truncated ({str(error)[:200]})") from error
    parse_json(path, header)  # refuses duplicate names
    for tensor in tensors.values():
        if tensor.dtype not in ITEM_BYTES:
            types = ", ".join(ITEM_BYTES)
            raise damaged(path, f"tensor {tensor.name[:100]!r} has type {tensor.dtype}; taken are {types}")
    return tensors


def same_values(directory: Path, first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of a model directory hold the same bytes of the same type and shape."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    left = first.bytes
    with open_plain(directory / first.file) as one, open_plain(directory / second.file) as other:
        for file, tensor in ((one, first), (other, second)):
            header = int.from_bytes(file.read(8), "little")
            begin = parse_json(directory / tensor.file, file.read(header))[tensor.name]["data_offsets"][0]
            file.seek(8 + header + begin)
        while left and (size := min(left, _CHUNK)) and one.read(size) == other.read(size):
            left -= size
    return left == 0


def weight_names(directory: Path, stem: str = "model") -> list[str]:
    """Names of the safetensors files with a directory's weights; `stem` is "model" or "adapter_model".

    Refuses a directory from which programs may read different files.
    """
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    names = [single] if exists(directory / single) else []
    if exists(directory / index):
        named = sorted(set(_weight_map(directory / index).values()))
        if names and named != names:
            raise damaged(directory, f"{index} names {named[0]}, and there is {single} too: only one can be the model")
        names = named
    files = sorted(os.listdir(directory)) if directory.is_dir() else []
    if not names:
        pickled = [name for name in files if Path(name).suffix in PICKLE_SUFFIXES]
        reason = f"no {single} and no {index}"
        if pickled:
            reason += f", only pickled files, which are never read ({', '.join(pickled[:3])})"
        raise damaged(directory, reason)
    shard = re.compile(rf"{stem}(-\d+-of-\d+)?\.safetensors")
    spare = [name for name in files if shard.fullmatch(name) and name not in names]
    if spare:
        raise damaged(directory, f"{spare[0]} lies beside the weights ({names[0]}), and some programs would read it")
    return names


def model_names(directory: Path) -> list[str]:
    """Names of the files of the model or adapter in a directory. No other files of it are read."""
    stem = "model"
    config = "config.json"
    if exists(directory / "adapter_config.json"):
        stem, config = "adapter_model", "adapter_config.json"
        if whole := [name for name in (SINGLE, INDEX) if exists(directory / name)]:
            raise damaged(
                directory, f"holds an adapter and a whole model ({whole[0]}): programs differ in what they read"
            )
    names = [config, *weight_names(directory, stem), f"{stem}.safetensors.index.json", *TOKENIZER_FILES]
    return [name for name in names if exists(directory / name)]


def _weight_map(path: Path) -> dict[str, str]:
    mapping = read_json(path).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise damaged(path, "no weight_map")
    for name, file in mapping.items():
        plain = isinstance(file, str) and os.path.basename(file) == file and file.endswith(".safetensors")
        if not plain or file.startswith("."):
            raise damaged(path, f"tensor {name[:100]!r} points to {str(file)[:100]!r}, not to a safetensors file here")
    return mapping


def read_headers(directory: Path, stem: str = "model") -> dict[str, Tensor]:
    """All tensors of a model directory by name. The index, if there is one, must agree with the files."""
    tensors: dict[str, Tensor] = {}
    for name in weight_names(directory, stem):
        for tensor in read_header(directory / name).values():
            if tensor.name in tensors:
                raise damaged(directory / name, f"tensor {tensor.name[:100]!r} is also in {tensors[tensor.name].file}")
            tensors[tensor.name] = tensor
    index = directory / f"{stem}.safetensors.index.json"
    if exists(index):
        mapping = _weight_map(index)
        for name, file in mapping.items():
            if name not in tensors or tensors[name].file != file:
                raise damaged(directory / file, f"tensor {name[:100]!r} is missing, which {index.name} promises")
        for name, tensor in tensors.items():
            if name not in mapping:
                raise damaged(directory / tensor.file, f"tensor {name[:100]!r} is not in {index.name}")
    return tensors


ADAPTER_SETTINGS = frozenset(
    {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "peft_type", "task_type"}
)
"""Supported settings of an adapter_config.json."""

_HARMLESS = frozenset(
    {
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "fan_in_fan_out",
        "megatron_core",
        "runtime_config",
        "qalora_group_size",
        "ensure_weight_tying",
        *("eva_config", "corda_config", "lora_ga_config", "loftq_config"),
    }
)
"""Settings of the origin and initialisation of an adapter, and those that peft ignores in linear modules of a layer."""

_CHECKED = frozenset({"bias", "init_lora_weights", "modules_to_save", "layers_to_transform", "layers_pattern"})

_STARTS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Initialisations, besides peft's default, that leave the base unchanged. With others the adapter is relative to a base
without its principal, or quantised, part."""


def check_adapter_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelRefused for a setting of the config at `path` with which peft would compute a different result.

    Modules that are saved whole are not checked here: they are found in the tensors.
    """
    if config.get("peft_type") != "LORA":
        raise ModelRefused(
            f"{path}: adapter type {str(config.get('peft_type'))[:40]!r} is not supported", hint="LORA is"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _STARTS:
        raise ModelRefused(
            f"{path}: init_lora_weights={start[:40]!r}: an adapter that begins so belongs to a base changed with it",
            hint="peft writes a plain one: save_pretrained(DIRECTORY, path_initial_model_for_weight_conversion=START), "
            "with START the adapter as it was before training; or merge it and add the whole model",
        )
    pattern = config.get("layers_pattern")
    wrong = {"bias": config.get("bias", "none") != "none", "layers_pattern": pattern not in (None, "", [], "layers")}
    wrong["exclude_modules"] = isinstance(config.get("exclude_modules"), str)
    for name, value in config.items():
        known = name in ADAPTER_SETTINGS | _HARMLESS | _CHECKED or (name == "exclude_modules" and not wrong[name])
        if wrong.get(name) or (value and not known):
            raise ModelRefused(
                f"{path}: {name}={str(value)[:80]} is not supported",
                hint="plain LoRA on the linear modules of a layer is; merge the adapter and add the whole model",
            )


def adapter_targets(config: Mapping[str, Any], module: str) -> bool:
    """Whether the target lists put the adapter on a module, such as "model.layers.0.self_attn.q_proj", as in peft.

    A pattern instead of a list is not evaluated, since it is untrusted code; then the tensors of the file decide.
    """

    def named(names: object) -> bool:
        return isinstance(names, list) and any(f".{module}".endswith(f".{name}") for name in names)

    listed = config.get("target_modules")
    if named(config.get("exclude_modules")):
        return False
    if not isinstance(listed, list) or module in listed:
        return True
    layers = config.get("layers_to_transform")
    chosen = layers if isinstance(layers, list) else [layers]
    return named(listed) and (layers in (None, []) or int(module.split(".")[2]) in chosen)
