"""The formats of the providers' requests and replies, and their conversion from and to the turns of a thread."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from harmony_core.errors import DataError
from harmony_core.text import turns as thread
from harmony_core.text.turns import AnyFragment, FunctionCall, Image, Reasoning, Text, ToolResponse, text_of

Message = tuple[str, tuple[AnyFragment, ...]]
Turns = Iterable[thread.Turn]
Schema = Mapping[str, Any] | None


class Tool(NamedTuple):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str
    parameters: dict[str, Any]


class Reply(NamedTuple):
    """What a provider answered: the fragments of the turn, why it ended, and the tokens that it counted."""

    fragments: tuple[AnyFragment, ...]
    finish: str
    prompt_tokens: int
    completion_tokens: int


def openai_request(turns: Turns, tools: Sequence[Tool], schema: Schema) -> dict[str, Any]:
    """The fields of a chat completion. Raises DataError for a turn that cannot be sent."""
    request: dict[str, Any] = {"messages": [message for turn in _answered(turns) for message in _openai(*turn)]}
    if tools:
        request["tools"] = [{"type": "function", "function": tool._asdict()} for tool in tools]
    if schema is not None:
        answer = {"name": "answer", "schema": schema, "strict": _is_closed(schema)}
        request["response_format"] = {"type": "json_schema", "json_schema": answer}
    return request


def _openai(role: str, fragments: tuple[AnyFragment, ...]) -> Iterator[dict[str, Any]]:
    if role == "tool":
        for answer in fragments:
            if isinstance(answer, ToolResponse):
                yield {"role": "tool", "tool_call_id": answer.call_id, "content": answer.content}
        return
    message: dict[str, Any] = {"role": role, "content": text_of(fragments)}
    if any(isinstance(fragment, Image) for fragment in fragments):
        message["content"] = [
            {"type": "image_url", "image_url": {"url": fragment.public()["url"]}}
            if isinstance(fragment, Image)
            else {"type": "text", "text": text_of((fragment,))}
            for fragment in fragments
        ]
    if calls := [fragment for fragment in fragments if isinstance(fragment, FunctionCall)]:
        functions = [(call.call_id, {"name": call.name, "arguments": call.arguments}) for call in calls]
        message["tool_calls"] = [{"id": name, "type": "function", "function": call} for name, call in functions]
    yield message


def _is_closed(schema: Any) -> bool:
    """Whether all objects take exactly the properties that they require, as OpenAI's strict mode demands."""
    if isinstance(schema, list):
        return all(map(_is_closed, schema))
    if not isinstance(schema, dict):
        return True
    exact = schema.get("additionalProperties") is False and {*schema.get("properties", ())} == {
        *schema.get("required", ())
    }
    return (schema.get("type") != "object" or exact) and all(map(_is_closed, schema.values()))


def openai_reply(reply: Mapping[str, Any]) -> Reply:
    """Read a chat completion. Raises LookupError, TypeError or AttributeError for another shape."""
    choice, usage = reply["choices"][0], reply.get("usage") or {}
    message = choice["message"]
    reasoning, text = message.get("reasoning_content"), message.get("content") or message.get("refusal") or ""
    calls = [(call["id"], call["function"]) for call in message.get("tool_calls") or ()]
    fragments = (
        *((Reasoning(reasoning),) if reasoning else ()),
        *((Text(text),) if text or not calls else ()),
        *(FunctionCall(call_id, call["name"], call["arguments"]) for call_id, call in calls),
    )
    counts = (usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0)
    return Reply(fragments, choice.get("finish_reason") or "", *counts)


def anthropic_request(turns: Turns, tools: Sequence[Tool], schema: Schema) -> dict[str, Any]:
    """The fields of a message. Raises DataError for a turn that cannot be sent."""
    answered = list(_answered(turns))
    request: dict[str, Any] = {"messages": []}
    if system := "\n\n".join(text_of(fragments) for role, fragments in answered if role == "system"):
        request["system"] = system
    spoken = [("assistant" if role == "assistant" else "user", parts) for role, parts in answered if role != "system"]
    for role, together in groupby(spoken, lambda message: message[0]):
        blocks = [block for _, fragments in together for block in filter(None, map(_block, fragments))]
        request["messages"].append({"role": role, "content": blocks})
    if tools:
        named = [(tool.name, tool.description, tool.parameters) for tool in tools]
        request["tools"] = [{"name": n, "description": d, "input_schema": schema} for n, d, schema in named]
    if schema is not None:
        request["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
    return request


def _block(fragment: AnyFragment) -> dict[str, Any] | None:
    match fragment:
        case Image():
            media, _, data = fragment.public()["url"].removeprefix("data:").partition(";base64,")
            return {"type": "image", "source": {"type": "base64", "media_type": media, "data": data}}
        case FunctionCall():
            given = json.loads(fragment.arguments or "{}")
            return {"type": "tool_use", "id": fragment.call_id, "name": fragment.name, "input": given}
        case ToolResponse():
            return {"type": "tool_result", "tool_use_id": fragment.call_id, "content": fragment.content}
    return {"type": "text", "text": text} if (text := text_of((fragment,))) else None


def anthropic_reply(reply: Mapping[str, Any]) -> Reply:
    """Read a message. Raises LookupError, TypeError or AttributeError for another shape."""
    fragments: list[AnyFragment] = []
    for block in reply["content"]:
        match block["type"]:
            case "text":
                fragments.append(Text(block["text"]))
            case "thinking":
                fragments.append(Reasoning(block["thinking"]))
            case "tool_use":
                fragments.append(FunctionCall(block["id"], block["name"], json.dumps(block["input"])))
    usage = reply["usage"]
    return Reply(tuple(fragments), reply.get("stop_reason") or "", usage["input_tokens"], usage["output_tokens"])


def _answered(turns: Turns) -> Iterator[Message]:
    """Role and fragments of each turn; a tool's answer without an id answers the oldest call that has no answer."""
    calls: list[str] = []
    for turn in turns:
        fragments = turn.fragments
        if turn.role not in ("system", "user", "assistant", "tool"):
            raise DataError(f"a turn of the role {turn.role!r} cannot be sent to a provider")
        calls += [fragment.call_id for fragment in fragments if isinstance(fragment, FunctionCall)]
        if turn.role == "tool":
            found = []
            for fragment in fragments:
                given = fragment.call_id if isinstance(fragment, ToolResponse) else None
                if given is None and not calls:
                    raise DataError("a tool's turn answers no call", hint='thread.tool(text, "CALL_ID") names one')
                call_id = given or calls[0]
                calls = [call for call in calls if call != call_id]
                content = fragment.content if isinstance(fragment, ToolResponse) else text_of((fragment,))
                found.append(ToolResponse(call_id, content))
            fragments = tuple(found)
        yield turn.role, fragments
