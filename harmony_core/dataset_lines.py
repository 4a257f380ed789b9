"""One line of a dataset file as a thread: the two formats, the four kinds, and every way in which a line can be wrong.

*Internal* lines have `prompt` (turns as two-element arrays) and `metadata` with an id; *external* ones have `messages`
or `input` (objects with `role` and `content`). Reasons never repeat a line's content.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from harmony_core.dataset_kinds import Format
from harmony_core.errors import DataError, HarmonyError, did_you_mean, nearest
from harmony_core.threads import StringThread, Turn, fragment_turn

Layout = Literal["internal", "external"]
Line = dict[str, Any]

_EXTERNAL_KEYS = (
    *("messages", "input", "completion", "preferred_completion", "other_completion", "feedbacks", "metadata"),
    *("labels", "feedback_key"),
)
_INTERNAL_KEYS = ("prompt", "completion", "metrics", "good_completion", "bad_completion", "metric", "metadata")
_UNREAD_MESSAGE_FIELDS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "weight")


def parse(data: bytes) -> Line:
    """One line's object. Raises DataError with the reason alone."""
    try:
        line = msgspec.json.decode(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: byte 0x{data[error.start]:02x} at {error.start + 1}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"not JSON: {str(error).removeprefix('JSON is malformed: ')}") from None
    if not isinstance(line, dict):
        raise DataError(f"must be one JSON object, not {_kind(line)}")
    return line


def layout_of(line: Line) -> Layout:
    """Which of the two formats a line has. Raises DataError for neither."""
    if "messages" in line or "input" in line:
        return "external"
    if isinstance(line.get("prompt"), list):
        return "internal"
    raise DataError(
        "has neither 'messages' nor 'input' nor a list 'prompt'"
        + _suggestion(line, ("messages", "input", "prompt"))
        + (": a 'prompt' that is text is written as a message of the user" if "prompt" in line else "")
    )


def kind_of(line: Line, layout: Layout) -> Format:
    """What a line offers, the most specific kind first."""
    if "good_completion" in line or "preferred_completion" in line:
        return "preference"
    if layout == "internal":
        return "feedbacks" if "metrics" in line else "completions" if "completion" in line else "prompts"
    if line.get("feedbacks"):
        return "feedbacks"
    return "completions" if line.get("completion") or _ends_with_assistant(line) else "prompts"


def thread_of(line: Line, layout: Layout, kind: Format, feedback_key: str | None) -> StringThread:
    """The thread of a line, weighted as its kind says. Raises DataError.

    prompts: no weights; completions, feedbacks: the last assistant turn; preference: the prompt without weights, both
    completions as text in the metadata. A `feedback_key` puts its value into `metadata["res"]`.
    """
    read = _internal if layout == "internal" else _external
    thread = read(line, kind)
    if feedback_key is not None and kind != "preference":
        feedbacks = line.get("metrics" if layout == "internal" else "feedbacks")
        thread.metadata["res"] = _feedback(feedbacks, feedback_key)
    return thread


def _internal(line: Line, kind: Format) -> StringThread:
    metadata = line.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("id"), str):
        raise DataError("'metadata' must be an object with a string 'id'")
    created = metadata.get("created_at")
    if not isinstance(created, int) or isinstance(created, bool):
        raise DataError("'metadata.created_at' must be an integer")
    turns = [_internal_turn(turn, f"prompt[{index}]") for index, turn in enumerate(line["prompt"])]
    kept = _object(metadata.get("external_data"), "metadata.external_data")
    if kind == "preference":
        answers = [_internal_turn(_required(line, name), name).text for name in ("good_completion", "bad_completion")]
        return _preference(turns, kept, *answers)
    if kind == "prompts":
        return StringThread.from_turns(turns, kept)
    if kind == "feedbacks":
        _object(_required(line, "metrics"), "metrics")
    completion = _internal_turn(_required(line, "completion"), "completion")
    return StringThread.from_turns([*turns, completion], kept).with_weight_last_assistant_turn()


