"""From hidden states to log-probs of given tokens, without ever holding `[tokens, vocabulary]`.

The head runs over chunks of rows; each tensor-parallel rank scores its own slice of the vocabulary, and two small
reductions per chunk make the softmax whole. N rows, d hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harmony_core.engine.models.head_scorers import HostScorer, Scorer, make_scorer
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import all_reduce
from harmony_core.engine.models.products import add_product, plain_product, wide
from harmony_core.errors import DataError


@torch.no_grad()
def token_logprobs(model: CausalLM, hidden: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """log p(targets | hidden): `[N, d]`, `[N]` -> `[N]`, float32 (float64 in a float64 model), without gradient.

    The same on every tensor-parallel rank, which must all call it with the same N.
    """
    _check_targets(model, targets)
    count = len(targets)
    hidden, targets = pad_rows(model, hidden, targets)
    logprobs = hidden.new_empty(targets.shape, dtype=wide(hidden.dtype))
    scorer = make_scorer(model, len(targets), chunk, gradients=False)
    for rows in _chunks(0, len(targets), scorer.rows):
        logprobs[rows] = scorer.score(hidden[rows], targets[rows])
    return logprobs[:count]


@torch.no_grad()
def token_logprobs_and_entropies(
    model: CausalLM, hidden: Tensor, targets: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and the entropy of each row's distribution over the whole vocabulary, in nats, `[N]`."""
    _check_targets(model, targets)
    count = len(targets)
    hidden, targets = pad_rows(model, hidden, targets)
    found = hidden.new_empty((2, *targets.shape), dtype=wide(hidden.dtype))
    scorer = _entropy_scorer(model, chunk)
    for rows in _chunks(0, len(targets), scorer.rows):
        found[0, rows] = scorer.score(hidden[rows], targets[rows])
        found[1, rows] = scorer.entropies
        scorer.drop()
    return found[0, :count], found[1, :count]


def linear_logprob_loss(
    model: CausalLM,
    hidden: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    chunk: int | None = None,
    into: Tensor | None = None,
    entropy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`-sum(coefficients * logprobs)` as a scalar with gradient, and the log-probs `[N]` without.

    The gradients with respect to `hidden` and the head are computed inside the forward pass, chunk by chunk, so no
    logits are kept or computed twice. Every tensor-parallel rank calls it with the same arguments and gets the same
    loss. N may be 0: a loss of zero. A frozen head costs no gradient.

    `into`, `[V_local, d]` in the type that sums are taken in: the head's gradient is added to it in the forward pass,
    and autograd gets none. The loss must then be the root of the backward pass.

    `entropy`, `[N]`: also `-sum(entropy * H)` with the entropy H of each row's distribution.
    """
    _check_targets(model, targets)
    count = len(targets)
    hidden, targets, coefficients = pad_rows(model, hidden, targets, coefficients)
    padded = None if entropy is None else pad_rows(model, entropy)[0]
    loss, logprobs = _LinearLogprobLoss.apply(  # type: ignore[no-untyped-call]
        hidden, model.head_weight, targets, coefficients, model, chunk, into, padded
    )
    return loss, logprobs[:count]


def pad_rows(model: CausalLM, *tensors: Tensor) -> list[Tensor]:
    """Tensors of N rows with zeros appended up to the model's `row_multiple`."""
    missing = -len(tensors[0]) % model.row_multiple
    return [F.pad(x, (*[0] * (2 * x.dim() - 1), missing)) for x in tensors] if missing else list(tensors)


class _LinearLogprobLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        coefficients: Tensor,
        model: CausalLM,
        chunk: int | None,
        into: Tensor | None,
        entropy: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        kind = wide(hidden.dtype)
        coefficients = coefficients.to(kind)
        logprobs = hidden.new_empty(targets.shape, dtype=kind)
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = into if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[1] and into is None:
            weight_grad = torch.zeros_like(weight, dtype=kind)
        loss = logprobs.new_zeros(())
        scorer: Scorer
        if entropy is None:
            scorer = make_scorer(model, len(targets), chunk, gradients=True)
        else:
            scorer, entropy = _entropy_scorer(model, chunk), entropy.to(kind)
        for group in _chunks(0, len(targets), scorer.rows * scorer.tiles):
            for rows in _chunks(group.start, group.stop, scorer.rows):
                logprobs[rows] = scorer.score(hidden[rows], targets[rows])
                if entropy is None:
                    scorer.add_gradient(coefficients[rows])
                    continue
                assert isinstance(scorer, HostScorer)
                scorer.add_gradient(coefficients[rows], entropy[rows])
                loss -= (entropy[rows] * scorer.entropies).sum()
            gradient = scorer.take()
            if weight_grad is not None:
                add_product(weight_grad, gradient.t(), hidden[group].to(gradient.dtype))
            if hidden_grad is not None:
                plain_product(gradient.to(weight.dtype), weight, out=hidden_grad[group])
            del gradient
        if hidden_grad is not None:
            # Each rank saw its own slice of the vocabulary.
            all_reduce(hidden_grad, model.tp)
        ctx.grads = hidden_grad, None if weight_grad is into else weight_grad
        ctx.mark_non_differentiable(logprobs)
        return loss - (coefficients * logprobs).sum(), logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.grads
        ctx.grads = None  # a second backward through this loss is a bug, and the gradients are big
        scale = grads[0]
        return (
            None if hidden_grad is None else hidden_grad.mul_(scale.to(hidden_grad.dtype)),
            None if weight_grad is None else weight_grad.mul_(scale),
            *[None] * 6,
        )


def _entropy_scorer(model: CausalLM, chunk: int | None) -> HostScorer:
    """In plain torch on every device: no kernel of ours gives entropies."""
    return HostScorer(model, chunk or HostScorer.rows_for(model, matrices=2), entropies=True)


def _chunks(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def _check_targets(model: CausalLM, targets: Tensor) -> None:
    if targets.device.type == "cpu" and targets.numel():
        low, high = (int(bound) for bound in torch.aminmax(targets))
        if low < 0 or high >= model.vocab_size:
            raise DataError(f"target id {low if low < 0 else high} is outside the vocabulary of {model.vocab_size}")
