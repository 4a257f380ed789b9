"""Conversations as tokens: one row of token ids, and the place and weight of each turn in it.

Knows nothing of templates or tokenizers. A thread never changes, save for its `metadata`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from harmony_core.errors import TokenizationError
from harmony_core.turns import Conversation, Turn


class TokenizedTurn(NamedTuple):
    """One turn as token ids."""

    role: str
    content: list[int]


@dataclass(frozen=True, slots=True)
class TokenTurn(Turn):
    """One turn of a `TokenizedThread`: its tokens are `token_ids[start:end]`, template headers excluded.

    `problem` says why the tokens of this turn could not be told from the template's; then start == end.
    """

    start: int = 0
    end: int = 0
    problem: str = ""


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


class TokenizedThread(Conversation[TokenTurn]):
    """A conversation as one row of token ids with the turns' places in it; made by a model, not by hand.

    An assistant turn's tokens are those that the model must emit: its text and its end-of-turn token.
    """

    __slots__ = ("generation", "token_ids")

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
        self.metadata = metadata

    @property
    def token_weights(self) -> list[float]:
        """One weight for each of `token_ids`; 0 on the template's own tokens."""
        weights = [0.0] * len(self.token_ids)
        for turn in self._turns:
            if turn.weight:
                weights[turn.start : turn.end] = [turn.weight] * (turn.end - turn.start)
        return weights

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

    def _with_turns(self, turns: tuple[TokenTurn, ...]) -> Self:
        refuse_unknown(turns)
        return type(self)(self.token_ids, turns, self.metadata, self._uuid, self.generation)

    def _record(self) -> GenerationRecord | None:
        weighted = [turn for turn in self._turns if turn.weight > 0]
        return self.generation if weighted == [*self._turns[-1:]] else None

    def __repr__(self) -> str:
        def describe(turn: TokenTurn) -> str:
            return f"{turn.end - turn.start} tokens {self.token_ids[turn.start : turn.end]}"

        return self._shown(f"TokenizedThread {len(self.token_ids)} tokens", describe)


def refuse_unknown(turns: Sequence[TokenTurn]) -> None:
    """Raise TokenizationError for the first weighted turn whose tokens are not known."""
    for index, turn in enumerate(turns):
        if turn.weight and turn.problem:
            raise TokenizationError(f"turn {index} ({turn.role}) cannot be trained: {turn.problem}")
