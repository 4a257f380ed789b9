"""Find the parts of each turn in a rendered conversation by rendering it a second time with marked strings.

Every string of a turn (its reasoning, its text, the names and arguments of its calls, a tool's response) is enclosed in
characters that occur nowhere else. If the marked rendering without these characters equals the plain one, the marks
give the position of each string, and the text between two marks comes from the turn. Blank strings are not marked, and
in a text the parts between tags are marked separately, because templates test whether a content is empty, test its
beginning, and split it at `</think>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from msgspec import structs

from harmony_core.errors import TokenizationError
from harmony_core.text.chat_template import ChatTemplate
from harmony_core.text.turns import AnyFragment, FunctionCall, Image, Reasoning, Text, ToolResponse, Turn

Message = dict[str, Any]

# The names under which templates expect the reasoning; most know one of them.
THOUGHT_KEYS = ("reasoning_content", "thinking")


def turn_messages(index: int, turn: Turn) -> list[Message]:
    """The messages of one turn: one, or one for each tool response. Raises TokenizationError for an image."""
    if any(isinstance(fragment, Image) for fragment in turn.fragments):
        raise TokenizationError(f"turn {index} ({turn.role}) holds an image; this model reads text only")
    messages: list[Message] = [
        {"role": turn.role, "content": response.content}
        | {n: v for n, v in (("tool_call_id", response.call_id), ("name", response.name)) if v is not None}
        for response in turn.fragments
        if isinstance(response, ToolResponse)
    ]
    calls = [fragment for fragment in turn.fragments if isinstance(fragment, FunctionCall)]
    thoughts = [fragment.text for fragment in turn.fragments if isinstance(fragment, Reasoning)]
    if turn.text or calls or thoughts or not messages:
        message: Message = {"role": turn.role, "content": turn.text}
        if thoughts:
            message |= dict.fromkeys(THOUGHT_KEYS, "".join(thoughts))
        if calls:
            message["tool_calls"] = [_tool_call(call) for call in calls]
        messages.append(message)
    return messages


def all_messages(turns: Sequence[Turn]) -> list[Message]:
    """The messages of a conversation. Raises TokenizationError."""
    if not turns:
        raise TokenizationError("a thread without turns has no tokens")
    return [message for index, turn in enumerate(turns) for message in turn_messages(index, turn)]


def _tool_call(call: FunctionCall) -> Message:
    function = {"name": call.name, "arguments": _arguments(call)}
    return ({"id": call.call_id} if call.call_id else {}) | {"type": "function", "function": function}


def _arguments(call: FunctionCall) -> dict[str, Any] | str:
    """The arguments as an object, or as text if they are not a JSON object."""
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        return call.arguments
    return arguments if isinstance(arguments, dict) else call.arguments


# Rare letters: a template may print an object like Python, which writes other rare characters as escapes.
_MARKS = range(0x20000, 0x2A6DF)
_TAG = re.compile(r"(</?[^<>\s]{1,64}>|\[/?[A-Z_]{2,32}\])")
_THOUGHT = re.compile(r"think|thought|reason", re.IGNORECASE)
# Characters that a template may write between the name of an argument and its value.
_NEAR = 64


@dataclass
class Piece:
    """A marked string: `body` is the text between its marks and must be shown in one of `forms`.

    `whole` names its owner in errors. `gap` is the owner's text before the body, after the previous piece if the piece
    `joins` it; `rest` is the owner's text after its last piece. `scalars` are the numbers, booleans and nulls that
    follow an argument's name and cannot be marked, each in the forms in which it may be written.
    """

    whole: str
    body: str
    opening: str
    closing: str
    gap: str = ""
    rest: str = ""
    joins: bool = False
    forms: frozenset[str] = frozenset()
    thought: bool = False
    scalars: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Its name in errors."""
        if self.whole == "text":
            return f"its {'thought' if self.thought else 'text'} {_short(self.body)}"
        return f"its {self.whole}" if self.body in self.whole else f"{_short(self.body)} of its {self.whole}"


