"""Turns in the message form that chat templates read (transformers' shape), and where each turn lands in the output."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from harmony_core.chat_template import ChatTemplate
from harmony_core.errors import TokenizationError
from harmony_core.fragments import FunctionCall, Image, Reasoning, ToolResponse
from harmony_core.threads import Turn

Message = dict[str, Any]

# Two planes of private-use characters: in no vocabulary as a word, in hardly any text.
_MARKER_PLANES = (
    (0xF0000, re.compile("[\U000f0000-\U000ffffd]")),
    (0x100000, re.compile("[\U00100000-\U0010fffd]")),
)
_PLANE_SIZE = 0xFFFE


@dataclass(frozen=True)
class Place:
    """Character span of one turn in the rendered text.

    For an assistant turn `start` is where its prompt ends and `end` where its content does (its end-of-turn token
    follows); for another it is the content. `content_start` is None where unknown. `problem` says why there is none.
    """

    start: int = 0
    end: int = 0
    content_start: int | None = None
    problem: str = ""


def turn_messages(index: int, turn: Turn) -> list[Message]:
    """The messages of one turn: one, or one for each tool response. Raises TokenizationError for an image."""
    if any(isinstance(fragment, Image) for fragment in turn.fragments):
        raise TokenizationError(f"turn {index} ({turn.role}) holds an image; this model reads text only")
    responses = [fragment for fragment in turn.fragments if isinstance(fragment, ToolResponse)]
    messages: list[Message] = [
        {"role": turn.role, "content": response.content}
        | ({"tool_call_id": response.call_id} if response.call_id is not None else {})
        for response in responses
    ]
    calls = [fragment for fragment in turn.fragments if isinstance(fragment, FunctionCall)]
    reasoning = "".join(fragment.text for fragment in turn.fragments if isinstance(fragment, Reasoning))
    if turn.text or calls or reasoning or not responses:
        message: Message = {"role": turn.role, "content": turn.text}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [_tool_call(call) for call in calls]
        messages.append(message)
    return messages


def all_messages(turns: Sequence[Turn]) -> list[Message]:
    """The messages of a conversation. Raises TokenizationError."""
    if not turns:
        raise TokenizationError("a thread without turns has no tokens")
    return [message for index, turn in enumerate(turns) for message in turn_messages(index, turn)]


def locate(template: ChatTemplate, turns: Sequence[Turn], add_generation_prompt: bool) -> tuple[str, list[Place]]:
    """Render a conversation and find each turn in it. Raises TokenizationError where the template leaves a turn out."""
    rendered = template.render(all_messages(turns), add_generation_prompt)
    marks = _marked_positions(template, turns, rendered.text, add_generation_prompt)
    assistants = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    generations = rendered.generations if len(rendered.generations) == len(assistants) else ()
    generated = dict(zip(assistants, generations, strict=False))
    places = []
    for index, turn in enumerate(turns):
        mark = marks.get(index)
        if mark == (None, None) and any(str(message["content"]).strip() for message in turn_messages(index, turn)):
            problem = f"the chat template leaves out the text of turn {index} ({turn.role})"
            raise TokenizationError(f"{template.origin}: {problem}")
        if turn.role == "assistant":
            places.append(_assistant_place(template, turns[:index], rendered.text, mark, generated.get(index)))
        elif mark is None or mark[0] is None or mark[1] is None:
            places.append(Place(problem="the chat template rewrites its content"))
        else:
            places.append(Place(mark[0], mark[1], mark[0]))
    return rendered.text, places


def _assistant_place(
    template: ChatTemplate,
    before: Sequence[Turn],
    text: str,
    mark: tuple[int | None, int | None] | None,
    generation: tuple[int, int] | None,
) -> Place:
    if mark is None:
        return Place(problem="the chat template rewrites its content")
    content_start, content_end = mark
    try:
        prompt = template.render(all_messages(before) if before else [], add_generation_prompt=True).text
    except TokenizationError:
        prompt = None
    if prompt is not None and text.startswith(prompt):
        start = len(prompt)
    elif generation is not None:
        # Authors put headers into their blocks; what the prompt has in common with the conversation is no output.
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt or "", text, strict=False)))
        start = max(generation[0], shared if content_start is None else min(shared, content_start))
    elif not before and content_start is not None:
        start = content_start  # many templates have no prompt for a conversation that the assistant begins
    else:
        problem = "the chat template's prompt for it is not what the rendered conversation begins with"
        return Place(content_start=content_start, problem=problem)
    end = start if content_end is None else content_end
    if end < start:
        return Place(content_start=content_start, problem="the chat template shows its content before its prompt")
    return Place(start, end, content_start)


def _marked_positions(
    template: ChatTemplate, turns: Sequence[Turn], text: str, add_generation_prompt: bool
) -> dict[int, tuple[int | None, int | None]]:
    """Where the content of each turn begins and ends in `text`, found by marking it with private-use characters.

    A turn that is left out of the result could not be marked without changing what the template writes: templates
    look into contents (Qwen3 at `<tool_response>`), so a second try marks the assistant turns alone.
    """
    free = [(base, pattern) for base, pattern in _MARKER_PLANES if not pattern.search(text)]
    if not free or 2 * len(turns) > _PLANE_SIZE:
        return {}
    base, pattern = free[0]
    every = range(len(turns))
    for chosen in (every, [index for index in every if turns[index].role == "assistant"]):
        messages = [
            message
            for index, turn in enumerate(turns)
            for message in (
                _marked(turn_messages(index, turn), chr(base + 2 * index), chr(base + 2 * index + 1))
                if index in chosen
                else turn_messages(index, turn)
            )
        ]
        try:
            marked = template.render(messages, add_generation_prompt).text
        except TokenizationError:
            continue
        if pattern.sub("", marked) == text:
            found: dict[str, int] = {}
            for count, match in enumerate(pattern.finditer(marked)):
                found.setdefault(match.group(), match.start() - count)
            return {i: (found.get(chr(base + 2 * i)), found.get(chr(base + 2 * i + 1))) for i in chosen}
    return {}


def _marked(messages: list[Message], opening: str, closing: str) -> list[Message]:
    """The same messages, `opening` before the first and `closing` after the last character that is not blank."""
    first, last = messages[0]["content"], messages[-1]["content"]
    body = first.lstrip()
    messages[0]["content"] = first[: len(first) - len(body)] + opening + body
    last = messages[-1]["content"]
    body = last.rstrip()
    messages[-1]["content"] = body + closing + last[len(body) :]
    return messages


def _tool_call(call: FunctionCall) -> Message:
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        arguments = None
    function = {"name": call.name, "arguments": arguments if isinstance(arguments, dict) else call.arguments}
    return {"id": call.call_id, "type": "function", "function": function}
