"""One request: what is to be read, how it is to be continued, and the records of what was drawn. No torch."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from harmony_core.engine.inference.blocks import TOKEN_BYTES
from harmony_core.engine.inference.sampling_parameters import Setting, stream
from harmony_core.errors import DataError
from harmony_core.rpc.protocol import Generated, Sampling

RECORD = np.dtype([("token", "<i4"), ("logprob", "<f4"), ("sampled_logprob", "<f4"), ("version", "<i4")])
"""What is kept of a drawn token."""
Records = NDArray[np.void]


def check_sampling(sampling: Sampling) -> None:
    """Raise DataError, naming the setting, its value and what is allowed, for settings nothing can be drawn with."""
    allowed = {
        "temperature": (sampling.temperature >= 0 and math.isfinite(sampling.temperature), "0 (greedy) or more"),
        "top_p": (0 < sampling.top_p <= 1, "above 0, at most 1 (off)"),
        "top_k": (sampling.top_k >= 0, "0 (off) or more"),
        "min_p": (0 <= sampling.min_p <= 1, "between 0 (off) and 1"),
        "max_tokens": (sampling.max_tokens >= 1, "at least 1"),
        "min_tokens": (sampling.min_tokens >= 0, "0 or more"),
    }
    for name, (good, rule) in allowed.items():
        if not good:
            raise DataError(f"{name}={getattr(sampling, name)} cannot be sampled with", hint=f"{name} must be {rule}")


@dataclass(eq=False, slots=True)
class Sequence:
    """A request. While it runs, most of its state is in its row of the `SlotTable`.

    `tokens` (int32) are those to read before the next one is drawn: the prompt, and what was drawn before its pages
    were taken from it. `limit` is the most new tokens it may have, `arrival` counts requests up, `stop_ids` are those
    of the vocabulary.
    """

    id: int
    tokens: bytes
    sampling: Sampling
    limit: int
    arrival: int
    stop_ids: list[int]
    prompt_length: int = field(init=False)
    setting: Setting = field(init=False)
    stream: int = field(init=False)
    slot: int = -1
    known_pages: int = 0
    """Pages of `tokens` that the prefix index knows."""
    records: list[Records] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens) // TOKEN_BYTES
        self.setting = Setting.of(self.sampling)
        self.stream = stream(self.sampling.seed)

    @property
    def length(self) -> int:
        """Number of `tokens`."""
        return len(self.tokens) // TOKEN_BYTES

    @property
    def drawn(self) -> int:
        """New tokens that are among `tokens`."""
        return self.length - self.prompt_length

    def reread(self) -> None:
        """Its pages are gone: what was drawn is to be read again with the prompt."""
        prompt = self.tokens[: self.prompt_length * TOKEN_BYTES]
        self.tokens = prompt + b"".join(records["token"].tobytes() for records in self.records)
        self.known_pages = 0

    def generated(self, finish_reason: str) -> Generated:
        """The completion, for the wire."""
        records = np.concatenate(self.records)
        return Generated(
            tokens=records["token"].tobytes(),
            logprobs=records["logprob"].tobytes(),
            sampled_logprobs=records["sampled_logprob"].tobytes(),
            versions=records["version"].tobytes(),
            finish_reason=finish_reason,
            seconds_to_first=self.first - self.started,
            seconds=time.perf_counter() - self.started,
        )
