"""Turns of a conversation: typed fragments with a training weight, and the base class of text and token threads.

A fragment has two serialized forms: the dictionary that recipes see, and the JSON of a stored thread. Images stay
encoded. This module is independent of templates, tokenizers and models.
"""

from __future__ import annotations

import base64
import binascii
import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, NoReturn, Self, TypeVar, cast

import msgspec

from harmony_core.errors import DataError, TokenizationError
from harmony_core.grammar import Constraint

_WAYS_OUT = (
    "take a template that shows the turn whole (adaptive models add KEY SOURCE --chat-template FILE); "
    "{% generation %} tags say where an answer begins that no prompt comes before"
)
RESERVED = ("messages", "add_generation_prompt")
MAX_IMAGE_BYTES = 10 * 1024 * 1024
_IMAGE_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "png",
    b"\xff\xd8\xff": "jpeg",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"RIFF": "webp",
}

# The public form: `{"type": "text", "text": ...}`.
Fragment = dict[str, Any]


class _Fragment(msgspec.Struct, frozen=True):
    def public(self) -> Fragment:
        """The dictionary that recipes see."""
        return cast(Fragment, msgspec.to_builtins(self))

    def stored(self) -> dict[str, Any]:
        """The form in a thread's JSON; a fragment of text alone is stored as a string."""
        fields = self.public()
        del fields["type"]
        return {type(self).__name__: fields["text"] if isinstance(self, Text | Reasoning) else fields}


class Text(_Fragment, frozen=True, tag="text"):
    """Plain text."""

    text: str


class Reasoning(_Fragment, frozen=True, tag="reasoning"):
    """The reasoning of a model before its answer."""

    text: str


class FunctionCall(_Fragment, frozen=True, tag="function_call"):
    """A call of a tool; `arguments` is JSON text."""

    call_id: str
    name: str
    arguments: str


class ToolResponse(_Fragment, frozen=True, omit_defaults=True, tag="tool_response"):
    """The response of a tool to a call; `name` is the tool's name if the data has it."""

    call_id: str | None
    content: str
    name: str | None = None


class Image(_Fragment, frozen=True, tag="image"):
    """The bytes of an encoded image (PNG, JPEG, GIF or WebP)."""

    data: bytes

    def public(self) -> Fragment:
        """The dictionary that recipes see."""
        kind = next(kind for magic, kind in _IMAGE_MAGIC.items() if self.data.startswith(magic))
        return {"type": "image", "url": f"data:image/{kind};base64,{base64.b64encode(self.data).decode()}"}

    def stored(self) -> dict[str, Any]:
        """The form in a thread's JSON: the bytes as a list of numbers."""
        return {"Image": list(self.data)}


class StructuredOutput(_Fragment, frozen=True, tag="structured_output"):
    """Text that is an instance of a JSON schema."""

    raw_text: str
    parsed_json: Any = None
    schema: Any = None

    def __hash__(self) -> int:  # the other fields may hold dictionaries
        return hash(self.raw_text)


AnyFragment = Text | Reasoning | FunctionCall | ToolResponse | Image | StructuredOutput

_BY_TAG: dict[Any, type[AnyFragment]] = {str(cls.__struct_config__.tag): cls for cls in AnyFragment.__args__}
_TAGS = {cls.__name__: tag for tag, cls in _BY_TAG.items()}


def text_of(fragments: tuple[AnyFragment, ...]) -> str:
    """The concatenated text fragments; images, reasoning, calls and tool responses are not text."""
    return "".join(
        fragment.text if isinstance(fragment, Text) else fragment.raw_text
        for fragment in fragments
        if isinstance(fragment, Text | StructuredOutput)
    )


