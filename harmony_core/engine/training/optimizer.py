"""AdamW over flat buffers: gradients, moments, and float32 masters of half-precision weights.

With flat buffers, reductions, checks and norms are few large operations; the parameters are updated in place. Order in
a buffer: parameters split over the tensor-parallel ranks first, then the replicated ones; in each, matrices first. Each
parameter's gradient is a view of its buffer, allocated once and never replaced.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), with the arithmetic of torch.optim.AdamW. The
state on disk is one safetensors file with full-size tensors under the parameters' names: written tensor by tensor, so
that a sharded model gathers one at a time, and read slice by slice, so that it can be loaded with another
tensor-parallel size.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from harmony_core.engine.models.parallel import Shard, TensorParallel, full_shape, gather_full, shard_of
from harmony_core.errors import InternalError, VerificationError
from harmony_core.rpc.rank_channel import progress

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FILE = "optimizer.safetensors"
_DTYPES = {torch.float32: "F32", torch.float64: "F64"}

BUCKET_ELEMENTS = 4 << 20
"""Elements of one all-reduce, which bounds the buffers of a communication library."""

PIECE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Elements whose squares are summed in float32: a device sums them as a tree, which loses little."""


@dataclass(frozen=True)
class ParameterSpan:
    """The place of one parameter in the flat buffers: elements `[start, stop)`."""

    name: str
    parameter: nn.Parameter
    start: int
    stop: int
    shard: Shard | None
    """Its slice of the full tensor over the tensor-parallel group; None for a replicated parameter."""

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices only."""
        return self.parameter.ndim >= 2

    def of(self, buffer: Tensor) -> Tensor:
        """This parameter's part of a flat buffer, in the parameter's shape."""
        return buffer[self.start : self.stop].view(self.parameter.shape)


class FlatGradients:
    """The gradient buffer of `parameters`, at least float32, with one `ParameterSpan` for each parameter."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], tp: TensorParallel) -> None:
        self.tp = tp
        self.spans = _layout(parameters, tp)
        first = self.spans[0].parameter
        self.low_precision = first.dtype.itemsize < 4
        self.dtype = torch.float32 if self.low_precision else first.dtype
        self.buffer = torch.zeros(self.spans[-1].stop, dtype=self.dtype, device=first.device)
        self.first_replicated = next((s.start for s in self.spans if s.shard is None), self.spans[-1].stop)
        self.views = [span.of(self.buffer) for span in self.spans]
        self._hooks = [self._attach(span.parameter, view) for span, view in zip(self.spans, self.views, strict=True)]

    def _attach(self, parameter: nn.Parameter, view: Tensor) -> RemovableHandle | None:
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

        handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]
        return handle

    def detach(self) -> None:
        """Remove the gradients and hooks of the parameters."""
        for span, hook in zip(self.spans, self._hooks, strict=True):
            span.parameter.grad = None
            if hook is not None:
                hook.remove()

    def clear(self) -> None:
        """Set every gradient to zero."""
        self.buffer.zero_()

    def check_attached(self) -> None:
        """Raise InternalError if a parameter's gradient was replaced: that parameter would not be trained."""
        if not self.low_precision:
            for span, view in zip(self.spans, self.views, strict=True):
                if span.parameter.grad is not view:
                    raise InternalError(f"the gradient of {span.name} was replaced")

    def reduce(self, group: ProcessGroup | None) -> None:
        """Sum over the replicas, then make the replicated part bit-identical on the tensor-parallel ranks."""
        if group is not None and dist.get_world_size(group) > 1:
            for bucket in torch.split(self.buffer, BUCKET_ELEMENTS):
                dist.all_reduce(bucket, group=group)
                progress.made()
        replicated = self.buffer[self.first_replicated :]
        if not self.tp.silent and replicated.numel():
            # Equal up to rounding already; equal bits prevent the copies from drifting apart over many steps.
            for bucket in torch.split(replicated, BUCKET_ELEMENTS):
                dist.broadcast(bucket, group=self.tp.group, group_src=0)

    def of(self, parameter: nn.Parameter) -> Tensor | None:
        """The part of the buffer for a parameter's gradient; None if the parameter is not trained."""
        views = (v for span, v in zip(self.spans, self.views, strict=True) if span.parameter is parameter)
        return next(views, None)

    def squared_norm(self) -> Tensor:
        """Sum of squares over all parameters, float64 on the device: shards summed, replicated ones counted once."""
        split = _squares(self.buffer[: self.first_replicated])
        if not self.tp.silent:
            dist.all_reduce(split, group=self.tp.group)
        return split + _squares(self.buffer[self.first_replicated :])

    def first_bad(self) -> str | None:
        """Name of the first tensor with a NaN or an infinity, the same on all tensor-parallel ranks."""
        bad = (span.name for span, view in zip(self.spans, self.views, strict=True) if not view.isfinite().all())
        names = sorted(span.name for span in self.spans)
        place = min((names.index(name) for name in bad), default=len(names))
        if not self.tp.silent:
            lowest = torch.tensor(place, device=self.buffer.device)
            dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self.tp.group)
            place = int(lowest.item())
        return names[place] if place < len(names) else None