def _external(line: Line, kind: Format) -> StringThread:
    name = "input" if "input" in line else "messages"
    messages = line[name]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"'{name}' must be a list of messages that is not empty")
    turns = [_external_turn(message, f"{name}[{index}]") for index, message in enumerate(messages)]
    metadata = _object(line.get("metadata"), "metadata")
    if kind == "preference":
        answers = [_text(_required(line, key), key) for key in ("preferred_completion", "other_completion")]
        return _preference(turns, metadata, *answers)
    if kind == "prompts":
        while turns and turns[-1].role == "assistant":
            turns.pop()
        if not turns:
            raise DataError("has assistant messages only, so that no prompt is left")
        return StringThread.from_turns(turns, metadata)
    if kind == "feedbacks":
        _object(_required(line, "feedbacks"), "feedbacks")
    completion = line.get("completion")
    if completion:
        turns.append(_turn("assistant", completion, "completion"))
    elif turns[-1].role != "assistant":
        raise DataError(
            f"has no 'completion' and its last message is not the assistant's{_suggestion(line, _EXTERNAL_KEYS)}"
        )
    return StringThread.from_turns(turns, metadata).with_weight_last_assistant_turn()


def _preference(turns: list[Turn], metadata: Line, preferred: str, other: str) -> StringThread:
    if not preferred or not other:
        raise DataError("both completions must be text that is not empty")
    return StringThread.from_turns(turns, metadata | {"preferred_completion": preferred, "other_completion": other})


def _external_turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise DataError(f"'{where}' must be an object with 'role' and 'content', not {_kind(message)}")
    unread = [name for name in _UNREAD_MESSAGE_FIELDS if message.get(name) not in (None, [], "")]
    if unread:
        raise DataError(f"'{where}.{unread[0]}' is not read: write it as fragments in 'content'")
    for name in ("role", "content"):
        if message.get(name) is None:
            raise DataError(f"'{where}.{name}' is {'null' if name in message else 'missing'}")
    return _turn(message["role"], message["content"], where)


def _internal_turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, list) or len(turn) != 2:
        raise DataError(f"'{where}' must be a two-element array of role and content")
    return _turn(turn[0], turn[1], where)


def _turn(role: Any, content: Any, where: str) -> Turn:
    try:
        return fragment_turn(role, content)
    except HarmonyError as error:
        raise DataError(f"'{where}': {error.message}") from None


def _feedback(feedbacks: Any, key: str) -> float | bool:
    if not isinstance(feedbacks, Mapping) or key not in feedbacks:
        names = f": {did_you_mean(key, feedbacks)}" if isinstance(feedbacks, Mapping) and feedbacks else ""
        raise DataError(f"has no feedback '{key}'{names}")
    value = feedbacks[key]
    if not isinstance(value, int | float):
        raise DataError(f"feedback '{key}' must be a number or a boolean, not {_kind(value)}")
    return value


def _ends_with_assistant(line: Line) -> bool:
    messages = line.get("input", line.get("messages"))
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") == "assistant"


def _required(line: Line, name: str) -> Any:
    if line.get(name) is None:
        raise DataError(f"has no '{name}'{_suggestion(line, (name,))}")
    return line[name]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"'{name}' must be text, not {_kind(value)}")
    return value


def _object(value: Any, name: str) -> Line:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DataError(f"'{name}' must be an object, not {_kind(value)}")
    return value


def _suggestion(line: Line, wanted: tuple[str, ...]) -> str:
    """Names a key of the line that looks like a misspelt one of those that are wanted."""
    known = {*_EXTERNAL_KEYS, *_INTERNAL_KEYS}
    for key in line:
        meant = nearest(key, wanted, 1) if key not in known and len(key) <= 40 else []
        if meant:
            return f" ('{key}': did you mean {meant[0]}?)"
    return ""


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
