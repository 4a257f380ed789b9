"""One request while it is being answered: its tokens so far, their records, its pages. No torch."""

from __future__ import annotations

import math
import time
from array import array
from dataclasses import dataclass, field

from harmony_core.engine.inference.draws import Setting, stream
from harmony_core.errors import DataError
from harmony_core.rpc.protocol import Generated, Sampling, pack_floats, pack_ints


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
    """A request. `limit` is the most new tokens it may have, `cached` how many of its tokens are in the pages."""

    id: int
    prompt: array[int]
    sampling: Sampling
    limit: int
    cached: int = 0
    alive: bool = True
    slot: int = -1
    pages: array[int] = field(default_factory=lambda: array("i"))
    reserved_pages: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled_logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    setting: Setting = field(init=False)
    stop_ids: frozenset[int] = field(init=False)
    stream: int = field(init=False)
    finish_reason: str = ""
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0

    def __post_init__(self) -> None:
        self.setting = Setting.of(self.sampling)
        self.stop_ids = frozenset(self.sampling.stop_ids)
        self.stream = stream(self.sampling.seed)

    @property
    def length(self) -> int:
        """Prompt and new tokens: also the position of the next token."""
        return len(self.prompt) + len(self.tokens)

    @property
    def must_go_on(self) -> bool:
        """Whether the next token may not be a stop token yet."""
        return len(self.tokens) < self.sampling.min_tokens and bool(self.stop_ids)

    def append(self, token: int, logprob: float, sampled_logprob: float, version: int) -> None:
        """Take a drawn token with its records, and notice the end."""
        if not self.tokens:
            self.first = time.perf_counter()
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.sampled_logprobs.append(sampled_logprob)
        self.versions.append(version)
        if token in self.stop_ids and len(self.tokens) > self.sampling.min_tokens:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"

    def generated(self) -> Generated:
        """The completion, for the wire."""
        return Generated(
            tokens=pack_ints(self.tokens),
            logprobs=pack_floats(self.logprobs),
            sampled_logprobs=pack_floats(self.sampled_logprobs),
            versions=pack_ints(self.versions),
            finish_reason=self.finish_reason,
            seconds_to_first=self.first - self.started,
            seconds=time.perf_counter() - self.started,
        )
