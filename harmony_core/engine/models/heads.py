"""Log-probs of given tokens from hidden states, without a full `[tokens, vocabulary]` tensor; and scalar heads.

The head runs over chunks of rows; each tensor-parallel rank scores its own slice of the vocabulary, and two small
reductions per chunk complete the softmax. If needed, the gradient with respect to the logits is computed along with it.
Scorers do this in plain torch, or by two kernels. N rows, d hidden, V vocabulary (in a scorer the local columns).

A scalar head gives one number per token instead of logits. It is a matrix `[1, d]` without bias, replicated on every
tensor-parallel rank and stored as `score.weight`, as in transformers' `*ForSequenceClassification` with one label. It
belongs to the base weights if these are trained or were stored with one, else to an adapter. A new head is zero: all
scores are exactly 0 for any number of ranks and without a random draw, so a value model starts as no baseline and a
reward model without preference. The first step trains only the head, since a zero head passes no gradient on; later
steps train all parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from harmony_core.engine.models.allowed import AllowedTokens
from harmony_core.engine.models.matmul import add_matmul, plain_matmul, wide, wide_matmul
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import all_reduce
from harmony_core.memory.plan import HEAD_DEVICE_BYTES, HEAD_HOST_BYTES, HEAD_TILES
from harmony_core.rpc.rank_channel import progress

if TYPE_CHECKING:
    from harmony_core.engine.models.model import CausalLM


class HostScorer:
    """Scores in plain torch operations, on any device. The gradient overwrites the logits."""

    tiles = 1
    entropies: Tensor
    """Entropies of the last scored tile, `[n]`, if requested."""

    def __init__(self, model: CausalLM, rows: int, entropies: bool = False) -> None:
        """`entropies`: compute them too, which takes a second matrix as large as the logits."""
        self.model, self.weight = model, model.head_weight
        self.rows = rows
        self._with_entropies = entropies

    @staticmethod
    def rows_for(model: CausalLM, matrices: int = 1) -> int:
        """Rows of a tile if there are `matrices` of its size; the same on every tensor-parallel rank."""
        rows = HEAD_HOST_BYTES // (4 * _widest(model) * matrices)
        return max(1, rows // model.row_multiple) * model.row_multiple

    def score(self, hidden: Tensor, targets: Tensor, allowed: AllowedTokens | None = None) -> Tensor:
        """`[n, d]`, `[n]` -> log-probs `[n]`, over the allowed tokens of each row."""
        model = self.model
        logits = wide_matmul(hidden, self.weight.t()) if hidden.is_cuda else model.matmul(hidden, self.weight)
        logits = logits.to(wide(logits.dtype))
        if allowed is not None:
            allowed.forbid_others(logits, model.vocab_shard.start)
        top = all_reduce(logits.amax(-1), model.tp, dist.ReduceOp.MAX)
        local = targets - model.vocab_shard.start
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
        """Free the tensors that a gradient with entropies would need of the last scored tile."""
        del self._values, self._products

    def take(self) -> Tensor:
        """The gradients added since the last call, `[N, V]`."""
        values = self._values
        # Free the memory before the next tile.
        del self._values
        return values


class DeviceScorer:
    """Scores with Triton kernels: float32 logits, gradients in the model's type, both in fixed buffers."""

    tiles = HEAD_TILES

    def __init__(self, model: CausalLM, rows: int, gradients: int = 0) -> None:
        """`rows`: rows of a tile. `gradients`: rows whose gradients are buffered."""
        from harmony_core.engine.kernels import training

        self.model, self.weight, self.rows = model, model.head_weight, rows
        self._kernels = training
        width = self.weight.shape[0]
        self._logits = self.weight.new_empty((rows, width), dtype=torch.float32)
        self._gradients = self.weight.new_empty((gradients, width))
        self._statistics = self.weight.new_empty((3, rows), dtype=torch.float32)
        self._filled = 0

    @staticmethod
    def rows_for(model: CausalLM, masked: bool = False) -> int:
        """Rows of a tile; the same number on every tensor-parallel rank. `masked`: a tile has a mask, too."""
        row = (4 + 2 * masked + HEAD_TILES * model.dtype.itemsize) * _widest(model)
        return max(1, HEAD_DEVICE_BYTES // row // 128) * 128

    def score(self, hidden: Tensor, targets: Tensor, allowed: AllowedTokens | None = None) -> Tensor:
        """`[n, d]`, `[n]` -> log-probs `[n]`, over the allowed tokens of each row."""
        tp, count = self.model.tp, len(targets)
        self._tile = wide_matmul(hidden, self.weight.t(), out=self._logits[:count])
        if allowed is not None:
            allowed.forbid_others(self._tile, self.model.vocab_shard.start)
        self._columns = targets - self.model.vocab_shard.start
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


def make_scorer(
    model: CausalLM, count: int, rows: int | None, gradients: bool, masked: bool = False, entropies: bool = False
) -> Scorer:
    """A scorer for `count` rows of this model, `rows` at a time or as many as the budget allows.

    `masked`: not all tokens are allowed. `entropies`: in plain torch on every device; the kernels do not compute them.
    """
    if entropies:
        return HostScorer(model, rows or HostScorer.rows_for(model, 2 + masked), entropies=True)
    if model.device.type == "cuda" and model.dtype != torch.float64:
        rows = min(rows or DeviceScorer.rows_for(model, masked), max(1, count))
        return DeviceScorer(model, rows, min(count, HEAD_TILES * rows) if gradients else 0)
    return HostScorer(model, rows or HostScorer.rows_for(model, 1 + masked))


def _widest(model: CausalLM) -> int:
    """Most vocabulary columns on any rank."""
    return -(-model.vocab_size // model.tp.size)


@torch.no_grad()
def token_logprobs(
    model: CausalLM, hidden: Tensor, targets: Tensor, chunk: int | None = None, allowed: AllowedTokens | None = None
) -> Tensor:
    """log p(targets | hidden): `[N, d]`, `[N]` -> `[N]`, float32 (float64 in a float64 model), without gradient.

    `allowed`: the tokens that each row's softmax goes over, of `[N]` rows; None for the whole vocabulary. The same on
    every tensor-parallel rank; all must call it with the same N.
    """
    return _score(model, hidden, targets, chunk, allowed, entropies=False)[0]


@torch.no_grad()
def token_logprobs_and_entropies(
    model: CausalLM, hidden: Tensor, targets: Tensor, chunk: int | None = None, allowed: AllowedTokens | None = None
) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and the entropy of each row's distribution over the same tokens, in nats, `[N]`."""
    logprobs, entropies = _score(model, hidden, targets, chunk, allowed, entropies=True)
    return logprobs, entropies


def _score(
    model: CausalLM, hidden: Tensor, targets: Tensor, chunk: int | None, allowed: AllowedTokens | None, entropies: bool
) -> Tensor:
    """Log-probs and, if requested, entropies, `[1 or 2, N]`."""
    count, masked = len(targets), allowed is not None
    hidden, targets = pad_rows(model, hidden, targets)
    allowed = None if allowed is None else AllowedTokens(pad_rows(model, allowed.index)[0], allowed.masks)
    found = hidden.new_empty((1 + entropies, *targets.shape), dtype=wide(hidden.dtype))
    scorer = make_scorer(model, len(targets), chunk, gradients=False, masked=masked, entropies=entropies)
    for rows in _chunks(0, len(targets), scorer.rows):
        found[0, rows] = scorer.score(hidden[rows], targets[rows], None if allowed is None else allowed[rows])
        if entropies:
            assert isinstance(scorer, HostScorer)
            found[1, rows] = scorer.entropies
            scorer.drop()
    return found[:, :count]


def linear_logprob_loss(
    model: CausalLM,
    hidden: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    chunk: int | None = None,
    into: Tensor | None = None,
    entropy: Tensor | None = None,
    allowed: AllowedTokens | None = None,
) -> tuple[Tensor, Tensor]:
    """`-sum(coefficients * logprobs)` as a scalar with gradient, and the log-probs `[N]` without.

    The gradients with respect to `hidden` and the head are computed inside the forward pass, chunk by chunk, so no
    logits are kept or computed twice. Every tensor-parallel rank calls it with the same arguments and gets the same
    loss. N may be 0: a loss of zero. A frozen head costs no gradient.

    `into`, `[V_local, d]` in the type of sums: the head's gradient is added to it in the forward pass, and autograd
    gets none. The loss must then be the root of the backward pass.

    `entropy`, `[N]`: adds `-sum(entropy * H)` with the entropy H of each row's distribution. `allowed`: see
    `token_logprobs`.
    """
    count = len(targets)
    hidden, targets, coefficients = pad_rows(model, hidden, targets, coefficients)
    padded = None if entropy is None else pad_rows(model, entropy)[0]
    masks = None if allowed is None else AllowedTokens(pad_rows(model, allowed.index)[0], allowed.masks)
    loss, logprobs = _LinearLogprobLoss.apply(  # type: ignore[no-untyped-call]
        hidden, model.head_weight, targets, coefficients, model, chunk, into, padded, masks
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
        allowed: AllowedTokens | None,
    ) -> tuple[Tensor, Tensor]:
        kind = wide(hidden.dtype)
        coefficients = coefficients.to(kind)
        logprobs = hidden.new_empty(targets.shape, dtype=kind)
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = into if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[1] and into is None:
            weight_grad = torch.zeros_like(weight, dtype=kind)
        loss = logprobs.new_zeros(())
        entropy = None if entropy is None else entropy.to(kind)
        scorer = make_scorer(model, len(targets), chunk, True, allowed is not None, entropy is not None)
        for group in _chunks(0, len(targets), scorer.rows * scorer.tiles):
            for rows in _chunks(group.start, group.stop, scorer.rows):
                logprobs[rows] = scorer.score(hidden[rows], targets[rows], None if allowed is None else allowed[rows])
                if entropy is None:
                    scorer.add_gradient(coefficients[rows])
                    continue
                assert isinstance(scorer, HostScorer)
                scorer.add_gradient(coefficients[rows], entropy[rows])
                loss -= (entropy[rows] * scorer.entropies).sum()
            gradient = scorer.take()
            if weight_grad is not None:
                add_matmul(weight_grad, gradient.t(), hidden[group].to(gradient.dtype))
            if hidden_grad is not None:
                plain_matmul(gradient.to(weight.dtype), weight, out=hidden_grad[group])
            del gradient
        if hidden_grad is not None:
            # Each rank used its own slice of the vocabulary.
            all_reduce(hidden_grad, model.tp)
        ctx.grads = hidden_grad, None if weight_grad is into else weight_grad
        ctx.mark_non_differentiable(logprobs)
        return loss - (coefficients * logprobs).sum(), logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.grads
        ctx.grads = None  # free them: they are large, and there is only one backward pass
        scale = grads[0]
        return (
            None if hidden_grad is None else hidden_grad.mul_(scale.to(hidden_grad.dtype)),
            None if weight_grad is None else weight_grad.mul_(scale),
            *[None] * 7,
        )


def _chunks(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))
        progress.made()


SCORE = "score.weight"
"""Name of a scalar head in files, and of its parameter in base weights."""


def scores(model: CausalLM, hidden: Tensor, head: Tensor) -> Tensor:
    """`[N, d]` -> `[N]`, float32 (float64 in a float64 model), the same on every tensor-parallel rank."""
    kind = wide(hidden.dtype)
    if hidden.dtype == kind:
        return model.matmul(hidden, head)[:, 0]
    # The only number of a token is not rounded to half precision.
    return hidden.to(kind) @ head[0].to(kind)


def put_scalar_head(module: nn.Module, width: int, dtype: torch.dtype) -> None:
    """Replace the vocabulary's head of a model on the meta device."""
    module.lm_head = None  # type: ignore[assignment]
    module.score = nn.Linear(width, 1, bias=False, device="meta", dtype=dtype)


def head_of(model: CausalLM, adapter: str | None) -> nn.Parameter:
    """The scalar head of a spawn: the one of its adapter, else the stored one, else a new one that is not trained."""
    own = model.adapters[adapter].parameters.get(SCORE) if adapter is not None else None
    head = model.base_parameters.get(SCORE) if own is None else own
    return new_head(model) if head is None else head


def new_head(model: CausalLM) -> nn.Parameter:
    """An untrained head for `model`: the values of the stored head, or zeros if there is no stored head."""
    stored = model.base_parameters.get(SCORE)
    values = torch.zeros(1, model.hidden_size, device=model.device, dtype=model.dtype)
    return nn.Parameter(values if stored is None else stored.detach().clone(), requires_grad=False)


def architecture_with_score(config: Any) -> str:
    """Name of the transformers class in the config of a stored model with a scalar head."""
    known: Any = AutoModelForSequenceClassification._model_mapping
    return str(known[type(config)].__name__)
