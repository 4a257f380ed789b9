"""The tokens that the grammar of a constrained completion allowed, and logits without the others.

Masks stay in the host's memory, one bit for each token of the vocabulary; a tile of logits gets those of its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harmony_core.errors import InternalError

FORBIDDEN = -1e30
"""The logit of a token that is not allowed: its probability is 0, also where a shard allows none of its tokens."""


@dataclass(frozen=True)
class AllowedTokens:
    """The allowed tokens of N positions. Both tensors are on the CPU.

    index: `[N]` long, the row of `masks` of each position. masks: `[U, bytes]` uint8: bit i of byte b is for token
    8 b + i. Row 0 allows every token.
    """

    index: Tensor
    masks: Tensor

    @staticmethod
    def read(parts: Sequence[tuple[int, bytes, bytes]]) -> AllowedTokens | None:
        """From messages: the number of positions, `allowed` and `masks` of each. None if no message has masks."""
        index, rows, known = [], [], 0
        for count, allowed, masks in parts:
            own = np.frombuffer(allowed, "<i4").astype(np.int64) if masks else np.zeros(count, np.int64)
            if own.size != count:
                raise InternalError(f"a message with {count} tokens and {own.size} numbers of masks")
            index.append(np.where(own > 0, own + known, 0))
            if masks:
                rows.append(np.frombuffer(masks, np.uint8).reshape(own.max(), -1))
                known += len(rows[-1])
        if not rows:
            return None
        table = np.concatenate([np.full_like(rows[0][:1], 255), *rows])
        return AllowedTokens(torch.from_numpy(np.concatenate(index)), torch.from_numpy(table))

    def __getitem__(self, rows: slice | Tensor) -> AllowedTokens:
        return AllowedTokens(self.index[rows], self.masks)

    def forbid_others(self, logits: Tensor, first: int) -> None:
        """Set the logits `[N, v]` of the tokens `first` to `first + v - 1` that are not allowed, in place."""
        width = logits.shape[1]
        bits = self.masks[:, first // 8 : (first + width + 7) // 8][self.index].bitwise_not_().to(logits.device)
        shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
        forbidden = (bits[:, :, None] >> shifts).bitwise_and_(1).view(torch.bool).flatten(1)
        logits.masked_fill_(forbidden[:, first % 8 : first % 8 + width], FORBIDDEN)
