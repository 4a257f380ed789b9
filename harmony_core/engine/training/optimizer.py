"""AdamW over flat state, updating the parameters where they lie.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), with the arithmetic of torch.optim.AdamW. The
moments, and for half-precision parameters the float32 masters, are flat buffers laid out like the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from harmony_core.engine.training.gradients import FlatGradients, Slot

CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Elements updated at a time: bounds the one temporary of an update."""
LARGE = 1 << 20
"""On CUDA a parameter of so many elements is updated by itself; smaller ones together, and copied from the masters."""


@dataclass(frozen=True)
class _Segment:
    """A run of the flat buffers that is updated at once, and the parameters' elements that belong to it."""

    start: int
    stop: int
    decays: bool
    pieces: list[Tensor]
    sizes: list[int]


class AdamW:
    """Moments, masters and the update. `step_count` is Adam's step counter (0 before the first update)."""

    def __init__(self, gradients: FlatGradients, fused: bool | None = None) -> None:
        """`fused`: by one kernel, as on CUDA, or by torch's operations."""
        self.gradients = gradients
        self.step_count = 0
        self.exp_avg = torch.zeros_like(gradients.buffer)
        self.exp_avg_sq = torch.zeros_like(gradients.buffer)
        self.master: Tensor | None = torch.zeros_like(gradients.buffer) if gradients.low_precision else None
        single = gradients.buffer.dtype == torch.float32
        self._fused = gradients.buffer.is_cuda and single if fused is None else fused
        if self._fused:
            self._segments = list(_runs(gradients.slots, apart=self.master is None))
        else:
            self._segments = list(_segments(gradients.slots, CHUNK_ELEMENTS[gradients.buffer.device.type]))
        self.refresh_masters()

    @property
    def state_bytes(self) -> int:
        """Bytes of moments and masters."""
        return sum(buffer.nbytes for buffer in self.state().values())

    def state(self) -> dict[str, Tensor]:
        """The flat buffers by name."""
        buffers = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return buffers if self.master is None else buffers | {"master": self.master}

    @torch.no_grad()
    def refresh_masters(self) -> None:
        """Take the masters from the parameters, after these were written from outside."""
        if self.master is not None:
            for slot in self.gradients.slots:
                slot.of(self.master).copy_(slot.parameter)

    @torch.no_grad()
    def update(self, lr: float, weight_decay: float, beta1: float, beta2: float, eps: float, scale: float) -> None:
        """One step with `scale` times the accumulated gradients, in place; what becomes of these is not defined."""
        self.step_count += 1
        step_size = lr / (1 - beta1**self.step_count)
        root_correction = math.sqrt(1 - beta2**self.step_count)
        for segment in self._segments:
            keep = 1 - lr * weight_decay if segment.decays else 1.0
            arguments = {"scale": scale, "beta1": beta1, "beta2": beta2, "root_correction": root_correction, "eps": eps}
            update = self._in_one_pass if self._fused else self._by_operations
            update(segment, keep=keep, step_size=step_size, **arguments)

    def _in_one_pass(self, segment: _Segment, **arguments: float) -> None:
        from harmony_core.engine.kernels.training import update_in_one_pass

        run = slice(segment.start, segment.stop)
        alone = segment.pieces[0] if len(segment.pieces) == 1 else None
        masters = alone if self.master is None else self.master[run]
        assert masters is not None, "without masters every parameter is a segment"
        rounded = None if self.master is None else alone
        update_in_one_pass(
            self.gradients.buffer[run], self.exp_avg[run], self.exp_avg_sq[run], masters, rounded, **arguments
        )
        if alone is None:
            torch._foreach_copy_(segment.pieces, list(torch.split(masters, segment.sizes)))

    def _by_operations(
        self,
        segment: _Segment,
        *,
        scale: float,
        beta1: float,
        beta2: float,
        root_correction: float,
        eps: float,
        keep: float,
        step_size: float,
    ) -> None:
        run = slice(segment.start, segment.stop)
        gradient, average, square = self.gradients.buffer[run], self.exp_avg[run], self.exp_avg_sq[run]
        gradient.mul_(scale)
        average.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        change = square.sqrt().div_(root_correction).add_(eps)
        torch.div(average, change, out=change)
        if self.master is None:
            _apply(segment.pieces, list(torch.split(change, segment.sizes)), keep, step_size)
        else:
            master = self.master[run]
            _apply([master], [change], keep, step_size)
            torch._foreach_copy_(segment.pieces, list(torch.split(master, segment.sizes)))


def _apply(parameters: list[Tensor], changes: list[Tensor], keep: float, step_size: float) -> None:
    if keep != 1.0:
        torch._foreach_mul_(parameters, keep)
    torch._foreach_add_(parameters, changes, alpha=-step_size)


def _segments(slots: list[Slot], most: int) -> Iterator[_Segment]:
    """Cut the layout into runs of at most `most` elements, each with one decay setting."""
    start, pieces, sizes, decays = 0, list[Tensor](), list[int](), True
    for slot in slots:
        if pieces and slot.decays != decays:
            yield _Segment(start, slot.start, decays, pieces, sizes)
            start, pieces, sizes = slot.start, [], []
        decays = slot.decays
        flat = slot.parameter.detach().view(-1)
        taken = 0
        while taken < flat.numel():
            size = min(flat.numel() - taken, most - sum(sizes))
            pieces.append(flat[taken : taken + size])
            sizes.append(size)
            taken += size
            if sum(sizes) == most:
                yield _Segment(start, start + most, decays, pieces, sizes)
                start, pieces, sizes = start + most, [], []
    if pieces:
        yield _Segment(start, start + sum(sizes), decays, pieces, sizes)


def _runs(slots: list[Slot], apart: bool) -> Iterator[_Segment]:
    """Large parameters one by one, small neighbours with one decay setting together; all one by one if `apart`."""
    run: list[Slot] = []

    def segment() -> _Segment:
        pieces = [slot.parameter.detach().view(-1) for slot in run]
        return _Segment(run[0].start, run[-1].stop, run[0].decays, pieces, [piece.numel() for piece in pieces])

    for slot in slots:
        large = apart or slot.stop - slot.start >= LARGE
        if run and (large or slot.decays != run[0].decays):
            yield segment()
            run = []
        run.append(slot)
        if large:
            yield segment()
            run = []
    if run:
        yield segment()
