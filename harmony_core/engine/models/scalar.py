"""Scalar heads: one number for a token, from its final hidden state, in place of the vocabulary's logits.

The head is a matrix `[1, d]` without bias, whole on every tensor-parallel rank and stored as `score.weight`, as in
transformers' `*ForSequenceClassification` with one label. It belongs to the base weights where these are trained or
were stored with one, else to an adapter. A new one is zero: every score is then exactly 0, whatever the number of ranks
and without a random draw, so a value model begins as no baseline and a reward model without a preference. The first
step moves the head alone, since a zero head passes no gradient on; from the second on everything is trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from harmony_core.engine.models.matmul import wide

if TYPE_CHECKING:
    from harmony_core.engine.models.model import CausalLM

SCORE = "score.weight"
"""The stored name of a scalar head, and the parameter's in a base that has one."""


def scores(model: CausalLM, hidden: Tensor, head: Tensor) -> Tensor:
    """`[N, d]` -> `[N]`, float32 (float64 in a float64 model), the same on every tensor-parallel rank."""
    kind = wide(hidden.dtype)
    if hidden.dtype == kind:
        return model.matmul(hidden, head)[:, 0]
    # One number is all there is of a token: it is not rounded to half precision.
    return hidden.to(kind) @ head[0].to(kind)


def put_scalar_head(module: nn.Module, width: int, dtype: torch.dtype) -> None:
    """Replace the vocabulary's head of a model on the meta device."""
    module.lm_head = None  # type: ignore[assignment]
    module.score = nn.Linear(width, 1, bias=False, device="meta", dtype=dtype)


def head_of(model: CausalLM, adapter: str | None) -> nn.Parameter:
    """The scalar head that a spawn uses: its adapter's own, else the stored one, else a new one that nobody trains."""
    own = model.adapters[adapter].parameters.get(SCORE) if adapter is not None else None
    head = model.base_parameters.get(SCORE) if own is None else own
    return new_head(model) if head is None else head


def new_head(model: CausalLM) -> nn.Parameter:
    """A head for `model`, not trained yet: the stored one's values, or zeros where none is stored."""
    stored = model.base_parameters.get(SCORE)
    values = torch.zeros(1, model.hidden_size, device=model.device, dtype=model.dtype)
    return nn.Parameter(values if stored is None else stored.detach().clone(), requires_grad=False)


def architecture_with_score(config: Any) -> str:
    """The name of transformers' class that a model with a scalar head is stored as."""
    known: Any = AutoModelForSequenceClassification._model_mapping
    return str(known[type(config)].__name__)
