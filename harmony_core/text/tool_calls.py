"""Tools that a model may call, and the calls in its replies, read from the formats in which chat templates write them.

Formats: `<tool_call>{...}</tool_call>` (Hermes, Qwen), `[TOOL_CALLS]` (Mistral), and a JSON object with `name` and
`parameters` alone (Llama 3). The tokens of a reply stay those that were drawn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from msgspec import structs

from harmony_core.errors import DataError
from harmony_core.text.threads import StringThread, TokenizedThread
from harmony_core.text.tokenization import ChatTokenizer
from harmony_core.text.turns import AnyFragment, FunctionCall, Text

_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_MARKS = {
    "<tool_call>": re.compile(r"<tool_call>\s*"),
    "[TOOL_CALLS]": re.compile(r"\[TOOL_CALLS\]\s*(?:(?P<name>[\w.-]+)(?:\[CALL_ID\](?P<id>\w+))?\[ARGS\]\s*)?"),
    '"parameters"': re.compile(r'\A\s*(?:<\|python_tag\|>)?\s*(?=\{\s*"name"\s*:)'),
}
"""The beginning of a call, by a text that is in templates that write such calls."""
_BETWEEN = re.compile(r"\s*(?:</tool_call>|<\|eom_id\|>|;)?\s*")


@dataclass
class Tool:
    """A tool: its name, what it does, and the JSON schema of its arguments (None: it has none)."""

    name: str
    description: str
    parameters: Mapping[str, Any] | None

    def definition(self) -> dict[str, Any]:
        """OpenAI's form, which chat templates expect."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters or _NO_PARAMETERS}
        return {"type": "function", "function": function}


def tool_calls(thread: StringThread | TokenizedThread) -> list[FunctionCall]:
    """The calls in the last turn: its function_call fragments, or those that its text contains in a known format.

    `arguments` of a call is JSON text. Raises DataError with the place of a call that cannot be read.
    """
    if not thread.text_turns:
        return []
    turn = thread.text_turns[-1]
    return [f for f in turn.fragments if isinstance(f, FunctionCall)] or _read(turn.text, _MARKS)[1]


def with_calls(tokenizer: ChatTokenizer, thread: TokenizedThread) -> TokenizedThread:
    """A drawn thread with the calls of its last turn as fragments, if the template writes the drawn tokens for them.

    Otherwise the thread itself: there is no call in the template's format, or it cannot be read.
    """
    source = tokenizer.template.choices[1].source if tokenizer.template is not None else ""
    turn = thread.token_turns[-1]
    try:
        before, calls, after = _read(turn.text, [mark for mark in _MARKS if mark in source][:1])
    except DataError:
        return thread
    if not calls or after.strip():
        return thread
    if "[TOOL_CALLS]" in source:  # Mistral's templates need ids of nine characters, which its models do not write
        place = len(thread.token_turns)
        calls = [structs.replace(c, call_id=c.call_id or f"call{place:03d}{n:02d}") for n, c in enumerate(calls)]
    text: list[AnyFragment] = [Text(before.rstrip())] if before.strip() else []
    turns = [*thread.token_turns[:-1], replace(turn, fragments=(*text, *calls))]
    made = TokenizedThread.of(thread, thread.token_ids, turns)
    return thread if tokenizer.completed(made) is made else made


def _read(text: str, marks: Sequence[str] | Mapping[str, Any]) -> tuple[str, list[FunctionCall], str]:
    """The text before the calls, the calls, and the text after them. Raises DataError."""
    found = next((match for mark in marks if (match := _MARKS[mark].search(text))), None)
    if found is None:
        return text, [], ""
    begin, mark, calls, at = found.start(), found.re, [], 0
    while found is not None:
        try:
            value, at = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError) as error:
            raise _unreadable(text, found.end(), str(error)) from None
        named = found.groupdict()
        values = [{**named, "arguments": value}] if named.get("name") else value if isinstance(value, list) else [value]
        calls += [_call(text, found.end(), one) for one in values]
        gap = _BETWEEN.match(text, at)
        at = gap.end() if gap else at
        found = mark.match(text, at)
    return text[:begin], calls, text[at:]


def _call(text: str, at: int, value: Any) -> FunctionCall:
    given = value if isinstance(value, dict) else {}
    arguments = given.get("arguments", given.get("parameters", {}))
    if not isinstance(given.get("name"), str) or not isinstance(arguments, dict):
        raise _unreadable(text, at, "it needs a 'name' and 'arguments' (or 'parameters'), an object")
    return FunctionCall(str(given.get("id") or ""), given["name"], json.dumps(arguments, ensure_ascii=False))


def _unreadable(text: str, at: int, reason: str) -> DataError:
    message = f"the tool call at character {at} of the reply cannot be read: {reason}: {text[at : at + 60]!r}"
    return DataError(message, hint="answer it with a tool turn that says so, or end the trajectory", position=at)
