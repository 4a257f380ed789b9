"""Tensor parallelism on plain local tensors: who holds which slice, and collectives that autograd understands.

A linear layer is split by its output rows (column-parallel) or by its input columns (row-parallel), the embedding by
its vocabulary (Shoeybi et al., Megatron-LM, 2019). Every parameter stays an ordinary local tensor; a `Shard` remembers
which part of the full one it is. This module does not know which layer of a model is split how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from harmony_core.rpc.rank_channel import progress

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class TensorParallel:
    """One rank's place among the `size` ranks that hold one copy of a model together."""

    size: int
    rank: int
    group: ProcessGroup | None
    ordered: bool = False
    """Whether sums are taken in the order of ranks, whatever a tensor's shape: for equal bits, at some cost."""
    _muted: list[bool] = field(default_factory=list, compare=False, repr=False)

    @classmethod
    def single(cls) -> TensorParallel:
        """One rank that holds everything."""
        return cls(size=1, rank=0, group=None)

    @property
    def silent(self) -> bool:
        """True when there is nobody to talk to, or inside `without_collectives()`."""
        return self.size == 1 or bool(self._muted)

    @contextmanager
    def without_collectives(self) -> Iterator[None]:
        """Run with local no-ops in place of collectives: same shapes and memory, wrong values; for rehearsals."""
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
    """Remember on the parameter which slice it is."""
    parameter.tp_shard = shard  # type: ignore[attr-defined]


def shard_of(parameter: Tensor) -> Shard | None:
    """Which slice of the full tensor this parameter is; None when every rank holds all of it."""
    shard = getattr(parameter, "tp_shard", None)
    assert shard is None or isinstance(shard, Shard)
    return shard


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole that a parameter is a slice of."""
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
    """The full tensor from its slices, on every rank; a tensor without a shard comes back as it is.

    `tensor` may be anything of the parameter's shape: the parameter, its gradient, an optimizer moment.
    """
    if shard is None or tp.size == 1:
        return tensor
    longest = -(-shard.full // tp.size)
    # all_gather wants equal shapes; uneven slices are padded by one row.
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


# Collectives with gradients. Their calls stay outside of compiled layers, which do not know `TensorParallel.silent`.


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
    """Leave a split region by joining slices of the last dimension; the gradient is the own slice of it."""
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
    """For a parameter that every rank holds but uses on its own part only: sum its gradient over the ranks.

    A tensor hook runs on each backward pass's gradient before it is accumulated, so earlier sums are not summed again.
    The parameter must require a gradient by now.
    """

    def hook(gradient: Tensor) -> Tensor:
        return all_reduce(gradient.clone(memory_format=torch.contiguous_format), tp)

    parameter.register_hook(hook)  # type: ignore[no-untyped-call]


Product = Callable[..., Tensor]
"""How a weight matrix is applied: (rows, weight, bias) -> rows, as `F.linear` does it."""


class ProductLinear(nn.Linear):
    """A linear layer that says how its weight is applied."""

    product: Product = staticmethod(F.linear)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        return self.product(input, self.weight, self.bias)


def set_product(layer: nn.Linear, product: Product) -> None:
    """Let a linear layer apply its weight with `product`."""
    if type(layer) is nn.Linear:
        # A class of its own, not a function on the layer that knows the layer: that circle would outlive the model.
        layer.__class__ = ProductLinear
    layer.product = product  # type: ignore[assignment]


class ColumnParallelLinear(nn.Linear):
    """A linear layer split by output rows; `in_features` and `out_features` stay those of the full layer.

    With `gather_output` every rank gets the whole output, else its own slice.
    """

    product: Product = staticmethod(F.linear)

    def __init__(self, full: nn.Linear, tp: TensorParallel, gather_output: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = full.in_features, full.out_features
        self.tp, self.gather_output = tp, gather_output
        shard = Shard.of(tp, 0, full.out_features)
        self.weight = _empty_slice(full.weight, shard)
        self.register_parameter("bias", None if full.bias is None else _empty_slice(full.bias, shard))

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` on all ranks -> this rank's slice of `[..., out]`, or all of it."""
        output = self.product(copy_to(input, self.tp), self.weight, self.bias)
        return gather_from(output, self.out_features, self.tp) if self.gather_output else output


class RowParallelLinear(nn.Linear):
    """A linear layer split by input columns: each rank adds its part. The bias is whole on every rank."""

    product: Product = staticmethod(F.linear)

    def __init__(self, full: nn.Linear, tp: TensorParallel) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.tp = full.in_features, full.out_features, tp
        self.weight = _empty_slice(full.weight, Shard.of(tp, 1, full.in_features))
        self.register_parameter("bias", full.bias)

    def forward(self, input: Tensor) -> Tensor:
        """This rank's slice of `[..., in]` -> `[..., out]` on all ranks."""
        output = reduce_from(self.product(input, self.weight), self.tp)
        return output if self.bias is None else output + self.bias


class VocabParallelEmbedding(nn.Embedding):
    """An embedding split by its rows; the vocabulary need not divide evenly. `scale` multiplies what it gives."""

    def __init__(self, full: nn.Embedding, tp: TensorParallel, scale: float | None = None) -> None:
        nn.Module.__init__(self)
        # Rounded as the weights are: so it is in models that scale their embeddings.
        self.scale = None if scale is None else torch.tensor(scale, dtype=full.weight.dtype).item()
        self.num_embeddings, self.embedding_dim = full.num_embeddings, full.embedding_dim
        self.padding_idx, self.tp = full.padding_idx, tp
        self.shard = Shard.of(tp, 0, full.num_embeddings)
        # The row of the pad token takes no gradient from the embedding, here as in torch.
        pad = -1 if full.padding_idx is None else full.padding_idx
        self.local_padding_idx = pad - self.shard.start if self.shard.start <= pad < self.shard.stop else None
        self.weight = _empty_slice(full.weight, self.shard)

    def forward(self, input: Tensor) -> Tensor:
        """Token ids `[...]` -> `[..., d]` on all ranks."""
        local = input - self.shard.start
        mine = (local >= 0) & (local < self.weight.shape[0])
        rows = F.embedding(local.clamp(0, self.weight.shape[0] - 1), self.weight, self.local_padding_idx)
        whole = reduce_from(rows * mine.unsqueeze(-1), self.tp)
        return whole if self.scale is None else whole * self.scale


def _empty_slice(full: Tensor, shard: Shard) -> nn.Parameter:
    """A parameter of the slice's shape on the full one's device; its values are written by the loader."""
    parameter = nn.Parameter(torch.empty_like(shard.take(full.detach())), requires_grad=full.requires_grad)
    set_shard(parameter, shard)
    return parameter
