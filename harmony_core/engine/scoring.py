"""Log-probs of given tokens, or values: several sequences packed into one forward pass, no gradient."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.models.heads import scores, token_logprobs
from harmony_core.engine.models.model import CausalLM
from harmony_core.rpc.protocol import Score


@torch.no_grad()
def score(model: CausalLM, adapter: str | None, requests: list[Score], head: Tensor | None = None) -> list[bytes]:
    """For each request float32 log-probs `[T]` of its targets; a negative target is not asked for and gives 0.

    With a scalar `head` the values at the positions of the targets, whatever these are.
    """
    tokens = [np.frombuffer(request.tokens, "<i4").astype(np.int64) for request in requests]
    targets = np.concatenate([np.frombuffer(request.targets, "<i4").astype(np.int64) for request in requests])
    lengths = [len(sequence) for sequence in tokens]
    positions = np.concatenate([np.arange(length) for length in lengths])

    def put(array: np.ndarray[tuple[int], np.dtype[np.int64]]) -> torch.Tensor:
        return torch.from_numpy(array).to(model.device)

    asked = np.flatnonzero(targets >= 0)
    values = np.zeros(len(targets), dtype=np.float32)
    with forward_context(ForwardContext(PackedAttention(tuple(lengths)), adapter)):
        hidden = model.hidden_states(put(np.concatenate(tokens)), put(positions))
        if len(asked):
            rows = hidden[put(asked)]
            found = token_logprobs(model, rows, put(targets[asked])) if head is None else scores(model, rows, head)
            values[asked] = found.float().cpu().numpy()
    return [part.astype("<f4").tobytes() for part in np.split(values, np.cumsum(lengths)[:-1])]
