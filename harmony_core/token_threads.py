"""Conversations as tokens: one row of token ids, and the place and weight of each turn in it.

Knows nothing of templates or tokenizers. A thread never changes, save for its `metadata`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from harmony_core.errors import TokenizationError
from harmony_core.fragments import AnyFragment, Fragment, Text


class TokenizedTurn(NamedTuple):
    """One turn as token ids."""

    role: str
    content: list[int]


@dataclass(frozen=True, slots=True)
class TokenTurn:
    """One turn of a `TokenizedThread`: its tokens are `token_ids[start:end]`, template headers excluded.

    `source` is the turn it was made from, None for one that a model generated. `problem` says why the tokens of this
    turn could not be told from the template's; then start == end.
    """

    role: str
    start: int
    end: int
    weight: float
    source: tuple[AnyFragment, ...] | None = None
    text: str = ""
    problem: str = ""

    @property
    def fragments(self) -> tuple[AnyFragment, ...]:
        """The source's fragments, or the generated text."""
        return (Text(self.text),) if self.source is None else self.source


@dataclass(frozen=True, slots=True)
class GenerationRecord:
    """What the engine recorded of the tokens of a generated last turn; all as long as that turn.

    `model` is the name of the spawn that generated them.
    """

    logprobs: tuple[float, ...]
    sampled_logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    finish_reason: str
    model: str = ""


class TokenizedThread:
    """A conversation as one row of token ids with the turns' places in it; made by a model, not by hand.

    An assistant turn's tokens are those that the model must emit: its text and its end-of-turn token.
    """

    __slots__ = ("__weakref__", "_turns", "_uuid", "generation", "metadata", "token_ids")

    def __init__(
        self,
        token_ids: list[int],
        turns: Sequence[TokenTurn],
        metadata: Any = None,
        uuid: str | None = None,
        generation: GenerationRecord | None = None,
    ) -> None:
        self.token_ids = token_ids
        self._turns = tuple(turns)
        self._uuid = uuid
        self.generation = generation
        self.metadata: Any = metadata

    @property
    def token_weights(self) -> list[float]:
        """One weight for each of `token_ids`; 0 on the template's own tokens."""
        weights = [0.0] * len(self.token_ids)
        for turn in self._turns:
            if turn.weight:
                weights[turn.start : turn.end] = [turn.weight] * (turn.end - turn.start)
        return weights

    @property
    def num_weighted_tokens(self) -> int:
        """How many tokens have a weight above 0."""
        return sum(turn.end - turn.start for turn in self._turns if turn.weight > 0)

    @property
    def logprobs(self) -> list[float] | None:
        """Raw log-prob of each weighted token, where these are the generated ones; else None."""
        record = self._record()
        return None if record is None else list(record.logprobs)

    @property
    def sampled_logprobs(self) -> list[float] | None:
        """Like `logprobs`, under the distribution that was drawn from."""
        record = self._record()
        return None if record is None else list(record.sampled_logprobs)

    @property
    def versions(self) -> list[int] | None:
        """Policy version of each weighted token, where these are the generated ones; else None."""
        record = self._record()
        return None if record is None else list(record.versions)

    def get_turns(self) -> list[TokenizedTurn]:
        """Role and tokens of every turn, without the template's headers."""
        return [TokenizedTurn(turn.role, self.token_ids[turn.start : turn.end]) for turn in self._turns]

    def turns(self) -> list[TokenizedTurn]:
        """The same as `get_turns`."""
        return self.get_turns()

    @property
    def token_turns(self) -> tuple[TokenTurn, ...]:
        """The turns with places, weights and sources."""
        return self._turns

    def last_content(self) -> list[int] | None:
        """The tokens of the last turn, None in an empty thread."""
        return self.get_turns()[-1].content if self._turns else None

    def len_last_turn(self) -> int:
        """How many tokens the last turn has."""
        return self._turns[-1].end - self._turns[-1].start if self._turns else 0

    def get_fragments(self) -> list[tuple[str, list[Fragment]]]:
        """Role and fragments of every turn."""
        return [(turn.role, [fragment.public() for fragment in turn.fragments]) for turn in self._turns]

    def get_turn_weights(self) -> list[float]:
        """The weight of every turn."""
        return [turn.weight for turn in self._turns]

    def uuid(self) -> str | None:
        """The identifier of the thread it was made from, if any."""
        return self._uuid

    def with_weight_all_assistant_turns(self) -> TokenizedThread:
        """A copy that trains every assistant turn. Raises TokenizationError if one's tokens are not known."""
        return self._weighted(lambda index, count: True)

    def with_weight_last_assistant_turn(self) -> TokenizedThread:
        """A copy that trains the last assistant turn. Raises TokenizationError if its tokens are not known."""
        return self._weighted(lambda index, count: index == count - 1)

    def with_weight_assistant_turns_from_index(self, start_index: int) -> TokenizedThread:
        """A copy that trains assistant turns from the given one on, counted from 0. Raises TokenizationError."""
        return self._weighted(from_index(start_index))

    def _weighted(self, chosen: Callable[[int, int], bool]) -> TokenizedThread:
        weights = assistant_weights([turn.role for turn in self._turns], chosen)
        turns = [replace(turn, weight=weight) for turn, weight in zip(self._turns, weights, strict=True)]
        refuse_unknown(turns)
        return TokenizedThread(self.token_ids, turns, self.metadata, self._uuid, self.generation)

    def _record(self) -> GenerationRecord | None:
        weighted = [turn for turn in self._turns if turn.weight > 0]
        return self.generation if weighted == [*self._turns[-1:]] else None

    def __repr__(self) -> str:
        lines = [
            described_line(
                turn.role, turn.weight, f"{turn.end - turn.start} tokens {self.token_ids[turn.start : turn.end]}"
            )
            for turn in self._turns
        ]
        return described_thread(f"TokenizedThread {len(self.token_ids)} tokens", lines, self.metadata)


def refuse_unknown(turns: Sequence[TokenTurn]) -> None:
    """Raise TokenizationError for the first weighted turn whose tokens are not known."""
    for index, turn in enumerate(turns):
        if turn.weight and turn.problem:
            raise TokenizationError(f"turn {index} ({turn.role}) cannot be trained: {turn.problem}")


def from_index(start_index: int) -> Callable[[int, int], bool]:
    """The choice of the assistant turns from `start_index` on. Raises OverflowError for a negative one."""
    if start_index < 0:
        raise OverflowError(f"start_index must be 0 or more, not {start_index}")
    return lambda index, count: index >= start_index


def assistant_weights(roles: list[str], chosen: Callable[[int, int], bool]) -> list[float]:
    """1 for the assistant turns for which `chosen(index among assistant turns, their count)`, else 0."""
    count = roles.count("assistant")
    seen = 0
    weights = []
    for role in roles:
        weights.append(1.0 if role == "assistant" and chosen(seen, count) else 0.0)
        seen += role == "assistant"
    return weights


def described_line(role: str, weight: float, body: str) -> str:
    """One turn in a thread's repr."""
    mark = "*" if weight else " "
    scale = "" if weight in (0.0, 1.0) else f" ×{weight:g}"
    return f"{mark} [{role}{scale}] {body}".replace("\n", "\n    ")


def described_thread(title: str, lines: list[str], metadata: Any) -> str:
    """A thread's repr."""
    tail = [] if metadata is None else [f"  metadata: {metadata!r}"]
    return "\n".join([f"{title} ({len(lines)} turns, * trained)", *lines, *tail])
