"""What text and token conversations have in common: turns of fragments with a training weight, template variables."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Self, TypeVar

from harmony_core.errors import DataError
from harmony_core.text.fragments import AnyFragment, Fragment, text_of

RESERVED = ("messages", "add_generation_prompt")


class TemplateKwargs(Mapping[str, Any]):
    """Variables for a chat template, such as `enable_thinking` or `tools`: JSON values by name.

    An immutable mapping, hashable by what it holds; each look gives a fresh copy of the value.

    Raises DataError for a value that is not JSON, for `tools` that are not a list of objects, and for the names that
    the conversation itself fills.
    """

    __slots__ = ("_texts",)

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        if isinstance(values, TemplateKwargs):
            self._texts: dict[str, str] = values._texts
        else:
            self._texts = {name: _checked(name, value) for name, value in (values or {}).items()}

    def __getitem__(self, name: str) -> Any:
        return json.loads(self._texts[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def __hash__(self) -> int:
        return hash(frozenset(self._texts.items()))

    def __eq__(self, other: object) -> bool:
        return self._texts == other._texts if isinstance(other, TemplateKwargs) else dict(self) == other

    def __or__(self, other: Mapping[str, Any]) -> TemplateKwargs:
        joined = TemplateKwargs()
        joined._texts = self._texts | TemplateKwargs(other)._texts
        return joined

    def __repr__(self) -> str:
        return repr(dict(self))


@dataclass(frozen=True, slots=True)
class GenerationRecord:
    """What the engine recorded of a turn that a model generated; one number for each token that was drawn.

    `finish_reason`: "stop" where the model ended the turn itself, "length" where it was cut. `model` is the name of the
    spawn. `tokens` are all of the turn behind its prompt; a text that the model only continued comes first and has no
    numbers. `tokenizer` says whose tokens they are.
    """

    logprobs: tuple[float, ...]
    sampled_logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    finish_reason: str
    model: str = ""
    tokens: tuple[int, ...] = ()
    tokenizer: str = ""

    def after(self, earlier: GenerationRecord | None) -> GenerationRecord:
        """This record of the whole turn, with the numbers of its tokens that were drawn earlier."""
        if earlier is None:
            return self
        return replace(
            self,
            logprobs=earlier.logprobs + self.logprobs,
            sampled_logprobs=earlier.sampled_logprobs + self.sampled_logprobs,
            versions=earlier.versions + self.versions,
            model=self.model if self.model == earlier.model else "",
        )


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: role, fragments, the weight of each of its tokens, and what was recorded when a model generated it."""

    role: str
    fragments: tuple[AnyFragment, ...]
    weight: float
    generation: GenerationRecord | None = field(default=None, kw_only=True)

    @property
    def text(self) -> str:
        """Text fragments joined."""
        return text_of(self.fragments)

    def drawn_with(self, tokenizer: str) -> GenerationRecord | None:
        """The record, if it has tokens and they are this tokenizer's."""
        record = self.generation
        return record if record is not None and record.tokens and record.tokenizer == tokenizer else None


TurnT = TypeVar("TurnT", bound=Turn)


class Conversation(Generic[TurnT]):
    """Turns, template variables, metadata and an identifier; it never changes, save for its `metadata`."""

    __slots__ = ("__weakref__", "_template_kwargs", "_turns", "_uuid", "metadata")

    _turns: tuple[TurnT, ...]
    _template_kwargs: TemplateKwargs
    _uuid: str | None
    metadata: Any

    def get_fragments(self) -> list[tuple[str, list[Fragment]]]:
        """Role and fragments of every turn."""
        return [(turn.role, [fragment.public() for fragment in turn.fragments]) for turn in self._turns]

    def get_turn_weights(self) -> list[float]:
        """The weight of every turn."""
        return [turn.weight for turn in self._turns]

    def uuid(self) -> str | None:
        """The identifier it was stored with, if any."""
        return self._uuid

    @property
    def generation(self) -> GenerationRecord | None:
        """What was recorded of the last turn, if a model generated it: `thread.generation.finish_reason`."""
        return self._turns[-1].generation if self._turns else None

    @property
    def template_kwargs(self) -> TemplateKwargs:
        """What this thread gives its chat template, `tools` among them; it wins over the model's own."""
        return self._template_kwargs

    def with_template_kwargs(self, **kwargs: Any) -> Self:
        """A copy with these template variables too, `enable_thinking=False` or `tools=[...]`. Raises DataError."""
        copied = copy.copy(self)
        copied._template_kwargs = self._template_kwargs | kwargs
        return copied

    def with_weight_all_assistant_turns(self) -> Self:
        """A copy that trains every assistant turn. Raises TokenizationError if one's tokens are not known."""
        return self._weighted(slice(None))

    def with_weight_last_assistant_turn(self) -> Self:
        """A copy that trains the last assistant turn. Raises TokenizationError if its tokens are not known."""
        return self._weighted(slice(-1, None))

    def with_weight_assistant_turns_from_index(self, start_index: int) -> Self:
        """A copy that trains assistant turns from the given one on, counted from 0. Raises TokenizationError."""
        if start_index < 0:
            raise OverflowError(f"start_index must be 0 or more, not {start_index}")
        return self._weighted(slice(start_index, None))

    def _weighted(self, chosen: slice) -> Self:
        """Weight 1 for those assistant turns, 0 for all others."""
        weighted = [index for index, turn in enumerate(self._turns) if turn.role == "assistant"][chosen]
        turns = (replace(turn, weight=float(index in weighted)) for index, turn in enumerate(self._turns))
        return self._with_turns(tuple(turns))

    def _with_turns(self, turns: tuple[TurnT, ...]) -> Self:
        copied = copy.copy(self)
        copied._turns = turns
        return copied

    def _shown(self, title: str, describe: Callable[[TurnT], str]) -> str:
        """The thread's repr."""
        lines = [f"{title} ({len(self._turns)} turns, * trained)"]
        for turn in self._turns:
            scale = "" if turn.weight in (0.0, 1.0) else f" ×{turn.weight:g}"
            line = f"{'*' if turn.weight else ' '} [{turn.role}{scale}] {describe(turn)}"
            lines.append(line.replace("\n", "\n    "))
        if self.metadata is not None:
            lines.append(f"  metadata: {self.metadata!r}")
        return "\n".join(lines)


def _checked(name: str, value: Any) -> str:
    """The value as JSON text. Raises DataError."""
    if name in RESERVED:
        raise DataError(f"the template variable {name!r} is made from the thread itself and cannot be given")
    listed = isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value)
    if name == "tools" and value is not None and not listed:
        raise DataError(
            f"tools must be a list of JSON objects, not {str(value)[:200]}",
            hint="transformers.utils.get_json_schema(function) describes a function as one",
        )
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"the template variable {name!r} must be JSON: {error}") from None