def _layout(parameters: Mapping[str, nn.Parameter], tp: TensorParallel) -> list[ParameterSpan]:
    found = [(name, p, shard_of(p) if tp.size > 1 else None) for name, p in parameters.items()]
    spans: list[ParameterSpan] = []
    for name, parameter, shard in sorted(found, key=lambda entry: (entry[2] is None, entry[1].ndim < 2)):
        if not parameter.is_contiguous():
            raise InternalError(f"{name} is not contiguous, so it cannot be updated in place")
        start = spans[-1].stop if spans else 0
        spans.append(ParameterSpan(name, parameter, start, start + parameter.numel(), shard))
    if not spans:
        raise InternalError("a trainer without trainable parameters")
    return spans


def _squares(flat: Tensor) -> Tensor:
    """Sum of squares: within pieces in the buffer's type, over pieces in float64."""
    if not flat.numel():
        return flat.new_zeros((), dtype=torch.float64)
    pieces = [torch.linalg.vector_norm(piece) for piece in torch.split(flat, PIECE_ELEMENTS[flat.device.type])]
    return torch.stack(pieces).double().square().sum()


CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Elements updated at a time, which bounds the only temporary of an update."""
LARGE = 1 << 20
"""On CUDA, parameters of at least this many elements are updated alone; smaller ones together, via the masters."""


@dataclass(frozen=True)
class _Segment:
    """A range of the flat buffers that is updated at once, with the corresponding elements of the parameters."""

    start: int
    stop: int
    decays: bool
    pieces: list[Tensor]

    @property
    def sizes(self) -> list[int]:
        return [piece.numel() for piece in self.pieces]


_Entry = tuple[str, ParameterSpan, Tensor]
"""A tensor of the state file: its name, and the part of a flat buffer that holds it."""


class AdamW:
    """Moments, masters and the update. `step_count` is Adam's step counter (0 before the first update)."""

    def __init__(self, gradients: FlatGradients, fused: bool | None = None) -> None:
        """`fused`: update by one kernel, the default on CUDA, instead of torch operations."""
        self.gradients = gradients
        self.step_count = 0
        self.exp_avg = torch.zeros_like(gradients.buffer)
        self.exp_avg_sq = torch.zeros_like(gradients.buffer)
        self.master: Tensor | None = torch.zeros_like(gradients.buffer) if gradients.low_precision else None
        single = gradients.buffer.dtype == torch.float32
        self._fused = gradients.buffer.is_cuda and single if fused is None else fused
        alone: float = math.inf
        most = CHUNK_ELEMENTS[gradients.buffer.device.type]
        if self._fused:
            alone, most = LARGE if gradients.low_precision else 0, len(gradients.buffer)
        self._segments = list(_segments(gradients.spans, alone, most))
        self.refresh_masters()

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state: moments and masters."""
        return sum(buffer.nbytes for buffer in self.state().values())

    def state(self) -> dict[str, Tensor]:
        """The flat buffers by name."""
        buffers = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return buffers if self.master is None else buffers | {"master": self.master}

    @torch.no_grad()
    def refresh_masters(self) -> None:
        """Copy the parameters to the masters. Call this after the parameters were written from outside."""
        if self.master is not None:
            for span in self.gradients.spans:
                span.of(self.master).copy_(span.parameter)

    @torch.no_grad()
    def update(self, lr: float, weight_decay: float, beta1: float, beta2: float, eps: float, scale: float) -> None:
        """Take one step with `scale` times the gradients, in place. The gradients are undefined afterwards."""
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
        gradient, average, square = self.gradients.buffer[run], self.exp_avg[run], self.exp_avg_sq[run]
        update_in_one_pass(gradient, average, square, masters, rounded, **arguments)
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
        weights = segment.pieces if self.master is None else [self.master[run]]
        if keep != 1.0:
            torch._foreach_mul_(weights, keep)
        changes = list(torch.split(change, [weight.numel() for weight in weights]))
        torch._foreach_add_(weights, changes, alpha=-step_size)
        if self.master is not None:
            torch._foreach_copy_(segment.pieces, list(torch.split(weights[0], segment.sizes)))

    def save(self, directory: Path, write: bool) -> None:
        """Write the state. All ranks of one replica must call this to gather it; the one with `write` writes."""
        entries = self._entries()
        left = iter(entries)
        try:
            if write:
                with open(directory / FILE, "wb") as file:
                    file.write(self._header(entries))
                    for _, span, buffer in left:
                        for piece in torch.split(self._full(span, buffer).detach().reshape(-1), 1 << 22):
                            file.write(piece.cpu().numpy().tobytes())
                            progress.made()
        finally:  # the other ranks gather even if writing failed
            for _, span, buffer in left:
                self._full(span, buffer)

    def load(self, directory: Path) -> None:
        """Read this rank's slices and the step. If they do not fit, raises VerificationError before any change."""
        path = directory / FILE
        entries = self._entries()
        try:
            with safe_open(path, framework="pt") as file:
                step = _check(file, entries, path)
                for name, span, buffer in entries:
                    index: tuple[slice, ...] = ()
                    if span.shard is not None:
                        index = (slice(None),) * span.shard.dim + (slice(span.shard.start, span.shard.stop),)
                    span.of(buffer).copy_(file.get_slice(name)[index] if index else file.get_tensor(name))
                    progress.made()
        except (SafetensorError, FileNotFoundError) as error:
            raise VerificationError(f"{path} cannot be read: {error}", file=str(path)) from error
        self.step_count = step

    def _entries(self) -> list[_Entry]:
        spans = sorted(self.gradients.spans, key=lambda span: span.name)
        return [(f"{kind}.{span.name}", span, buffer) for kind, buffer in self.state().items() for span in spans]

    def _full(self, span: ParameterSpan, buffer: Tensor) -> Tensor:
        return gather_full(span.of(buffer), span.shard, self.gradients.tp)

    def _header(self, entries: list[_Entry]) -> bytes:
        header: dict[str, object] = {"__metadata__": {"format": "pt", "step": str(self.step_count)}}
        offset = 0
        for name, span, buffer in entries:
            shape = full_shape(span.parameter)
            end = offset + math.prod(shape) * buffer.element_size()
            header[name] = {"dtype": _DTYPES[buffer.dtype], "shape": shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        # The format requires data aligned to 8 bytes; spaces may follow the JSON.
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def _check(file: Any, entries: list[_Entry], path: Path) -> int:
    """Check that a state file has the tensors of the entries. Returns its step."""

    def fail(reason: str) -> VerificationError:
        return VerificationError(f"{path}: {reason}", hint="the state was saved from another model", file=str(path))

    stored = set(file.keys())
    wanted = {name for name, _, _ in entries}
    if stored != wanted:
        odd = sorted(stored ^ wanted)
        raise fail(f"{odd[0]} is {'missing' if odd[0] in wanted else 'not part of this optimizer'} ({len(odd)} such)")
    for name, span, buffer in entries:
        view, shape = file.get_slice(name), list(full_shape(span.parameter))
        if list(view.get_shape()) != shape or view.get_dtype() != _DTYPES[buffer.dtype]:
            raise fail(f"{name} is {view.get_dtype()}{list(view.get_shape())}, not {shape}")
    step = (file.metadata() or {}).get("step", "")
    if not step.isdecimal():
        raise fail("the step is missing")
    return int(step)


def _segments(spans: list[ParameterSpan], alone: float, most: int) -> Iterator[_Segment]:
    """Segments of equal decay and at most `most` elements; parameters of at least `alone` elements are alone."""

    def key(span: ParameterSpan) -> tuple[bool, str]:
        return span.decays, span.name if span.stop - span.start >= alone else ""

    for (decays, _), members in groupby(spans, key):
        run = list(members)
        for start in range(run[0].start, run[-1].stop, most):
            stop = min(start + most, run[-1].stop)
            parts = [(s.parameter.detach().view(-1), s.start) for s in run if s.start < stop and start < s.stop]
            pieces = [flat[max(start - first, 0) : stop - first] for flat, first in parts]
            yield _Segment(start, stop, decays, pieces)
