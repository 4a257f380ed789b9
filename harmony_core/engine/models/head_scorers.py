"""The softmax over this rank's slice of the vocabulary, a tile of rows at a time: in plain torch, and by two kernels.

Both give `logprobs` of the targets over the whole vocabulary (two small reductions over the tensor-parallel ranks),
then, if asked, the gradient with respect to the logits. One tile's logits exist at a time. N rows, V local columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from harmony_core.engine.models.parallel import all_reduce
from harmony_core.engine.models.products import wide, wide_product

if TYPE_CHECKING:
    from harmony_core.engine.models.model import CausalLM

HOST_BYTES = 64 << 20
"""Logits of one tile in plain torch."""
DEVICE_BYTES = 1 << 30
"""On CUDA: a tile's float32 logits and the gradients of `TILES` tiles."""
TILES = 4
"""Tiles whose gradients are multiplied at once on CUDA: each product reads and writes all of the head's gradient."""


class HostScorer:
    """In plain torch operations, on any device. The gradient takes the place of the logits."""

    tiles = 1
    entropies: Tensor
    """Of the tile scored last, `[n]`, where they are asked for."""

    def __init__(self, model: CausalLM, rows: int, entropies: bool = False) -> None:
        """`entropies`: score them too, which takes a second matrix as large as the logits."""
        self.model, self.weight = model, model.head_weight
        self.rows = rows
        self._with_entropies = entropies

    @staticmethod
    def rows_for(model: CausalLM, matrices: int = 1) -> int:
        """Rows of a tile of which there are `matrices`; the same number on every tensor-parallel rank."""
        rows = HOST_BYTES // (4 * _widest(model) * matrices)
        return max(1, rows // model.row_multiple) * model.row_multiple

    def score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """`[n, d]`, `[n]` -> log-probs `[n]`."""
        model = self.model
        logits = wide_product(hidden, self.weight.t()) if hidden.is_cuda else model.matmul(hidden, self.weight)
        logits = logits.to(wide(logits.dtype))
        top = all_reduce(logits.amax(-1), model.tp, dist.ReduceOp.MAX)
        local = targets - model.vocab_start
        self._mine = (local >= 0) & (local < self.weight.shape[0])
        self._columns = local.clamp(0, self.weight.shape[0] - 1)
        picked = logits.gather(1, self._columns[:, None])[:, 0]
        picked = torch.where(self._mine, picked - top, 0.0)
        self._values = logits.sub_(top[:, None]).exp_()
        terms = [self._values.sum(-1), picked]
        if self._with_entropies:
            # x log x, and 0 where x, an exponential, has become 0.
            self._products = torch.xlogy(self._values, self._values)
            terms.append(self._products.sum(-1))
        sums = all_reduce(torch.stack(terms), model.tp)
        self._total = sums[0]
        if self._with_entropies:
            self.entropies = self._total.log() - sums[2] / self._total
        return sums[1] - self._total.log()

    def add_gradient(self, coefficients: Tensor, entropy: Tensor | None = None) -> None:
        """Of the tile scored last: d(-sum(c * logprob)) / d(logits) = `c * (softmax - onehot)`.

        `entropy`: coefficients e; then also d(-sum(e * H)) / d(logits) = `e * softmax * (log softmax + H)`.
        """
        if entropy is None:
            self._values.mul_((coefficients / self._total)[:, None])
        else:
            scaled = entropy / self._total
            shift = scaled * (self.entropies - self._total.log())
            self._values.mul_((coefficients / self._total + shift)[:, None]).add_(self._products.mul_(scaled[:, None]))
            del self._products
        self._values.scatter_add_(1, self._columns[:, None], torch.where(self._mine, -coefficients, 0.0)[:, None])

    def drop(self) -> None:
        """Forget what a gradient with entropies would need of the tile scored last."""
        del self._values, self._products

    def take(self) -> Tensor:
        """The gradients added since the last call, `[N, V]`."""
        values = self._values
        # The next tile must not find this one's still there.
        del self._values
        return values


class DeviceScorer:
    """By the kernels of `kernels.softmax`: float32 logits, gradients in the model's type, both in fixed buffers."""

    tiles = TILES

    def __init__(self, model: CausalLM, rows: int, gradients: int = 0) -> None:
        """`rows` of a tile; room for the gradients of so many rows."""
        from harmony_core.engine.kernels import softmax

        self.model, self.weight, self.rows = model, model.head_weight, rows
        self._kernels = softmax
        width = self.weight.shape[0]
        self._logits = self.weight.new_empty((rows, width), dtype=torch.float32)
        self._gradients = self.weight.new_empty((gradients, width))
        self._statistics = self.weight.new_empty((3, rows), dtype=torch.float32)
        self._filled = 0

    @staticmethod
    def rows_for(model: CausalLM) -> int:
        """Rows of a tile; the same number on every tensor-parallel rank."""
        row = (4 + TILES * model.dtype.itemsize) * _widest(model)
        return max(1, DEVICE_BYTES // row // 128) * 128

    def score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """`[n, d]`, `[n]` -> log-probs `[n]`."""
        tp, count = self.model.tp, len(targets)
        self._tile = wide_product(hidden, self.weight.t(), out=self._logits[:count])
        self._columns = targets - self.model.vocab_start
        local_top, total, picked = (row[:count] for row in self._statistics)
        self._kernels.softmax_statistics(self._tile, self._columns, local_top, total, picked)
        self._top = all_reduce(local_top.clone(), tp, dist.ReduceOp.MAX)
        mine = (self._columns >= 0) & (self._columns < self.weight.shape[0])
        sums = torch.stack([total * (local_top - self._top).exp(), torch.where(mine, picked - self._top, 0.0)])
        all_reduce(sums, tp)
        self._total = sums[0]
        return sums[1] - self._total.log()

    def add_gradient(self, coefficients: Tensor) -> None:
        """Of the tile scored last: d(-sum(c * logprob)) / d(logits) = `c * (softmax - onehot)`."""
        count = len(coefficients)
        out = self._gradients[self._filled : self._filled + count]
        scales = coefficients / self._total
        self._kernels.softmax_gradient(self._tile, self._columns, self._top, scales, coefficients, out)
        self._filled += count

    def take(self) -> Tensor:
        """The gradients added since the last call, `[N, V]`; the next tile overwrites them."""
        filled, self._filled = self._filled, 0
        return self._gradients[:filled]


Scorer = HostScorer | DeviceScorer


def make_scorer(model: CausalLM, count: int, rows: int | None, gradients: bool) -> Scorer:
    """What scores `count` rows of this model, `rows` at a time or as many as the budget allows."""
    if model.device.type == "cuda" and model.dtype != torch.float64:
        rows = min(rows or DeviceScorer.rows_for(model), max(1, count))
        return DeviceScorer(model, rows, min(count, TILES * rows) if gradients else 0)
    return HostScorer(model, rows or HostScorer.rows_for(model))


def _widest(model: CausalLM) -> int:
    """Columns of the rank that has most."""
    return -(-model.vocab_size // model.tp.size)
