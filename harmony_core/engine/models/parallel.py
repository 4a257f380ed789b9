"""Tensor parallelism on plain local tensors: the slices of the ranks, and collectives with autograd support.

Every parameter is an ordinary local tensor; a `Shard` records its part of the full tensor. `layers` splits the layers
of a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harmony_core.rpc.rank_channel import progress

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class TensorParallel:
    """One rank's place in the tensor-parallel group of `size` ranks, which hold one copy of a model together."""

    size: int
    rank: int
    group: ProcessGroup | None
    ordered: bool = False
    """Whether sums are taken in the order of ranks for any shape, which gives equal bits but costs time."""
    _muted: list[bool] = field(default_factory=list, compare=False, repr=False)

    @classmethod
    def single(cls) -> TensorParallel:
        """A group of one rank, which holds the full model."""
        return cls(size=1, rank=0, group=None)

    @property
    def silent(self) -> bool:
        """True on a single rank, or inside `without_collectives()`."""
        return self.size == 1 or bool(self._muted)

    @contextmanager
    def without_collectives(self) -> Iterator[None]:
        """Replace collectives by local no-ops, for rehearsals: same shapes and memory, wrong values."""
        self._muted.append(True)
        try:
            yield
        finally:
            self._muted.pop()


@dataclass(frozen=True)
class Shard:
    """The slice `[start, stop)` along `dim` of a tensor that is `full` long there."""

    dim: int
    start: int
    stop: int
    full: int

    @classmethod
    def of(cls, tp: TensorParallel, dim: int, full: int) -> Shard:
        """This rank's part of `full`; sizes differ by at most one, larger ones first."""
        base, extra = divmod(full, tp.size)
        start = tp.rank * base + min(tp.rank, extra)
        return cls(dim, start, start + base + (tp.rank < extra), full)

    def take(self, tensor: Tensor) -> Tensor:
        """The slice of a full-size tensor, a view."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start)


def set_shard(parameter: nn.Parameter, shard: Shard | None) -> None:
    """Record on the parameter which slice it is."""
    parameter.tp_shard = shard  # type: ignore[attr-defined]


def shard_of(parameter: Tensor) -> Shard | None:
    """The slice of the full tensor that this parameter holds; None if every rank holds the full tensor."""
    shard = getattr(parameter, "tp_shard", None)
    assert shard is None or isinstance(shard, Shard)
    return shard


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the full tensor of a parameter."""
    shard, shape = shard_of(parameter), list(parameter.shape)
    if shard is not None:
        shape[shard.dim] = shard.full
    return tuple(shape)


# Plain collectives: no gradient.


def all_reduce(tensor: Tensor, tp: TensorParallel, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place over the tensor-parallel ranks; returns its argument."""
    if tp.silent:
        return tensor
    if tp.ordered and op == dist.ReduceOp.SUM:
        parts = [torch.empty_like(tensor) for _ in range(tp.size)]
        dist.all_gather(parts, tensor, group=tp.group)
        tensor.copy_(parts[0])
        for part in parts[1:]:
            tensor.add_(part)
    else:
        dist.all_reduce(tensor, op, group=tp.group)
    progress.made()
    return tensor


def gather_full(tensor: Tensor, shard: Shard | None, tp: TensorParallel) -> Tensor:
    """Gather the full tensor from its slices, on every rank; a tensor without a shard is returned unchanged.

    `tensor` may be any tensor of the parameter's shape: the parameter, its gradient, an optimizer moment.
    """
    if shard is None or tp.size == 1:
        return tensor
    longest = -(-shard.full // tp.size)
    # all_gather needs equal shapes, so uneven slices are padded by one row.
    piece = tensor.detach().movedim(shard.dim, 0)
    padded = piece.new_zeros((longest, *piece.shape[1:]))
    padded[: piece.shape[0]] = piece
    pieces = [torch.empty_like(padded) for _ in range(tp.size)]
    if tp.silent:
        pieces = [padded] * tp.size
    else:
        dist.all_gather(pieces, padded, group=tp.group)
        progress.made()
    base, extra = divmod(shard.full, tp.size)
    full = torch.cat([p[: base + (rank < extra)] for rank, p in enumerate(pieces)])
    return full.movedim(0, shard.dim)


# Collectives with gradients. They are called outside compiled layers, which cannot react to `TensorParallel.silent`.


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0].clone(memory_format=torch.contiguous_format), ctx.tp), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        return all_reduce(x.clone(memory_format=torch.contiguous_format), tp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard, tp: TensorParallel) -> Tensor:
        ctx.shard = shard
        return gather_full(x, shard, tp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.shard.take(grads[0]).contiguous(), None, None


def copy_to(x: Tensor, tp: TensorParallel) -> Tensor:
    """Enter a split region with a tensor that all ranks share: identity; its gradient is summed over the ranks."""
    if tp.size == 1 or not (torch.is_grad_enabled() and x.requires_grad):
        return x
    copied: Tensor = _apply(_CopyTo, x, tp)
    return copied


def reduce_from(x: Tensor, tp: TensorParallel) -> Tensor:
    """Leave a split region by summing partial results; the gradient passes unchanged. May overwrite `x`."""
    if tp.size == 1:
        return x
    reduced: Tensor = _apply(_ReduceFrom, x, tp)
    return reduced


def gather_from(x: Tensor, full: int, tp: TensorParallel) -> Tensor:
    """Leave a split region by joining slices of the last dimension; the gradient is this rank's slice."""
    if tp.size == 1:
        return x
    gathered: Tensor = _apply(_GatherFrom, x, Shard.of(tp, x.dim() - 1, full), tp)
    return gathered


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _apply(function: type[torch.autograd.Function], x: Tensor, *args: Any) -> Tensor:
    if function is _ReduceFrom and not (torch.is_grad_enabled() and x.requires_grad):
        return all_reduce(x.contiguous(), *args)
    return function.apply(x, *args)  # type: ignore[no-any-return,no-untyped-call]


def sum_gradient(parameter: nn.Parameter, tp: TensorParallel) -> None:
    """Sum the gradient over the ranks, for a replicated parameter that each rank applies to its own part only.

    A tensor hook runs on each backward pass's gradient before it is accumulated, so earlier sums are not summed again.
    The parameter must already require a gradient.
    """

    def hook(gradient: Tensor) -> Tensor:
        return all_reduce(gradient.clone(memory_format=torch.contiguous_format), tp)

    parameter.register_hook(hook)  # type: ignore[no-untyped-call]
