"""Lists of messages, in the forms in which people write them, as turns.

A message is `{"role", "content"}`, ShareGPT's `{"from", "value"}` or `[role, content]`; a list may also hold questions
with their answers (`{"input", "output"}`) or texts that take turns. Error messages never quote the contents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from harmony_core.errors import DataError, HarmonyError
from harmony_core.text.threads import Turn
from harmony_core.text.turns import AnyFragment, FunctionCall, Reasoning, Text, ToolResponse, from_public

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
"""The role for each name of a role; `function_call` is a turn of the assistant whose text is the call."""

USER_NAMES = ("prompt", "instruction", "question", "problem", "query", "user", "human", "input")
ANSWER_NAMES = ("completion", "output", "response", "solution", "answer", "assistant")
WEIGHT_NAMES = ("weight", "loss_weight", "train", "trainable", "training", "loss")
"""Fields that set whether a message or row is trained; the first two also set its weight."""

MEDIA_NAMES = ("images", "image", "videos", "video", "audios", "audio")
MEDIA = "holds an image, a video or sound, or a marker for one: models here read text only"

_PLAIN = ("system", "user", "assistant")
_REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
_MASK_NAMES = ("mask", "loss_mask", "train_detail", "training_detail")
_MEDIA_PARTS = ("image_url", "input_image", "video", "video_url", "audio", "input_audio", "audio_url", "file")
_MARKER = re.compile(r"\A\s*<(image|video|audio)>|<(image|video|audio)>\s*\Z")
_READ = {"tool_calls", "function_call", *_REASONING_NAMES, *WEIGHT_NAMES, *_MASK_NAMES, *MEDIA_NAMES}
_PART_FIELDS = {"type", "text", "call_id", "name", "arguments", "content", "url", "raw_text", "parsed_json", "schema"}
_PART_FIELDS |= {"thinking", "id", "input", "tool_use_id"}


class ParsedMessage(NamedTuple):
    """One turn of weight 0, the weight that its message sets, and the message's fields that are not read."""

    turn: Turn
    weight: float | None = None
    unread: dict[str, Any] = {}  # noqa: RUF012  never changed


def read_messages(raw: Sequence[Any], where: str, roles: Mapping[str, str]) -> list[ParsedMessage]:
    """The turns of a list of messages. `roles` maps further names of roles to roles. Raises DataError."""
    parsed: list[ParsedMessage] = []
    texts = all(isinstance(text, str) for text in raw) and bool(raw) and raw[0].lower() not in ROLES
    for index, message in enumerate(raw):
        if type(message) is dict and len(message) == 2:
            role, content = message.get("role"), message.get("content")
            if role in _PLAIN and type(content) is str and "<" not in content:  # the usual case
                parsed.append(ParsedMessage(Turn(role, (Text(content),), 0.0)))
                continue
        place = f"{where}[{index}]"
        if isinstance(message, str) and texts:
            message = {"role": ("user", "assistant")[index % 2], "content": message}
        elif isinstance(message, list | tuple) and len(message) == 2:
            message = {"role": message[0], "content": message[1]}
        if not isinstance(message, dict):
            raise DataError(f"'{place}' must be an object with 'role' and 'content', not {json_type(message)}")
        if message.get("role", message.get("from")) is None:
            asked, answer = (next((n for n in names if n in message), "") for names in (USER_NAMES, ANSWER_NAMES))
            if asked and answer:
                rest = {name: value for name, value in message.items() if name not in (asked, answer)}
                parsed += _read_message({"role": "user", "content": message[asked]}, f"{place}.{asked}", roles)
                message = {"role": "assistant", "content": message[answer], **rest}
        parsed += _read_message(message, place, roles)
    return parsed


def _read_message(message: dict[str, Any], where: str, roles: Mapping[str, str]) -> list[ParsedMessage]:
    role_name = "from" if message.get("role") is None and "from" in message else "role"
    content_name = "value" if message.get("content") is None and "value" in message else "content"
    if message.get(role_name) is None:
        raise DataError(f"'{where}.{role_name}' is {'null' if role_name in message else 'missing'}")
    role, content = role_of(message[role_name], where, roles), message.get(content_name)
    if shown := next((name for name in MEDIA_NAMES if message.get(name)), None):
        raise DataError(f"'{where}.{shown}' {MEDIA}")
    read = {role_name, content_name, *_READ}
    unread = {name: value for name, value in message.items() if name not in read and value is not None}
    thoughts = _reasoning(message, where)
    told = [(name, message[name]) for name in ("tool_calls", "function_call") if message.get(name)]
    calls = [call for name, raw in told for call in calls_in(raw, f"{where}.{name}")]
    if role == "function_call":
        role, calls, content = "assistant", [*calls, *calls_in(content, f"{where}.{content_name}")], ""
    elif content is None and not calls and not thoughts:
        raise DataError(f"'{where}.{content_name}' is {'null' if content_name in message else 'missing'}")
    if isinstance(content, list) and any(isinstance(part, dict) and part.keys() - _PART_FIELDS for part in content):
        unread["content"] = content
    parts = [] if content is None or (content == "" and (calls or thoughts)) else _fragments(content, where)
    if role == "tool" and not any(isinstance(part, ToolResponse) for part in parts):
        call_id, name = (text_of(unread.pop(n, None), f"{where}.{n}") or None for n in ("tool_call_id", "name"))
        parts = [ToolResponse(call_id, _joined(parts), name)]
    # In Anthropic's format the user's turn holds the responses of tools.
    answers = tuple(part for part in parts if isinstance(part, ToolResponse)) if role == "user" else ()
    own = (*thoughts, *(part for part in parts if part not in answers), *calls)
    tool = [ParsedMessage(Turn("tool", answers, 0.0))] if answers else []
    if tool and not own:
        return tool
    return [*tool, ParsedMessage(Turn(role, own, 0.0), weight_of(message, f"{where}."), unread)]