@dataclass(frozen=True)
class Shown:
    """The pieces of a turn, and their marks' positions in `text`; `known` is false if marking changes the rendering."""

    text: str
    pieces: Sequence[Piece] = ()
    marks: dict[str, list[int]] = field(default_factory=dict)
    known: bool = True

    def span(self, start: int = 0) -> tuple[int, int] | None:
        """The first and the last position of the turn from `start` on; None if no part of it is shown."""
        places = [place for piece in self.pieces if (place := self._place(piece, start))]
        if not places:
            return None
        first, end = min(place[0] for place in places), max(place[1] for place in places)
        gap, rest = self.pieces[0].gap, self.pieces[-1].rest
        first -= len(gap) if gap and self.text.endswith(gap, 0, first) else 0
        return first, end + (len(rest) if rest and self.text.startswith(rest, end) else 0)

    def left_out(self) -> bool:
        """Whether the turn has text besides its thoughts, and the template shows no part of the turn."""
        has_text = any(piece.whole == "text" and not piece.thought for piece in self.pieces)
        return has_text and not any(self._place(piece, 0) for piece in self.pieces)

    def problem(self, start: int = 0) -> str:
        """Describe the part of the turn that the template omits or rewrites from `start` on; empty if it shows all."""
        if not self.known:
            return "the chat template cuts or looks into its content, so that what it keeps cannot be told"
        end = start
        for piece in self.pieces:
            place = self._place(piece, start)
            if place is None:
                return f"the chat template leaves out {piece.label}"
            before = self.text[end if piece.joins else max(0, place[0] - len(piece.gap) - _NEAR) : place[0]]
            if not _shows(str.__eq__ if piece.joins else str.endswith, before, piece.gap):
                return f"the chat template rewrites {_short(piece.gap)} before {piece.label}"
            end = place[1]
            one_mark = piece.opening == piece.closing
            written = self.text[place[0] : place[1]]
            if not any(self.text.endswith(form, 0, end) if one_mark else written == form for form in piece.forms):
                return f"the chat template rewrites {piece.label}"
            if not _shows(str.startswith, self.text[end : end + len(piece.rest) + _NEAR], piece.rest):
                return f"the chat template rewrites {_short(piece.rest)} behind {piece.label}"
            cursor = end
            for forms in piece.scalars:
                ends = [at + len(form) for form in forms if (at := self.text.find(form, cursor, cursor + _NEAR)) >= 0]
                if not ends:
                    return f"the chat template leaves out {forms[0]} of {piece.label}"
                cursor = min(ends)
        return ""

    def _place(self, piece: Piece, start: int) -> tuple[int, int] | None:
        """Where a piece begins and ends, if both are shown from `start` on."""
        first = next((at for at in self.marks.get(piece.opening, ()) if at >= start), None)
        last = next((at for at in self.marks.get(piece.closing, ()) if first is not None and at >= first), None)
        return None if first is None or last is None else (first, last)


def shown(template: ChatTemplate, turns: Sequence[Turn], text: str, add_generation_prompt: bool) -> list[Shown]:
    """Find the pieces of each turn in `text`, the rendered conversation.

    If marking every turn changes the rendering, only assistant turns are marked, first together and then one by one.
    """
    found = [Shown(text, known=False)] * len(turns)
    assistants = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    for attempt in ([range(len(turns))], [assistants], [[index] for index in assistants]):
        results = [_attempt(template, turns, text, add_generation_prompt, chosen) for chosen in attempt]
        for chosen, result in zip(attempt, results, strict=True):
            for index in chosen if result is not None else ():
                found[index] = result[index]  # type: ignore[index]
        if all(result is not None for result in results):
            break
    return found


def _attempt(
    template: ChatTemplate, turns: Sequence[Turn], text: str, add_generation_prompt: bool, chosen: Sequence[int]
) -> dict[int, Shown] | None:
    """Find the pieces of the chosen turns; returns None if marking them changes the rendering."""
    used = set(text)
    free = (mark for mark in map(chr, _MARKS) if mark not in used)
    pieces: dict[int, list[Piece]] = {}
    marked_turns = list(turns)
    try:
        for index in chosen:
            marker = _Marker(free)
            marked_turns[index], pieces[index] = marker.turn(turns[index]), marker.pieces
        marked = template.render(all_messages(marked_turns), add_generation_prompt).text
    except (TokenizationError, StopIteration):  # StopIteration: there are more strings than marks
        return None
    known = {mark for found in pieces.values() for piece in found for mark in (piece.opening, piece.closing)}
    marks: dict[str, list[int]] = {}
    if "\\ud8" in marked:  # as `tojson(ensure_ascii=True)` writes them
        for mark in known:
            marked = marked.replace(json.dumps(mark)[1:-1], mark)
    plain, last, length = [], 0, 0
    for match in re.finditer(f"[{chr(_MARKS[0])}-{chr(_MARKS[-1])}]", marked):
        if match.group() in known:
            plain.append(marked[last : match.start()])
            length += len(plain[-1])
            marks.setdefault(match.group(), []).append(length)
            last = match.end()
    if "".join([*plain, marked[last:]]) != text:
        return None
    return {index: Shown(text, found, marks) for index, found in pieces.items()}


