"""From hidden states to log-probs of given tokens, without ever holding `[tokens, vocabulary]`.

The head runs over chunks of rows; each tensor-parallel rank scores its own slice of the vocabulary, and two small
reductions per chunk make the softmax whole. N rows, d hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import all_reduce
from harmony_core.errors import DataError

CHUNK_BYTES = 64 << 20
"""Logits of one chunk on one rank, float32."""


@torch.no_grad()
def token_logprobs(model: CausalLM, hidden: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """log p(targets | hidden): `[N, d]`, `[N]` -> `[N]`, float32 (float64 in a float64 model), without gradient.

    The same on every tensor-parallel rank, which must all call it with the same N.
    """
    _check_targets(model, targets)
    count, weight = len(targets), model.head_weight
    hidden, targets = pad_rows(model, hidden, targets)
    logprobs = hidden.new_empty(targets.shape, dtype=_wide(hidden.dtype))
    for rows in _chunks(len(targets), chunk or rows_per_chunk(model)):
        scorer = _Chunk(model, hidden[rows], weight, targets[rows])
        logprobs[rows] = scorer.logprobs
    return logprobs[:count]


def linear_logprob_loss(
    model: CausalLM, hidden: Tensor, targets: Tensor, coefficients: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """`-sum(coefficients * logprobs)` as a scalar with gradient, and the log-probs `[N]` without.

    The gradients with respect to `hidden` and the head are computed inside the forward pass, chunk by chunk, so no
    logits are kept or computed twice. Every tensor-parallel rank calls it with the same arguments and gets the same
    loss. N may be 0: a loss of zero. A frozen head costs no gradient.
    """
    _check_targets(model, targets)
    count = len(targets)
    hidden, targets, coefficients = pad_rows(model, hidden, targets, coefficients)
    loss, logprobs = _LinearLogprobLoss.apply(
        hidden, model.head_weight, targets, coefficients, model, chunk or rows_per_chunk(model)
    )  # type: ignore[no-untyped-call]
    return loss, logprobs[:count]


def rows_per_chunk(model: CausalLM) -> int:
    """How many rows make `CHUNK_BYTES` of logits; the same number on every tensor-parallel rank."""
    rows = CHUNK_BYTES // (4 * -(-model.vocab_size // model.tp.size))
    return max(1, rows // model.row_multiple) * model.row_multiple


def pad_rows(model: CausalLM, *tensors: Tensor) -> list[Tensor]:
    """Tensors of N rows with zeros appended up to the model's `row_multiple`."""
    missing = -len(tensors[0]) % model.row_multiple
    return [F.pad(x, (*[0] * (2 * x.dim() - 1), missing)) for x in tensors] if missing else list(tensors)


class _Chunk:
    """The softmax of a few rows over this rank's slice of the vocabulary."""

    def __init__(self, model: CausalLM, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
        tp = model.tp
        logits = model.matmul(hidden, weight)
        self.logits = logits.to(_wide(logits.dtype))
        top = all_reduce(self.logits.amax(-1), tp, dist.ReduceOp.MAX)
        local = targets - model.vocab_start
        self.mine = (local >= 0) & (local < weight.shape[0])
        self.local = local.clamp(0, weight.shape[0] - 1)
        picked = self.logits.gather(1, self.local[:, None])[:, 0]
        picked = torch.where(self.mine, picked - top, 0.0)
        self.exponentials = self.logits.sub_(top[:, None]).exp_()
        sums = all_reduce(torch.stack([self.exponentials.sum(-1), picked]), tp)
        self.total = sums[0]
        self.logprobs = sums[1] - self.total.log()

    def logit_gradient(self, coefficients: Tensor) -> Tensor:
        """d(-sum(c * logprob)) / d(logits): `c * (softmax - onehot)`, in place of the exponentials."""
        gradient = self.exponentials.mul_((coefficients / self.total)[:, None])
        gradient.scatter_add_(1, self.local[:, None], torch.where(self.mine, -coefficients, 0.0)[:, None])
        return gradient


class _LinearLogprobLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor, model: CausalLM, chunk: int
    ) -> tuple[Tensor, Tensor]:
        wide = _wide(hidden.dtype)
        coefficients = coefficients.to(wide)
        logprobs = hidden.new_empty(targets.shape, dtype=wide)
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(targets), chunk):
            scorer = _Chunk(model, hidden[rows], weight, targets[rows])
            logprobs[rows] = scorer.logprobs
            gradient = scorer.logit_gradient(coefficients[rows])
            if weight_grad is not None:
                weight_grad.addmm_(gradient.t(), hidden[rows].to(wide))
            if hidden_grad is not None:
                hidden_grad[rows] = gradient.to(weight.dtype) @ weight
        if hidden_grad is not None:
            # Each rank saw its own slice of the vocabulary.
            all_reduce(hidden_grad, model.tp)
        ctx.grads = hidden_grad, weight_grad
        ctx.mark_non_differentiable(logprobs)
        return -(coefficients * logprobs).sum(), logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden_grad, weight_grad = ctx.grads
        ctx.grads = None  # a second backward through this loss is a bug, and the gradients are big
        scale = grads[0]
        return (
            None if hidden_grad is None else hidden_grad.mul_(scale.to(hidden_grad.dtype)),
            None if weight_grad is None else weight_grad.mul_(scale),
            None,
            None,
            None,
            None,
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _check_targets(model: CausalLM, targets: Tensor) -> None:
    if targets.device.type == "cpu" and targets.numel():
        low, high = (int(bound) for bound in torch.aminmax(targets))
        if low < 0 or high >= model.vocab_size:
            raise DataError(f"target id {low if low < 0 else high} is outside the vocabulary of {model.vocab_size}")
