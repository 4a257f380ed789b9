"""Save live weights to disk and load them back, in files that plain transformers and peft load.

All tensor-parallel ranks of one replica take part in gathering; only the one with `write` holds full tensors and
writes. Writing is not atomic and does not fsync: pass a temporary directory.

config.json keeps the settings of the base in both forms, for old and new readers: transformers 5 has rotary settings in
`rope_parameters`; earlier versions read `rope_theta`, `rope_scaling` and `rope_local_base_freq`, and silently use
defaults if these are missing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from harmony_core.engine.models.adapters import PREFIX, load_into_adapter, settings_as_stored
from harmony_core.engine.models.heads import architecture_with_score
from harmony_core.engine.models.loading import CheckpointReader, check_names, tied_names
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import full_shape, gather_full, shard_of
from harmony_core.rpc.rank_channel import progress

_LOCAL = "sliding_attention"
"""The layers of gemma3_text that have their own rotary settings."""


def both_forms(stored: dict[str, Any], config: Any, dtype: str) -> dict[str, Any]:
    """`stored`, the content of a config.json, with type and rotary settings under their old and their new names.

    `config`: the transformers config read from it, which the model computes with; `dtype`: a name such as "float32".
    """
    made = stored | {"dtype": dtype, "torch_dtype": dtype}
    rope = config.get_text_config().rope_parameters
    kinds = {kind: dict(values) for kind, values in rope.items() if isinstance(values, dict)}
    made["rope_parameters"] = kinds or dict(rope)
    main = kinds.get("full_attention", made["rope_parameters"])
    if "rope_parameters" in stored or "rope_theta" not in stored:
        scaling = {name: value for name, value in main.items() if name != "rope_theta"}
        made |= {"rope_theta": main["rope_theta"], "rope_scaling": scaling if main["rope_type"] != "default" else None}
        if _LOCAL in kinds:
            made["rope_local_base_freq"] = kinds[_LOCAL]["rope_theta"]
    return made


FILE_BYTES = 4 << 30
"""Size of one file; the writing rank holds the tensors of one file at a time."""


def save_model(model: CausalLM, directory: Path, write: bool) -> str | None:
    """Save the base weights and config.json, as a Hugging Face model directory without tokenizer.

    Returns the first tensor with a NaN or an infinity, which the caller must refuse after all ranks have finished.
    """
    files = _cut_into_files(model.base_parameters)
    names = [
        "model.safetensors" if len(files) == 1 else f"model-{i:05}-of-{len(files):05}.safetensors"
        for i in range(1, len(files) + 1)
    ]
    bad: str | None = None
    failure: Exception | None = None
    for name, group in zip(names, files, strict=True):
        parameters = {key: model.base_parameters[key] for key in group}
        try:
            found = _gather_and_write(model, parameters, "", directory / name, write)
        except (OSError, SafetensorError) as error:  # raised after the other ranks have finished gathering
            failure, write = error, False
        else:
            bad = bad or found
    if failure is not None:
        raise failure
    if not write:
        return None
    if len(files) > 1:
        places = {key: name for name, group in zip(names, files, strict=True) for key in group}
        index = {
            "metadata": {"total_size": sum(map(_full_bytes, model.base_parameters.values()))},
            "weight_map": places,
        }
        _write_json(directory / "model.safetensors.index.json", index)
    config = both_forms(model.stored_config, model.config, str(model.dtype).removeprefix("torch."))
    config["architectures"] = [type(model.module).__name__]
    if not model.has_vocabulary_head:
        config["architectures"] = [architecture_with_score(model.config)]
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        config.pop("num_labels", None)
    _write_json(directory / "config.json", config)
    return bad


def save_adapter(model: CausalLM, name: str, directory: Path, base: str, write: bool, revision: str = "") -> str | None:
    """Save an adapter as a peft adapter directory with base model `base`. Returns the same as `save_model`."""
    info = model.adapters[name]
    bad = _gather_and_write(model, info.parameters, PREFIX, directory / "adapter_model.safetensors", write)
    if write:
        _write_json(directory / "adapter_config.json", settings_as_stored(info, base, revision))
    return bad


def load_into(model: CausalLM, directory: Path, adapter: str | None = None) -> None:
    """Overwrite live values of an adapter or of the base weights in place with those stored in `directory`.

    Names and shapes are checked before the first value changes.
    """
    if adapter is not None:
        load_into_adapter(model, adapter, directory)
        return
    with CheckpointReader(directory) as stored, torch.no_grad():
        check_names(model.base_parameters, tied_names(model.module), stored)
        for name, parameter in model.base_parameters.items():
            stored.check(name, full_shape(parameter))
        for name, parameter in model.base_parameters.items():
            parameter.copy_(stored.read(name, shard_of(parameter), full_shape(parameter), model.dtype))


def _gather_and_write(
    model: CausalLM, parameters: dict[str, nn.Parameter], prefix: str, path: Path, write: bool
) -> str | None:
    tensors: dict[str, Tensor] = {}
    bad: str | None = None
    for name, parameter in parameters.items():
        full = gather_full(parameter.detach(), shard_of(parameter), model.tp)
        if write:
            tensors[prefix + name] = full.cpu().contiguous()
            bad = bad or (None if full.isfinite().all() else name)
        progress.made()
    if write:
        save_file(tensors, path, metadata={"format": "pt"})
        progress.made()
    return bad


def _cut_into_files(parameters: dict[str, nn.Parameter]) -> list[list[str]]:
    files: list[list[str]] = [[]]
    held = 0
    for name, parameter in parameters.items():
        size = _full_bytes(parameter)
        if files[-1] and held + size > FILE_BYTES:
            files.append([])
            held = 0
        files[-1].append(name)
        held += size
    return files


def _full_bytes(parameter: nn.Parameter) -> int:
    return math.prod(full_shape(parameter)) * parameter.element_size()


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", "utf-8")