def from_public(raw: Any) -> AnyFragment:
    """Build from the public form. Raises DataError for an unknown type, a missing or ill-typed field, a bad image."""
    if not isinstance(raw, Mapping):
        raise DataError(f"a fragment must be a dict with a 'type', not {type(raw).__name__}")
    kind = raw.get("type")
    if not isinstance(kind, str) or kind not in _BY_TAG:
        raise DataError(f"invalid fragment type: {kind!r}", hint=f"there is: {', '.join(_BY_TAG)}")
    if kind == "image":
        return _image(raw.get("url"))
    given = {"call_id": None, **raw} if kind == "tool_response" else dict(raw)
    try:
        return msgspec.convert(given, _BY_TAG[kind])
    except msgspec.ValidationError as error:
        raise DataError(f"a {kind} fragment: {error}") from None


def from_stored(raw: Any) -> AnyFragment:
    """Build from the JSON form. Raises DataError."""
    if not isinstance(raw, dict) or len(raw) != 1:
        raise DataError("a stored fragment must be an object with one key")
    ((name, value),) = raw.items()
    if name == "Image":
        try:
            return _checked_image(bytes(value))
        except (TypeError, ValueError):
            raise DataError("a stored image must be a list of bytes") from None
    fields = {"text": value} if name in ("Text", "Reasoning") else value
    if name not in _TAGS or not isinstance(fields, dict):
        raise DataError(f"invalid stored fragment: {name!r}")
    return from_public({"type": _TAGS[name], **fields})


def _image(url: Any) -> Image:
    head, separator, body = url.partition(";base64,") if isinstance(url, str) else ("", "", "")
    if not head.startswith("data:image/") or not separator:
        raise DataError("an image's 'url' must be a base64 data URI", hint="data:image/png;base64,...")
    if len(body) > MAX_IMAGE_BYTES * 4 // 3 + 4:
        raise DataError(f"an image is larger than {MAX_IMAGE_BYTES} bytes")
    try:
        return _checked_image(base64.b64decode(body, validate=True))
    except binascii.Error as error:
        raise DataError(f"an image cannot be decoded: {error}") from None


def _checked_image(data: bytes) -> Image:
    if not data.startswith(tuple(_IMAGE_MAGIC)) or len(data) > MAX_IMAGE_BYTES:
        raise DataError(f"an image must be PNG, JPEG, GIF or WebP and at most {MAX_IMAGE_BYTES} bytes")
    return Image(data)


class TemplateKwargs(Mapping[str, Any]):
    """Variables for a chat template, such as `enable_thinking` or `tools`: JSON values by name.

    An immutable, hashable mapping; each access returns a fresh copy of the value.

    Raises DataError for a value that is not JSON, for `tools` that are not a list of objects, and for the names that
    the conversation itself provides.
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
        merged = TemplateKwargs(self)
        merged._texts = self._texts | TemplateKwargs(other)._texts
        return merged

    def __repr__(self) -> str:
        return repr(dict(self))


@dataclass(frozen=True, slots=True)
class GenerationRecord:
    """The engine's record of a generated turn, with one number for each sampled token.

    `finish_reason` is "stop" if the model ended the turn itself and "length" if it was cut. `model` is the name of the
    spawn. `tokens` are all tokens of the turn after its prompt; a given text that the model continued comes first and
    has no numbers. `tokenizer` is the fingerprint of the tokenizer of these tokens.
    `masked_logprobs`: those at temperature 1 over the tokens that the `constraint` allowed, one for each token that was
    sampled under one; `logprobs` ignore it. A continued turn has the last constraint of its parts.
    """

    logprobs: tuple[float, ...]
    sampled_logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    finish_reason: str
    model: str = ""
    tokens: tuple[int, ...] = ()
    tokenizer: str = ""
    masked_logprobs: tuple[float, ...] = ()
    constraint: Constraint | None = None

    @property
    def policy_logprobs(self) -> tuple[float, ...]:
        """The log-probs that training and scoring compare with: `masked_logprobs` under a constraint."""
        return self.logprobs if self.constraint is None else self.masked_logprobs

    def after(self, earlier: GenerationRecord | None) -> GenerationRecord:
        """The record of the whole turn, with the numbers of the tokens that were sampled earlier."""
        if earlier is None:
            return self
        numbers = "logprobs", "sampled_logprobs", "versions", "masked_logprobs"
        joined = {name: getattr(earlier, name) + getattr(self, name) for name in numbers}
        model = self.model if self.model == earlier.model else ""
        return replace(self, **joined, model=model, constraint=self.constraint or earlier.constraint)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: role, fragments, the weight of each of its tokens, and the record of its generation, if any."""

    role: str
    fragments: tuple[AnyFragment, ...]
    weight: float
    generation: GenerationRecord | None = field(default=None, kw_only=True)

    @property
    def text(self) -> str:
        """The concatenated text fragments."""
        return text_of(self.fragments)

    def generated_with(self, tokenizer: str) -> GenerationRecord | None:
        """The record of the generation, if it has tokens of the tokenizer with this fingerprint."""
        record = self.generation
        return record if record is not None and record.tokens and record.tokenizer == tokenizer else None


