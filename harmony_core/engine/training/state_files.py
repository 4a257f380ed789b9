"""The optimizer's state as one safetensors file, with full-size tensors under the parameters' names.

Written tensor by tensor, so a sharded model never gathers more than one at a time; read slice by slice, so a state
may be loaded with another tensor-parallel size than it was saved with.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harmony_core.engine.models.parallel import gather_full, shard_of
from harmony_core.engine.training.gradients import Slot
from harmony_core.engine.training.optimizer import AdamW
from harmony_core.errors import VerificationError
from harmony_core.rpc.rank_channel import progress

FILE = "optimizer.safetensors"
_DTYPES = {torch.float32: "F32", torch.float64: "F64"}


def save(optimizer: AdamW, directory: Path, write: bool) -> None:
    """Write the state; every rank of one replica takes part in the gathering, the one with `write` writes."""
    entries = _entries(optimizer)
    left = iter(entries)
    try:
        if write:
            with open(directory / FILE, "wb") as file:
                file.write(_header(optimizer, entries))
                for _, slot, buffer in left:
                    _write(file, _full(optimizer, slot, buffer))
    finally:  # the other ranks gather whatever becomes of the file
        for _, slot, buffer in left:
            _full(optimizer, slot, buffer)


def load(optimizer: AdamW, directory: Path) -> None:
    """Read this rank's slices and the step; checks everything before it changes anything."""
    path = directory / FILE
    entries = _entries(optimizer)
    try:
        with safe_open(path, framework="pt") as file:
            step = _check(file, optimizer, entries, path)
            for name, slot, buffer in entries:
                shard = shard_of(slot.parameter)
                if shard is None or not slot.split:
                    value = file.get_tensor(name)
                else:
                    index = (slice(None),) * shard.dim + (slice(shard.start, shard.stop),)
                    value = file.get_slice(name)[index]
                slot.of(buffer).copy_(value)
                progress.made()
    except (SafetensorError, FileNotFoundError) as error:
        raise VerificationError(f"{path} cannot be read: {error}", file=str(path)) from error
    optimizer.step_count = step


def _entries(optimizer: AdamW) -> list[tuple[str, Slot, Tensor]]:
    return [
        (f"{kind}.{slot.name}", slot, buffer)
        for kind, buffer in optimizer.state().items()
        for slot in sorted(optimizer.gradients.slots, key=lambda slot: slot.name)
    ]


def _full_shape(slot: Slot) -> list[int]:
    shape = list(slot.parameter.shape)
    shard = shard_of(slot.parameter)
    if slot.split and shard is not None:
        shape[shard.dim] = shard.full
    return shape


def _full(optimizer: AdamW, slot: Slot, buffer: Tensor) -> Tensor:
    return gather_full(slot.of(buffer), shard_of(slot.parameter) if slot.split else None, optimizer.gradients.tp)


def _header(optimizer: AdamW, entries: list[tuple[str, Slot, Tensor]]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt", "step": str(optimizer.step_count)}}
    offset = 0
    for name, slot, buffer in entries:
        shape = _full_shape(slot)
        size = torch.Size(shape).numel() * buffer.element_size()
        header[name] = {"dtype": _DTYPES[buffer.dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    # The format wants the data aligned to 8 bytes; spaces may follow the JSON.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write(file: BinaryIO, tensor: Tensor) -> None:
    for piece in torch.split(tensor.detach().reshape(-1), 1 << 22):
        file.write(piece.cpu().numpy().tobytes())
        progress.made()


def _check(file: Any, optimizer: AdamW, entries: list[tuple[str, Slot, Tensor]], path: Path) -> int:
    def fail(reason: str) -> VerificationError:
        return VerificationError(f"{path}: {reason}", hint="the state was saved from another model", file=str(path))

    stored = set(file.keys())
    wanted = {name for name, _, _ in entries}
    if stored != wanted:
        odd = sorted(stored ^ wanted)
        raise fail(f"{odd[0]} is {'missing' if odd[0] in wanted else 'not part of this optimizer'} ({len(odd)} such)")
    for name, slot, buffer in entries:
        view = file.get_slice(name)
        if list(view.get_shape()) != _full_shape(slot) or view.get_dtype() != _DTYPES[buffer.dtype]:
            raise fail(f"{name} is {view.get_dtype()}{list(view.get_shape())}, not {_full_shape(slot)}")
    step = (file.metadata() or {}).get("step", "")
    if not step.isdecimal():
        raise fail("the step is missing")
    return int(step)
