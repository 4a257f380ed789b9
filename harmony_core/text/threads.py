"""Conversations as text and as tokens, with a training weight for each turn.

Threads are immutable except for their `metadata`; methods that look like a change return a new thread that shares it.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from harmony_core.errors import DataError
from harmony_core.text.display import MAX_TOOL_RESPONSE_LEN
from harmony_core.text.image_utils import string_thread_to_html_string, with_file_inlined
from harmony_core.text.turns import (
    AnyFragment,
    Conversation,
    Fragment,
    Image,
    StringTurn,
    StructuredOutput,
    TemplateKwargs,
    Text,
    TokenizedTurn,
    TokenTurn,
    ToolResponse,
    Turn,
    from_public,
    from_stored,
    refuse,
    text_of,
)

__all__ = ["StringThread", "StringTurn", "TokenizedThread", "TokenizedTurn", "Turn"]

_PENDING = "its tokens are added when a model is asked to answer it"


class StringThread(Conversation[Turn]):
    """A conversation as text.

    The constructor gives weight 1 to the last turn, of any role, and 0 to the others. `assistant()` and `system()`
    append with weight 1, `user()` and `tool()` with 0. The `with_weight_*` methods set the weight of every turn.
    """

    __slots__ = ()

    def __init__(self, turns: Sequence[tuple[str, str]] | None = None, metadata: Any = None) -> None:
        super().__init__(_last_weighted(map(_text_turn, turns or ())), metadata)

    @classmethod
    def from_turns(
        cls,
        turns: Sequence[Turn],
        metadata: Any = None,
        uuid: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Self:
        """Build from turns that carry their weights."""
        thread = cls()
        Conversation.__init__(thread, turns, metadata, uuid, template_kwargs)
        return thread

    @staticmethod
    async def from_fragments(raw_turns: Sequence[tuple[str, Sequence[Fragment]]], metadata: Any = None) -> StringThread:
        """Build from fragment dicts; the last turn gets weight 1. An image may be a file's path. Raises DataError."""
        turns = _last_weighted(fragment_turn(role, list(map(with_file_inlined, found))) for role, found in raw_turns)
        return StringThread.from_turns(turns, metadata)

    @staticmethod
    async def from_dataset(
        raw_turns: Sequence[tuple[str, str | Sequence[Fragment]]], metadata: Any = None
    ) -> StringThread:
        """Build from text or fragment lists; all weights 0. Raises DataError for any other content."""
        return StringThread.from_turns([fragment_turn(role, content) for role, content in raw_turns], metadata)

    @staticmethod
    def from_json(json_str: str) -> StringThread:
        """Inverse of `to_json`; metadata comes back as None. Raises DataError."""
        try:
            raw = json.loads(json_str)
            turns = [_stored_turn(turn, weight) for turn, weight in raw["turns"]]
            uuid = raw.get("uuid")
            kwargs = TemplateKwargs(raw.get("template_kwargs"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"not the JSON of a thread: {error}") from None
        return StringThread.from_turns(turns, None, uuid if isinstance(uuid, str) else None, kwargs)

    def to_json(self) -> str:
        """Turns, weights, uuid and template variables, if any; metadata is not included."""
        turns = [
            [
                {"role": turn.role, "content": [fragment.stored() for fragment in turn.fragments]},
                {"flavor": "PerToken", "mult": turn.weight},
            ]
            for turn in self._turns
        ]
        kwargs = {"template_kwargs": dict(self._template_kwargs)} if self._template_kwargs else {}
        return json.dumps({"turns": turns, "uuid": self._uuid} | kwargs, ensure_ascii=False)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns with fragments and weights."""
        return self._turns

    text_turns = turns

    def user(self, content: str) -> StringThread:
        """A copy with a user turn of weight 0 appended."""
        return self._append("user", Text(_checked_text(content)), 0.0)

    def system(self, content: str) -> StringThread:
        """A copy with a system turn of weight 1 appended."""
        return self._append("system", Text(_checked_text(content)), 1.0)

    def assistant(self, content: str) -> StringThread:
        """A copy with an assistant turn of weight 1 appended."""
        return self._append("assistant", Text(_checked_text(content)), 1.0)

    def tool(self, content: str, call_id: str | None = None) -> StringThread:
        """A copy with a tool's response appended, weight 0."""
        return self._append("tool", ToolResponse(call_id, _checked_text(content)), 0.0)

    def structured(self, value: Any) -> StringThread:
        """A copy with a pydantic instance, its JSON and its schema's JSON appended as an assistant turn of weight 1."""
        if not hasattr(value, "model_dump_json"):
            raise TypeError(f"structured() takes a pydantic instance, not {type(value).__name__}")
        text, schema = value.model_dump_json(), json.dumps(type(value).model_json_schema())
        return self._append("assistant", StructuredOutput(text, text, schema), 1.0)

    def last_content(self) -> str:
        """The text of the last turn. Raises DataError if the thread is empty."""
        return self._last().text

    def last_turn_fragments(self) -> list[Fragment]:
        """The fragments of the last turn. Raises DataError if the thread is empty."""
        return [fragment.public() for fragment in self._last().fragments]

    def messages(self) -> list[tuple[str, str]]:
        """All turns as (role, content), without the last one if it is the assistant's."""
        return [(turn.role, turn.content) for turn in self.get_turns()[: None if self.completion() is None else -1]]

    def completion(self) -> str | None:
        """The text of the last turn if it is the assistant's."""
        return self._turns[-1].text if self._turns and self._turns[-1].role == "assistant" else None

    def get_turns(self) -> list[StringTurn]:
        """Role and text of every turn; an image appears as `<|image|>`, a tool's response is left out."""
        return [StringTurn(turn.role, _shown_text(turn)) for turn in self._turns]

    def _append(self, role: str, fragment: AnyFragment, weight: float) -> StringThread:
        return self._with_turns((*self._turns, Turn(role, (fragment,), weight)))

    def _last(self) -> Turn:
        if not self._turns:
            raise DataError("Empty thread error")
        return self._turns[-1]

    def __repr__(self) -> str:
        return self._shown("StringThread", _described)

    def _repr_html_(self) -> str:
        return string_thread_to_html_string(self)


class TokenizedThread(Conversation[TokenTurn]):
    """A conversation as token ids with the position of each turn, made by a model.

    The tokens of an assistant turn are those that the model must emit: its content and the end-of-turn token.
    """

    __slots__ = ("_locate", "token_ids")

    def __init__(
        self,
        token_ids: list[int],
        turns: Sequence[TokenTurn],
        metadata: Any = None,
        uuid: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(turns, metadata, uuid, template_kwargs)
        self.token_ids = token_ids
        self._locate: Callable[[], Sequence[TokenTurn]] | None = None

    @classmethod
    def of(
        cls,
        thread: Conversation[Any],
        token_ids: list[int],
        turns: Sequence[TokenTurn],
        locate: Callable[[], Sequence[TokenTurn]] | None = None,
    ) -> Self:
        """The tokens of a thread, with its metadata, identifier and template variables.

        `locate` returns the turns with all positions. It is called once, when a position that `turns` lacks is needed.
        """
        made = cls(token_ids, turns, thread.metadata, thread.uuid(), thread.template_kwargs)
        made._locate = locate
        return made

    @property
    def token_weights(self) -> list[float]:
        """One weight for each of `token_ids`; 0 for the template's own tokens."""
        weights = [0.0] * len(self.token_ids)
        for turn in self._turns:
            if turn.weight:
                weights[turn.start : turn.end] = [turn.weight] * (turn.end - turn.start)
        return weights

    @property
    def logprobs(self) -> list[float] | None:
        """The raw log-prob of each weighted token, or None if one of them was not generated."""
        return self._recorded("logprobs")

    @property
    def policy_logprobs(self) -> list[float] | None:
        """Like `logprobs`, but over the tokens that a constraint allowed: what `logprobs_per_token` gives."""
        return self._recorded("policy_logprobs")

    @property
    def sampled_logprobs(self) -> list[float] | None:
        """Like `logprobs`, but under the sampling distribution."""
        return self._recorded("sampled_logprobs")

    @property
    def versions(self) -> list[int] | None:
        """The policy version of each weighted token, or None if one of them was not generated."""
        return self._recorded("versions")

    def get_turns(self) -> list[TokenizedTurn]:
        """Role and tokens of every turn, without the template's headers."""
        return [TokenizedTurn(turn.role, self.token_ids[turn.start : turn.end]) for turn in self.token_turns]

    def turns(self) -> list[TokenizedTurn]:
        """The same as `get_turns`."""
        return self.get_turns()

    @property
    def token_turns(self) -> tuple[TokenTurn, ...]:
        """The turns with positions, weights and fragments."""
        if self._locate is not None:
            self._turns, self._locate = tuple(self._locate()), None
        return self._turns

    @property
    def text_turns(self) -> tuple[Turn, ...]:
        """The turns without positions."""
        return tuple(Turn(t.role, t.fragments, t.weight, generation=t.generation) for t in self._turns)

    def ends_with_last_turn(self) -> bool:
        """Whether the last token belongs to the last turn."""
        return self._turns[-1].end == len(self.token_ids)

    def last_content(self) -> list[int] | None:
        """The tokens of the last turn, or None if the thread is empty."""
        return self.token_ids[self._turns[-1].start : self._turns[-1].end] if self._turns else None

    def len_last_turn(self) -> int:
        """The number of tokens of the last turn."""
        return self._turns[-1].end - self._turns[-1].start if self._turns else 0

    def user(self, content: str) -> TokenizedThread:
        """A copy with a user turn appended; its tokens are added when a model is asked for an answer."""
        return self._awaiting("user", Text(content))

    def assistant(self, content: Sequence[int]) -> TokenizedThread:
        """Raises DataError: tokens that no model drew have no place in the template."""
        raise DataError(
            "a model appends the assistant's tokens",
            hint="await model.generate_tokens(thread), or model.tokenize_thread of a StringThread with its text",
        )

    def tool(self, content: str, call_id: str | None = None) -> TokenizedThread:
        """A copy with the response of a tool appended, like `user`."""
        return self._awaiting("tool", ToolResponse(call_id, content))

    def _awaiting(self, role: str, fragment: Text | ToolResponse) -> TokenizedThread:
        return super()._with_turns((*self.token_turns, TokenTurn(role, (fragment,), 0.0, problem=_PENDING)))

    def _weighted(self, chosen: slice) -> Self:
        self._turns = self.token_turns  # turns that have no weight yet need their positions
        return super()._weighted(chosen)

    def _with_turns(self, turns: tuple[TokenTurn, ...]) -> Self:
        for index, turn in enumerate(turns):
            if turn.weight and turn.problem:
                refuse(index, turn)
        return super()._with_turns(turns)

    def _recorded(self, numbers: str) -> list[Any] | None:
        """Numbers of the weighted turns' records, or None if a weighted token has none."""
        lists = [(t.end - t.start, getattr(t.generation, numbers, ())) for t in self._turns if t.weight > 0]
        complete = lists and all(length == len(found) for length, found in lists)
        return [number for _, found in lists for number in found] if complete else None

    def __repr__(self) -> str:
        contents = iter([turn.content for turn in self.get_turns()])
        title = f"TokenizedThread {len(self.token_ids)} tokens"
        return self._shown(title, lambda _: f"{len(content := next(contents))} tokens {content}")


def repeat_thread(thread: StringThread) -> Iterator[StringThread]:
    """Yield copies of the thread without end, each with its own metadata."""
    while True:
        copied = copy.copy(thread)
        copied.metadata = copy.deepcopy(thread.metadata)
        yield copied


def stringify_thread(thread: StringThread, sep: str = "\n\n") -> str:
    """The thread as text: `[role]`, a line break and the content for each turn, joined by `sep`."""
    return sep.join(f"[{turn.role}]\n{turn.content}" for turn in thread.get_turns())


def override_system_prompt(dataset: Iterable[StringThread], system_prompt: str) -> list[StringThread]:
    """Replace the system turns of each thread by this one; the last turn has weight 1, as in a new thread.

    Raises DataError for a thread with fragments other than text.
    """
    made = []
    for thread in dataset:
        for turn in thread.turns:
            if other := {str(fragment.public()["type"]) for fragment in turn.fragments} - {"text"}:
                names = ", ".join(sorted(other))
                raise DataError(f"override_system_prompt takes threads of text; a {turn.role} turn has {names}")
        others = [turn for turn in thread.get_turns() if turn.role != "system"]
        new = StringThread([("system", system_prompt), *others], thread.metadata)
        made.append(new.with_template_kwargs(**thread.template_kwargs))
    return made


def fragment_turn(role: Any, content: Any) -> Turn:
    """A turn of weight 0 from text or a list of fragment dicts. Raises DataError for other content."""
    if not isinstance(role, str):
        raise DataError(f"a turn's role must be a string, not {type(role).__name__}")
    if isinstance(content, str):
        return Turn(role, (Text(content),), 0.0)
    if isinstance(content, Sequence) and not isinstance(content, bytes | bytearray):
        return Turn(role, tuple(from_public(raw) for raw in content), 0.0)
    raise DataError(f"the content of a turn must be text or a list of fragments, not {type(content).__name__}")


def _last_weighted(turns: Iterable[Turn]) -> list[Turn]:
    made = list(turns)
    return made[:-1] + [replace(turn, weight=1.0) for turn in made[-1:]]


def _text_turn(turn: Any) -> Turn:
    if not isinstance(turn, tuple):
        raise TypeError(f"a turn must be a tuple (role, content), not {type(turn).__name__}")
    if len(turn) != 2:
        raise ValueError(f"a turn must be a tuple (role, content), not one of {len(turn)} elements")
    role, content = turn
    return Turn(_checked_text(role), (Text(_checked_text(content)),), 0.0)


def _stored_turn(turn: dict[str, Any], weight: dict[str, Any]) -> Turn:
    mult = weight["mult"]
    if weight["flavor"] != "PerToken" or isinstance(mult, bool) or not isinstance(mult, int | float):
        raise ValueError(f"unknown weight {weight}")
    if not math.isfinite(mult) or mult < 0:
        raise ValueError(f"a weight must be a finite number, 0 or more, not {mult}")
    role = turn["role"]
    if not isinstance(role, str):
        raise TypeError("a role must be a string")
    return Turn(role, tuple(from_stored(raw) for raw in turn["content"]), float(mult))


def _checked_text(content: Any) -> str:
    if not isinstance(content, str):
        raise TypeError(f"role and content must be strings, not {type(content).__name__}")
    return content


def _shown_text(turn: Turn) -> str:
    return "".join("<|image|>" if isinstance(fragment, Image) else text_of((fragment,)) for fragment in turn.fragments)


def _described(turn: Turn) -> str:
    def describe(fragment: AnyFragment) -> str:
        if isinstance(fragment, ToolResponse):
            return fragment.content[:MAX_TOOL_RESPONSE_LEN] + "…" * (len(fragment.content) > MAX_TOOL_RESPONSE_LEN)
        if isinstance(fragment, Image):
            return f"<image, {len(fragment.data)} bytes>"
        return text_of((fragment,)) if isinstance(fragment, Text | StructuredOutput) else str(fragment)

    return "\n".join(map(describe, turn.fragments))