def role_of(name: Any, where: str, roles: Mapping[str, str]) -> str:
    """The role for a name. Raises DataError for an unknown name."""
    if not isinstance(name, str):
        raise DataError(f"'{where}': a turn's role must be a string, not {json_type(name)}")
    known = roles.get(name) or ROLES.get(name) or ROLES.get(name.lower())
    if known is None:
        shown = name if re.fullmatch(r"[\w .-]{1,40}", name) else "..."
        raise DataError(
            f"'{where}': the role '{shown}' is not known (system, user, assistant, tool, human, gpt, ...): "
            f"say what it means with roles: {{{shown}: user}}"
        )
    return known


def weight_of(fields: Mapping[str, Any], where: str = "") -> float | None:
    """The weight that a message or row sets, if it sets one. Raises DataError for a weight that cannot be applied."""
    weight = None
    for name, value in [(name, fields[name]) for name in WEIGHT_NAMES if fields.get(name) is not None]:
        scale = name in WEIGHT_NAMES[:2]
        if not isinstance(value, int | float) or not 0 <= value <= 1e6 or (not scale and value not in (0, 1)):
            raise DataError(f"'{where}{name}' must be {'a weight, 0 or more' if scale else 'true or false'}")
        weight = float(value) if weight is None else weight * value
    if masked := next((name for name in _MASK_NAMES if fields.get(name)), ""):
        raise DataError(f"'{where}{masked}' is not read: a turn is trained whole, with one 'weight'")
    return weight


def text_of(value: Any, where: str) -> str:
    """Text, "" for null. Raises DataError for other values."""
    if value is not None and not isinstance(value, str):
        raise DataError(f"'{where}' must be text, not {json_type(value)}")
    return value or ""


def from_json(text: str, otherwise: Any) -> Any:
    """The value of JSON text; `otherwise` for text that is not JSON."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return otherwise


def calls_in(raw: Any, where: str) -> list[FunctionCall]:
    """Calls of tools: an object with `name` and `arguments`, a list of them, or the JSON text of either."""
    if isinstance(raw, str) and (raw := from_json(raw, None)) is None:
        raise DataError(f'\'{where}\' must be a call as JSON: {{"name": ..., "arguments": {{...}}}}')
    return [_call(call, where) for call in (raw if isinstance(raw, list) else [raw])]


def _call(raw: Any, where: str) -> FunctionCall:
    function = raw.get("function", raw) if isinstance(raw, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if function is None or not isinstance(name, str):
        raise DataError(f"'{where}' must be calls with a 'name' and 'arguments'")
    arguments = function.get("arguments", function.get("parameters"))
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    return FunctionCall(text_of(raw.get("id"), f"{where}.id"), name, arguments)


def _reasoning(message: Mapping[str, Any], where: str) -> list[AnyFragment]:
    thoughts = {text_of(message.get(name), f"{where}.{name}") for name in _REASONING_NAMES} - {""}
    if len(thoughts) > 1:
        raise DataError(f"'{where}' has two different thoughts among {', '.join(_REASONING_NAMES)}")
    return [Reasoning(text) for text in thoughts]


def text_fragment(content: str, where: str) -> Text:
    """A text fragment. Raises DataError for text with markers for pictures."""
    if "<" in content and _MARKER.search(content):
        raise DataError(f"'{where}' {MEDIA}")
    return Text(content)


def _fragments(content: Any, where: str) -> list[AnyFragment]:
    if isinstance(content, str):
        return [text_fragment(content, where)]
    if not isinstance(content, list):
        raise DataError(
            f"'{where}': the content of a turn must be text or a list of fragments, not {json_type(content)}"
        )
    try:
        return [_fragment(part, where) for part in content]
    except HarmonyError as error:
        raise DataError(f"'{where}': {error.message}") from None


def _fragment(part: Any, where: str) -> AnyFragment:
    """A fragment from the public form, or from the equivalent part of an OpenAI or Anthropic message."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("input_text", "output_text"):
        return from_public({**part, "type": "text"})
    if kind == "thinking":
        return Reasoning(text_of(part.get("thinking"), f"{where}.thinking"))
    if kind == "tool_use":
        return _call({**part, "arguments": part.get("input")}, where)
    if kind == "tool_result":
        call_id = text_of(part.get("tool_use_id"), f"{where}.tool_use_id") or None
        return ToolResponse(call_id, _joined(_fragments(part.get("content") or "", where)))
    if kind in _MEDIA_PARTS or (kind == "image" and "url" not in part):
        raise DataError(f"a part of type '{kind}' {MEDIA}")
    return from_public(part)


def _joined(parts: Sequence[AnyFragment]) -> str:
    if not all(isinstance(part, Text) for part in parts):
        raise DataError("what a tool answers must be text")
    return "".join(part.text for part in parts if isinstance(part, Text))


def json_type(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {dict: "an object", list: "an array", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
