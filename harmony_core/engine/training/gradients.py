"""All gradients of one trainer in one flat buffer, so that reducing, checking and norms are few large operations.

Order within the buffer: parameters split over the tensor-parallel ranks first, then the replicated ones; in each,
matrices first. Each parameter's gradient is a view of the buffer, allocated once and never replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harmony_core.engine.models.parallel import TensorParallel, shard_of
from harmony_core.errors import InternalError
from harmony_core.rpc.rank_channel import progress

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BUCKET_ELEMENTS = 4 << 20
"""Elements that one all-reduce takes at a time: bounds what a communication library buffers."""


PIECE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Elements whose squares are summed in float32: a device sums them as a tree, which loses little."""


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in the flat buffers: elements `[start, stop)`."""

    name: str
    parameter: nn.Parameter
    start: int
    stop: int
    split: bool
    """Whether it is a slice of a tensor that the tensor-parallel ranks hold together."""

    @property
    def decays(self) -> bool:
        """Weight decay is for matrices only."""
        return self.parameter.ndim >= 2

    def of(self, buffer: Tensor) -> Tensor:
        """This parameter's part of a flat buffer, in the parameter's shape."""
        return buffer[self.start : self.stop].view(self.parameter.shape)


class FlatGradients:
    """The gradient buffer of `parameters`, float32 at least, with one `Slot` for each of them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], tp: TensorParallel) -> None:
        self.tp = tp
        self.slots = _layout(parameters, tp)
        first = self.slots[0].parameter
        self.low_precision = first.dtype.itemsize < 4
        self.dtype = torch.float32 if self.low_precision else first.dtype
        self.buffer = torch.zeros(self.slots[-1].stop, dtype=self.dtype, device=first.device)
        self.first_replicated = next((s.start for s in self.slots if not s.split), self.slots[-1].stop)
        self.views = [slot.of(self.buffer) for slot in self.slots]
        self._hooks = [self._attach(slot.parameter, view) for slot, view in zip(self.slots, self.views, strict=True)]

    def _attach(self, parameter: nn.Parameter, view: Tensor) -> torch.utils.hooks.RemovableHandle | None:
        if parameter.dtype != self.dtype and not self.low_precision:
            raise InternalError(f"trainable parameters of two types, {parameter.dtype} and {self.dtype}")
        parameter.requires_grad_(True)
        if not self.low_precision:
            parameter.grad = view
            return None

        # Autograd accumulates in the parameter's type; half precision would lose small contributions.
        def move(parameter: Tensor) -> None:
            if parameter.grad is not None:
                view.add_(parameter.grad)
                parameter.grad = None

        handle = parameter.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]
        assert isinstance(handle, torch.utils.hooks.RemovableHandle)
        return handle

    def detach(self) -> None:
        """Let the parameters go: no gradients, no hooks."""
        for slot, hook in zip(self.slots, self._hooks, strict=True):
            slot.parameter.grad = None
            if hook is not None:
                hook.remove()

    def clear(self) -> None:
        """Every gradient to zero."""
        self.buffer.zero_()

    def check_attached(self) -> None:
        """A parameter whose gradient was replaced would silently not be trained."""
        if not self.low_precision:
            for slot, view in zip(self.slots, self.views, strict=True):
                if slot.parameter.grad is not view:
                    raise InternalError(f"the gradient of {slot.name} was replaced")

    def reduce(self, group: ProcessGroup | None) -> None:
        """Sum over the replicas, then make the replicated part bit-identical on the tensor-parallel ranks."""
        if group is not None and dist.get_world_size(group) > 1:
            for bucket in torch.split(self.buffer, BUCKET_ELEMENTS):
                dist.all_reduce(bucket, group=group)
                progress.made()
        replicated = self.buffer[self.first_replicated :]
        if not self.tp.silent and replicated.numel():
            # Equal up to rounding already; equal bits keep the copies from drifting apart over many steps.
            for bucket in torch.split(replicated, BUCKET_ELEMENTS):
                dist.broadcast(bucket, group=self.tp.group, group_src=0)

    def of(self, parameter: nn.Parameter) -> Tensor | None:
        """The view of the buffer that takes a parameter's gradient; None for a parameter that is not trained."""
        views = (v for slot, v in zip(self.slots, self.views, strict=True) if slot.parameter is parameter)
        return next(views, None)

    def squared_norm(self) -> Tensor:
        """Sum of squares over all parameters, float64 on the device: shards summed, replicated ones counted once."""
        split = _squares(self.buffer[: self.first_replicated])
        if not self.tp.silent:
            dist.all_reduce(split, group=self.tp.group)
        return split + _squares(self.buffer[self.first_replicated :])

    def first_bad(self) -> str | None:
        """Name of the first tensor with a NaN or an infinity, the same on all tensor-parallel ranks."""
        bad = (slot.name for slot, view in zip(self.slots, self.views, strict=True) if not view.isfinite().all())
        names = sorted(slot.name for slot in self.slots)
        place = min((names.index(name) for name in bad), default=len(names))
        if not self.tp.silent:
            lowest = torch.tensor(place, device=self.buffer.device)
            dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self.tp.group)
            place = int(lowest.item())
        return names[place] if place < len(names) else None


def _layout(parameters: Mapping[str, nn.Parameter], tp: TensorParallel) -> list[Slot]:
    def split(parameter: nn.Parameter) -> bool:
        return tp.size > 1 and shard_of(parameter) is not None

    order = sorted(parameters.items(), key=lambda item: (not split(item[1]), item[1].ndim < 2))
    slots: list[Slot] = []
    start = 0
    for name, parameter in order:
        if not parameter.is_contiguous():
            raise InternalError(f"{name} is not contiguous, so it cannot be updated in place")
        stop = start + parameter.numel()
        slots.append(Slot(name, parameter, start, stop, split(parameter)))
        start = stop
    if not slots:
        raise InternalError("a trainer without trainable parameters")
    return slots


def _squares(flat: Tensor) -> Tensor:
    """Sum of squares; of pieces in the buffer's type, of their sums in float64."""
    if not flat.numel():
        return flat.new_zeros((), dtype=torch.float64)
    pieces = [torch.linalg.vector_norm(piece) for piece in torch.split(flat, PIECE_ELEMENTS[flat.device.type])]
    return torch.stack(pieces).double().square().sum()
