"""Sampling in the deterministic mode: each row is drawn by itself, and scored by the function that training uses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from harmony_core.engine.inference.draws import PLAIN, Draws
from harmony_core.engine.inference.sampler import Sampled, sample
from harmony_core.engine.models.heads import token_logprobs
from harmony_core.engine.models.model import CausalLM


def sample_alone(model: CausalLM, hidden: Tensor, draws: Draws, suppressed: dict[int, list[int]]) -> Sampled:
    """As `sample(model.logits(hidden), ...)`, with bits that depend on a row's own `hidden` only; `hidden` `[N, d]`."""
    logits = model.logits(hidden)
    rows = [
        sample(logits[i : i + 1], draws.rows(slice(i, i + 1)), {0: suppressed[i]} if i in suppressed else None)
        for i in range(len(draws))
    ]
    tokens = torch.cat([row.tokens for row in rows])
    logprobs = token_logprobs(model, hidden, tokens)
    raw = (draws.kind == PLAIN) & (draws.temperature == 1)
    raw[list(suppressed)] = False
    processed = torch.cat([row.sampled_logprobs for row in rows])
    # Drawn from the raw distribution itself: one number, not two that differ in the last bit.
    return Sampled(tokens, logprobs, torch.where(torch.from_numpy(np.asarray(raw)), logprobs, processed))