class _Marker:
    """Marks the strings of one turn and collects the pieces."""

    def __init__(self, free: Iterator[str]) -> None:
        self._free = free
        self.pieces: list[Piece] = []

    def turn(self, turn: Turn) -> Turn:
        """The turn with marked fragments, one for all fragments that a message concatenates."""
        thoughts = [fragment.text for fragment in turn.fragments if isinstance(fragment, Reasoning)]
        fragments: list[AnyFragment] = []
        if thoughts:
            fragments.append(Reasoning(self._text("".join(thoughts), thought=True)))
        fragments += [
            structs.replace(fragment, content=self._text(fragment.content))
            for fragment in turn.fragments
            if isinstance(fragment, ToolResponse)
        ]
        if turn.text:
            fragments.append(Text(self._text(turn.text)))
        fragments += [self._call(fragment) for fragment in turn.fragments if isinstance(fragment, FunctionCall)]
        return replace(turn, fragments=tuple(fragments))

    def _text(self, content: str, thought: bool = False) -> str:
        """The content with a pair of marks around each part between tags."""
        parts = _TAG.split(content)
        if not any(part.strip() for part in parts[::2]):
            parts = [content]
        closed = max(
            (at for at, part in enumerate(parts) if at % 2 and part[1] == "/" and _THOUGHT.search(part)), default=0
        )
        gap, made, joins = "", "", False
        for at, part in enumerate(parts):
            body = part.strip()
            if at % 2 or not body:
                gap, made = gap + part, made + part
                continue
            lead, trail = part.split(body, 1)
            gap = gap + lead if joins else (gap + lead).lstrip()
            marks, forms = (next(self._free), next(self._free)), frozenset({body})
            self.pieces.append(Piece("text", body, *marks, gap, "", joins, forms, thought or at < closed))
            made += lead + marks[0] + body + marks[1] + trail
            gap, joins = trail, True
        if joins:
            self.pieces[-1].rest = gap.rstrip()
        return made

    def _call(self, call: FunctionCall) -> FunctionCall:
        whole, arguments = f"call of {call.name!r}", _arguments(call)
        name = self._end(call.name, whole)
        if isinstance(arguments, str):
            return structs.replace(call, name=name, arguments=self._end(arguments, whole))
        return structs.replace(call, name=name, arguments=json.dumps(self._value(arguments, whole), ensure_ascii=False))

    def _value(self, value: Any, whole: str) -> Any:
        if isinstance(value, dict):
            return {self._end(key, whole): self._value(inner, whole) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._value(inner, whole) for inner in value]
        if isinstance(value, str):
            return self._end(value, whole, both=True)
        self.pieces[-1].scalars.append((json.dumps(value), str(value), str(value).lower()))
        return value

    def _end(self, value: str, whole: str, both: bool = False) -> str:
        """The string with a mark after it, or `both` marks. Names get one: templates sort and compare them."""
        body = value.strip() if both else value.rstrip()
        if not body:
            return value
        closing = next(self._free)
        opening = next(self._free) if both else closing
        forms = {body, *(json.dumps(body, ensure_ascii=ascii)[1:-1] for ascii in (True, False)), repr(body)[1:-1]}
        self.pieces.append(Piece(whole, body, opening, closing, forms=frozenset(forms)))
        return value.replace(body, (opening if both else "") + body + closing, 1)


def _shows(how: Callable[[str, str], bool], text: str, given: str) -> bool:
    """Whether a template wrote `given` in `text`; it may trim and add whitespace around the tags of a thought."""
    bare_text, bare_given = "".join(text.split()), "".join(given.split())
    return how(text, given) or bool(_THOUGHT.search(given) and how(bare_text, bare_given))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
