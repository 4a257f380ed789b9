"""Weights as they lie on disk: the tensors of a directory of safetensors files, read whole or by the slice.

Which files those are, `weight_files` says, as it does in the registry. Only safetensors is ever read.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harmony_core.engine.models.parallel import Shard
from harmony_core.errors import VerificationError
from harmony_core.model.weight_files import read_headers
from harmony_core.plain_files import real_path
from harmony_core.rpc.rank_channel import progress


class CheckpointReader:
    """Named tensors of one directory, opened lazily; a context manager that closes the files.

    `stem` is the file name without suffix: "model", or "adapter_model".
    """

    def __init__(self, directory: Path, stem: str = "model") -> None:
        self.directory = directory
        self._handles: dict[Path, Any] = {}
        self._tensors = read_headers(directory, stem)

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles.clear()

    @property
    def names(self) -> frozenset[str]:
        """Every stored tensor's name."""
        return frozenset(self._tensors)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise unless the tensor has this full shape."""
        stored = self._tensors[name]
        if stored.shape != shape:
            found, expected = list(stored.shape), list(shape)
            raise VerificationError(f"{self._path(name)}: {name} has shape {found}, the model needs {expected}")

    def read(self, name: str, shard: Shard | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """This rank's slice of a tensor of full `shape`, converted to `dtype`, on the CPU."""
        self.check(name, shape)
        window = [slice(None)] * len(shape)
        if shard is not None:
            window[shard.dim] = slice(shard.start, shard.stop)
        try:
            file = self._open(self._path(name))
            tensor: Tensor = file.get_slice(name)[tuple(window)] if shape else file.get_tensor(name)
        except SafetensorError as error:
            raise VerificationError(f"{self._path(name)}: {name} cannot be read: {error}") from None
        progress.made()
        # A slice of a mapped file must not outlive the mapping, and the optimizer wants it contiguous.
        return tensor.to(dtype, copy=True).contiguous()

    def _path(self, name: str) -> Path:
        return self.directory / self._tensors[name].file

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(str(real_path(path)), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise VerificationError(f"{path} is damaged: {error}") from None
        return self._handles[path]