class StringTurn(NamedTuple):
    """One turn as text."""

    role: str
    content: str


class TokenizedTurn(NamedTuple):
    """One turn as token ids."""

    role: str
    content: list[int]


@dataclass(frozen=True, slots=True)
class TokenTurn(Turn):
    """One turn of a `TokenizedThread`: its tokens are `token_ids[start:end]`, without the template's header.

    `problem` is the reason why the turn cannot be trained, `hint` a way out; start == end if there is a problem.
    """

    start: int = 0
    end: int = 0
    problem: str = ""
    hint: str = ""


TurnT = TypeVar("TurnT", bound=Turn)


class Conversation(Generic[TurnT]):
    """Turns, template variables, metadata and an identifier. Only the metadata can be changed."""

    __slots__ = ("__weakref__", "_template_kwargs", "_turns", "_uuid", "metadata")

    def __init__(
        self,
        turns: Iterable[TurnT],
        metadata: Any = None,
        uuid: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._turns = tuple(turns)
        self._template_kwargs = TemplateKwargs(template_kwargs)
        self._uuid = uuid
        self.metadata = metadata

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
        """The record of the last turn, if a model generated it: `thread.generation.finish_reason`."""
        return self._turns[-1].generation if self._turns else None

    @property
    def template_kwargs(self) -> TemplateKwargs:
        """Variables for the chat template, such as `tools`; they take precedence over the model's own."""
        return self._template_kwargs

    def with_template_kwargs(self, **kwargs: Any) -> Self:
        """A copy with added template variables, such as `enable_thinking=False` or `tools=[...]`. Raises DataError."""
        copied = copy.copy(self)
        copied._template_kwargs = self._template_kwargs | kwargs
        return copied

    def with_weight_all_assistant_turns(self) -> Self:
        """A copy that trains every assistant turn. Raises TokenizationError if a turn's tokens are not known."""
        return self._weighted(slice(None))

    def with_weight_last_assistant_turn(self) -> Self:
        """A copy that trains the last assistant turn only. Raises TokenizationError if its tokens are not known."""
        return self._weighted(slice(-1, None))

    def with_weight_assistant_turns_from_index(self, start_index: int) -> Self:
        """A copy that trains assistant turns from the given one on, counted from 0. Raises TokenizationError."""
        if start_index < 0:
            raise OverflowError(f"start_index must be 0 or more, not {start_index}")
        return self._weighted(slice(start_index, None))

    def _weighted(self, chosen: slice) -> Self:
        """A copy with weight 1 for the chosen assistant turns and 0 for all other turns."""
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


def refuse(index: int, turn: TokenTurn, hint: str = "") -> NoReturn:
    """Raise TokenizationError for a turn that cannot be trained."""
    problem = f"turn {index} ({turn.role}) cannot be trained: {turn.problem}"
    raise TokenizationError(problem, hint=hint or turn.hint or _WAYS_OUT)
