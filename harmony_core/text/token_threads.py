"""Conversations as tokens: one row of token ids, and the place and weight of each turn in it.

Knows nothing of templates or tokenizers. A thread never changes, save for its `metadata`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Self, TypeVar

from harmony_core.errors import TokenizationError
from harmony_core.text.fragments import Text, ToolResponse
from harmony_core.text.turns import Conversation, GenerationRecord, TemplateKwargs, Turn


class TokenizedTurn(NamedTuple):
    """One turn as token ids."""

    role: str
    content: list[int]


@dataclass(frozen=True, slots=True)
class TokenTurn(Turn):
    """One turn of a `TokenizedThread`: its tokens are `token_ids[start:end]`, template headers excluded.

    `problem` says why this turn cannot be trained, `hint` what may be done; then start == end.
    """

    start: int = 0
    end: int = 0
    problem: str = ""
    hint: str = ""


NumberT = TypeVar("NumberT", int, float)
_WAYS_OUT = (
    "take a template that shows the turn whole (adaptive models add KEY SOURCE --chat-template FILE); "
    "{% generation %} tags say where an answer begins that no prompt comes before"
)
_PENDING = "its tokens are added when a model is asked to answer it"


class TokenizedThread(Conversation[TokenTurn]):
    """A conversation as one row of token ids with the turns' places in it; made by a model, not by hand.

    An assistant turn's tokens are those that the model must emit: its text and its end-of-turn token.
    """

    __slots__ = ("token_ids",)

    def __init__(
        self,
        token_ids: list[int],
        turns: Sequence[TokenTurn],
        metadata: Any = None,
        uuid: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.token_ids = token_ids
        self._turns = tuple(turns)
        self._uuid = uuid
        self._template_kwargs = TemplateKwargs(template_kwargs)
        self.metadata = metadata

    @classmethod
    def of(cls, thread: Conversation[Any], token_ids: list[int], turns: Sequence[TokenTurn]) -> Self:
        """The tokens of a thread, with its metadata, identifier and template variables."""
        return cls(token_ids, turns, thread.metadata, thread.uuid(), thread.template_kwargs)

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
        return self._recorded(lambda record: record.logprobs)

    @property
    def sampled_logprobs(self) -> list[float] | None:
        """Like `logprobs`, under the distribution that was drawn from."""
        return self._recorded(lambda record: record.sampled_logprobs)

    @property
    def versions(self) -> list[int] | None:
        """Policy version of each weighted token, where these are the generated ones; else None."""
        return self._recorded(lambda record: record.versions)

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

    def user(self, content: str) -> TokenizedThread:
        """A copy with a user turn behind these tokens; a model that is asked to answer adds its tokens."""
        return self._awaiting("user", Text(content))

    def tool(self, content: str, call_id: str | None = None) -> TokenizedThread:
        """A copy with a tool's response behind these tokens, as `user`."""
        return self._awaiting("tool", ToolResponse(call_id, content))

    def _awaiting(self, role: str, fragment: Text | ToolResponse) -> TokenizedThread:
        return super()._with_turns((*self._turns, TokenTurn(role, (fragment,), 0.0, problem=_PENDING)))

    def _with_turns(self, turns: tuple[TokenTurn, ...]) -> Self:
        for index, turn in enumerate(turns):
            if turn.weight and turn.problem:
                refuse(index, turn)
        return super()._with_turns(turns)

    def _recorded(self, numbers: Callable[[GenerationRecord], tuple[NumberT, ...]]) -> list[NumberT] | None:
        """Of the last turn, if no other has a weight."""
        record = self.generation
        weighted = [turn for turn in self._turns if turn.weight > 0]
        return list(numbers(record)) if record is not None and weighted == [*self._turns[-1:]] else None

    def __repr__(self) -> str:
        def describe(turn: TokenTurn) -> str:
            return f"{turn.end - turn.start} tokens {self.token_ids[turn.start : turn.end]}"

        return self._shown(f"TokenizedThread {len(self.token_ids)} tokens", describe)


def refuse(index: int, turn: TokenTurn, hint: str = "") -> NoReturn:
    """Raise TokenizationError for a turn that cannot be trained."""
    problem = f"turn {index} ({turn.role}) cannot be trained: {turn.problem}"
    raise TokenizationError(problem, hint=hint or turn.hint or _WAYS_OUT)
