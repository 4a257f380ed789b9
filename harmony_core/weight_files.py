"""Reading what a model directory says about itself without loading it: JSON files and safetensors headers.

Nothing here knows an architecture. Every defect is a VerificationError that names the file and the reason.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from harmony_core.errors import VerificationError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz"})
"""Suffixes of files that may hold pickled objects; such a file is never opened."""

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""The stored types that are taken, with their size."""

_MAX_JSON = 64 * 1024 * 1024


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


def damaged(path: Path, reason: str) -> VerificationError:
    """The error for a file that is not what it should be."""
    return VerificationError(f"{path}: {reason}", path=str(path), reason=reason)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises VerificationError, also when the file is missing or absurdly large."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise damaged(path, f"larger than {_MAX_JSON // 2**20} MiB")
        text = path.read_bytes()
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from error
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise damaged(path, "not a JSON object")
    return value


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file; its header is checked against the file's size, no data is read."""
    try:
        with safe_open(path, "numpy") as file:
            entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {n: Tensor(n, e.get_dtype(), tuple(e.get_shape()), path.name) for n, e in entries.items()}
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from error
    except SafetensorError as error:
        with path.open("rb") as opened:
            start = opened.read(2)
        if start == b"PK" or start[:1] == b"\x80":
            raise damaged(path, "not a safetensors file but a pickled one, which is never read") from error
        raise damaged(path, f"not a safetensors file, or truncated ({str(error)[:200]})") from error
    for tensor in tensors.values():
        if tensor.dtype not in ITEM_BYTES:
            types = ", ".join(ITEM_BYTES)
            raise damaged(path, f"tensor {tensor.name[:100]!r} has type {tensor.dtype}; taken are {types}")
    return tensors


def weight_names(directory: Path) -> list[str]:
    """Names of the safetensors files that hold a model, from the index where there is one."""
    if not (directory / INDEX).exists():
        if (directory / SINGLE).exists():
            return [SINGLE]
        pickled = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLE_SUFFIXES)
        reason = f"no {SINGLE} and no {INDEX}"
        if pickled:
            reason += f", only pickled files, which are never read ({', '.join(pickled[:3])})"
        raise damaged(directory, reason)
    return sorted(set(_weight_map(directory).values()))


def _weight_map(directory: Path) -> dict[str, str]:
    path = directory / INDEX
    mapping = read_json(path).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise damaged(path, "no weight_map")
    for name, file in mapping.items():
        plain = isinstance(file, str) and os.path.basename(file) == file and file.endswith(".safetensors")
        if not plain or file.startswith("."):
            raise damaged(path, f"tensor {name[:100]!r} points to {str(file)[:100]!r}, not to a safetensors file here")
    return mapping


def read_headers(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a model directory by name; the index, when there is one, must agree with the files."""
    tensors: dict[str, Tensor] = {}
    for name in weight_names(directory):
        for tensor in read_header(directory / name).values():
            if tensor.name in tensors:
                raise damaged(directory / name, f"tensor {tensor.name[:100]!r} is also in {tensors[tensor.name].file}")
            tensors[tensor.name] = tensor
    if (directory / INDEX).exists():
        mapping = _weight_map(directory)
        for name, file in mapping.items():
            if name not in tensors or tensors[name].file != file:
                raise damaged(directory / file, f"tensor {name[:100]!r} is missing, which {INDEX} promises")
    return tensors
