"""Weights as they lie on disk: the tensors of a directory of safetensors files, read whole or by the slice.

Only safetensors is ever read.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harmony_core.engine.models.parallel import Shard
from harmony_core.errors import ModelRefused, VerificationError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"F64", "F32", "F16", "BF16"}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model directory."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise VerificationError(f"{path} is missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise VerificationError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise VerificationError(f"{path} does not hold a JSON object")
    return data


class StoredWeights:
    """Named tensors of one directory, opened lazily; a context manager that closes the files.

    `stem` is the file name without suffix: "model", or "adapter_model".
    """

    def __init__(self, directory: Path, stem: str = "model") -> None:
        self.directory = directory
        self._handles: dict[Path, Any] = {}
        self._files = self._find(stem)

    def __enter__(self) -> StoredWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles.clear()

    @property
    def names(self) -> frozenset[str]:
        """Every stored tensor's name."""
        return frozenset(self._files)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise unless the tensor has this full shape and a type that we read."""
        stored = self._slice(name)
        if stored.get_dtype() not in DTYPES:
            raise ModelRefused(
                f"{self._files[name]}: {name} is stored as {stored.get_dtype()}",
                hint="float32, bfloat16 and float16 weights are supported; convert quantised ones first",
            )
        if tuple(stored.get_shape()) != shape:
            found, expected = list(stored.get_shape()), list(shape)
            raise VerificationError(f"{self._files[name]}: {name} has shape {found}, the model needs {expected}")

    def read(self, name: str, shard: Shard | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """This rank's slice of a tensor of full `shape`, converted to `dtype`, on the CPU."""
        self.check(name, shape)
        window = [slice(None)] * len(shape)
        if shard is not None:
            window[shard.dim] = slice(shard.start, shard.stop)
        try:
            tensor: Tensor = (
                self._slice(name)[tuple(window)] if shape else self._open(self._files[name]).get_tensor(name)
            )
        except SafetensorError as error:
            raise VerificationError(f"{self._files[name]}: {name} cannot be read: {error}") from None
        # A slice of a mapped file must not outlive the mapping, and the optimizer wants it contiguous.
        return tensor.to(dtype, copy=True).contiguous()

    def _find(self, stem: str) -> dict[str, Path]:
        index, single = self.directory / f"{stem}.safetensors.index.json", self.directory / f"{stem}.safetensors"
        if single.is_file():
            return dict.fromkeys(self._open(single).keys(), single)
        if not index.is_file():
            pickles = sorted(p.name for p in self.directory.glob("*") if p.suffix in PICKLE_SUFFIXES)
            reason = f"only {', '.join(pickles)}, which is never read" if pickles else f"no {single.name}"
            raise VerificationError(f"{self.directory}: {reason}", hint="store the weights as safetensors")
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise VerificationError(f"{index}: no weight_map")
        files: dict[str, Path] = {}
        for name, file in places.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise VerificationError(f"{index}: {name} lies in {file!r}, not a safetensors file of this directory")
            files[name] = self.directory / file
            if name not in self._open(files[name]).keys():  # noqa: SIM118 - not a mapping
                raise VerificationError(f"{files[name]}: {name} is missing, {index.name} promises it")
        return files

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(str(path), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise VerificationError(f"{path} is damaged: {error}") from None
        return self._handles[path]

    def _slice(self, name: str) -> Any:
        return self._open(self._files[name]).get_slice(name)
