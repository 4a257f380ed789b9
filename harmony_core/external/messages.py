"""The formats of the providers' requests and replies, from and to the turns of a thread.

Tools are in OpenAI's form. Requests raise DataError for a turn that cannot be sent; replies raise LookupError,
TypeError or AttributeError for another shape.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from harmony_core.errors import DataError
from harmony_core.text.turns import AnyFragment, FunctionCall, Image, Reasoning, Text, ToolResponse, Turn, text_of

Tools = Sequence[Mapping[str, Any]]
Schema = Mapping[str, Any] | None


class Reply(NamedTuple):
    """An answer: its fragments, why it ended, and its tokens as the provider counts them."""

    fragments: tuple[AnyFragment, ...]
    finish: str
    prompt_tokens: int
    completion_tokens: int


def openai_request(turns: Iterable[Turn], tools: Tools, schema: Schema) -> dict[str, Any]:
    """The fields of a chat completion."""
    messages: list[dict[str, Any]] = []
    for role, fragments in _answered(turns):
        if role == "tool":
            answers = [part for part in fragments if isinstance(part, ToolResponse)]
            messages += [{"role": role, "tool_call_id": part.call_id, "content": part.content} for part in answers]
            continue
        message: dict[str, Any] = {"role": role, "content": text_of(fragments)}
        if any(isinstance(part, Image) for part in fragments):
            message["content"] = [
                {"type": "image_url", "image_url": {"url": part.public()["url"]}}
                if isinstance(part, Image)
                else {"type": "text", "text": text_of((part,))}
                for part in fragments
            ]
        calls = [part for part in fragments if isinstance(part, FunctionCall)]
        functions = [(call.call_id, {"name": call.name, "arguments": call.arguments}) for call in calls]
        made = [{"id": call_id, "type": "function", "function": function} for call_id, function in functions]
        messages.append(message | ({"tool_calls": made} if made else {}))
    request = {"messages": messages} | ({"tools": list(tools)} if tools else {})
    if schema is None:
        return request
    answer = {"name": "answer", "schema": schema, "strict": _is_strict(schema)}
    return request | {"response_format": {"type": "json_schema", "json_schema": answer}}


def _is_strict(schema: Any) -> bool:
    """Whether each object has exactly the fields that it requires, without which strict mode refuses a schema."""
    inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    fields = {**schema.get("properties", {})} if isinstance(schema, dict) and schema.get("type") == "object" else None
    exact = fields is None or (schema.get("additionalProperties") is False and [*fields] == schema.get("required", []))
    return exact and all(map(_is_strict, inner))


def openai_reply(reply: Mapping[str, Any]) -> Reply:
    """Read a chat completion."""
    choice, usage = reply["choices"][0], reply.get("usage") or {}
    message = choice["message"]
    reasoning, text = message.get("reasoning_content"), message.get("content") or message.get("refusal")
    calls = [(call["id"], call["function"]) for call in message.get("tool_calls") or ()]
    fragments: list[AnyFragment] = [Reasoning(reasoning)] if reasoning else []
    fragments += [Text(text or "")] if text or not calls else []
    fragments += [FunctionCall(call_id, function["name"], function["arguments"]) for call_id, function in calls]
    counts = (usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens"))
    return Reply(tuple(fragments), choice.get("finish_reason") or "", *counts)


def anthropic_request(turns: Iterable[Turn], tools: Tools, schema: Schema) -> dict[str, Any]:
    """The fields of a message."""
    answered = list(_answered(turns))
    request: dict[str, Any] = {"messages": []}
    spoken = [("assistant" if role == "assistant" else "user", parts) for role, parts in answered if role != "system"]
    for role, together in groupby(spoken, lambda message: message[0]):
        blocks = [block for _, fragments in together for block in filter(None, map(_block, fragments))]
        request["messages"].append({"role": role, "content": blocks})
    if system := "\n\n".join(text_of(fragments) for role, fragments in answered if role == "system"):
        request["system"] = system
    if tools:
        named = [dict(tool["function"]) for tool in tools]
        request["tools"] = [{"input_schema": function.pop("parameters")} | function for function in named]
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
    """Read a message."""
    fragments: list[AnyFragment] = []
    for block in reply["content"]:
        if block["type"] == "text":
            fragments.append(Text(block["text"]))
        elif block["type"] == "thinking":
            fragments.append(Reasoning(block["thinking"]))
        elif block["type"] == "tool_use":
            fragments.append(FunctionCall(block["id"], block["name"], json.dumps(block["input"])))
    counts = (reply["usage"][name] for name in ("input_tokens", "output_tokens"))
    return Reply(tuple(fragments), reply.get("stop_reason") or "", *counts)


def _answered(turns: Iterable[Turn]) -> Iterator[tuple[str, tuple[AnyFragment, ...]]]:
    """Role and fragments of each turn; a tool's answer without an id answers the oldest call that has no answer."""
    calls: list[str] = []
    for turn in turns:
        fragments = turn.fragments
        if turn.role not in ("system", "user", "assistant", "tool"):
            raise DataError(f"a turn of the role {turn.role!r} cannot be sent to a provider")
        if turn.role == "tool":
            told = [p if isinstance(p, ToolResponse) else ToolResponse(None, text_of((p,))) for p in fragments]
            if sum(part.call_id is None for part in told) > len(calls):
                raise DataError("a tool's turn answers no call", hint='thread.tool(text, "CALL_ID") names one')
            fragments = tuple(ToolResponse(part.call_id or calls.pop(0), part.content) for part in told)
            calls = [call for call in calls if call not in {part.call_id for part in told}]
        calls += [part.call_id for part in fragments if isinstance(part, FunctionCall)]
        yield turn.role, fragments
