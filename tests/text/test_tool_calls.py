"""Tools in prompts, and the calls in replies."""

from __future__ import annotations

import json
from typing import Any

import pytest

from harmony_core.errors import DataError
from harmony_core.registry import builtin
from harmony_core.text.threads import StringThread, TokenizedThread
from harmony_core.text.tokenization import ChatTokenizer
from harmony_core.text.tool_calls import Tool, tool_calls, with_calls
from harmony_core.text.turns import FunctionCall, Text

HEAD = (
    "{%- if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
)
TAIL = "<|im_end|>\n{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALLS = {
    "hermes": "{%- for c in m.tool_calls %}{%- if m.content or not loop.first %}\n{% endif %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}',
    "llama": '{%- for c in m.tool_calls %}{"name": "{{ c.function.name }}", '
    '"parameters": {{ c.function.arguments | tojson }}}{% endfor %}',
    "mistral": "{%- if m.tool_calls %}[TOOL_CALLS] [{%- for c in m.tool_calls %}"
    "{%- if c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}{{ "" if loop.last else ", " }}'
    "{%- endfor %}]{% endif %}",
    "none": "",
}
WEATHER = Tool("weather", "Of a city.", {"type": "object", "properties": {"city": {"type": "string"}}})
ONE = [FunctionCall("", "weather", '{"city": "Rome"}')]
TWO = [*ONE, FunctionCall("", "time", '{"zone": 3}')]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTokenizer]:
    found = {}
    for name, calls in CALLS.items():
        folder = tmp_path_factory.mktemp(name)
        builtin._write_model(folder)
        (folder / "chat_template.jinja").write_text(HEAD + calls + TAIL, encoding="utf-8")
        found[name] = ChatTokenizer.load(folder)
    return found


def reply(tokenizer: ChatTokenizer, text: str, finished: bool = True) -> TokenizedThread:
    """A thread that ends with this text, as drawn tokens."""
    thread = StringThread([("user", "Weather?")]).with_template_kwargs(tools=[WEATHER.definition()])
    ids = tokenizer.encode(text + "<|im_end|>" * finished)
    return tokenizer.with_completion(
        thread, tokenizer.prompt_ids(thread), ids, finished=finished, logprobs=[0.0] * len(ids)
    )


@pytest.mark.parametrize(
    ("name", "text", "before", "calls"),
    [
        ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>', "", ONE),
        ("hermes", 'I look.\n<tool_call>{"arguments":{"city":"Rome"},"name":"weather"}</tool_call>', "I look.", ONE),
        (
            "hermes",
            '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>\n'
            '<tool_call>{"name": "time", "arguments": {"zone": 3}}</tool_call>',
            "",
            TWO,
        ),
        ("llama", '{"name": "weather", "parameters": {"city": "Rome"}}', "", ONE),
        ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city":"Rome"}}]', "", ONE),
        (
            "mistral",
            '[TOOL_CALLS][{"name": "weather", "arguments": {"city":"Rome"}},{"name":"time","arguments":{"zone":3}}]',
            "",
            TWO,
        ),
        ("mistral", '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}[TOOL_CALLS]time[ARGS]{"zone": 3}', "", TWO),
    ],
)
def test_a_call_becomes_fragments_and_keeps_the_drawn_tokens(
    tokenizers: dict[str, ChatTokenizer], name: str, text: str, before: str, calls: list[FunctionCall]
) -> None:
    tokenizer = tokenizers[name]
    drawn = reply(tokenizer, text)
    made = with_calls(tokenizer, drawn)
    assert tool_calls(drawn) == calls
    if name == "mistral":
        calls = [FunctionCall(f"call002{n:02d}", call.name, call.arguments) for n, call in enumerate(calls)]
    assert made.token_turns[-1].fragments == (*([Text(before)] if before else []), *calls)
    assert made.token_ids == drawn.token_ids and made.logprobs == drawn.logprobs
    assert tool_calls(made) == tool_calls(tokenizer.detokenize(made)) == calls
    following = tokenizer.prompt_ids(made.tool("sunny"))
    assert following[: len(drawn.token_ids)] == drawn.token_ids, "the next prompt continues them"
    as_text = tokenizer.prompt_ids(tokenizer.detokenize(made).tool("sunny"))
    assert as_text == following


@pytest.mark.parametrize(
    ("name", "text", "position"),
    [
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": }}</tool_call>', 11),
        ("hermes", "so: <tool_call>\nweather(Rome)</tool_call>", 16),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', 11),
        ("hermes", '<tool_call>{"name": "weather", "arguments": "Rome"}</tool_call>', 11),
        ("llama", '{"name": "weather", "parameters": {"city": "Ro', 0),
        ("mistral", "[TOOL_CALLS] [weather]", 13),
        ("mistral", "[TOOL_CALLS] [1]", 13),
    ],
)
def test_a_call_that_cannot_be_read_stays_text_and_says_where(
    tokenizers: dict[str, ChatTokenizer], name: str, text: str, position: int
) -> None:
    drawn = reply(tokenizers[name], text)
    assert with_calls(tokenizers[name], drawn) is drawn
    with pytest.raises(DataError, match=f"at character {position} of the reply") as error:
        tool_calls(drawn)
    assert error.value.details["position"] == position and error.value.hint


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        ("hermes", "It is sunny.", 0),
        ("hermes", '{"name": "weather", "parameters": {}}', 1),
        ("llama", '{"city": "Rome"}', 0),
        ("llama", 'I say {"name": "weather", "parameters": {}}', 0),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {}}</tool_call> or not', 1),
        ("none", '<tool_call>{"name": "weather", "arguments": {}}</tool_call>', 1),
    ],
)
def test_what_is_no_call_of_the_template_stays_text(
    tokenizers: dict[str, ChatTokenizer], name: str, text: str, count: int
) -> None:
    drawn = reply(tokenizers[name], text)
    assert with_calls(tokenizers[name], drawn) is drawn
    assert len(tool_calls(drawn)) == count


def test_a_thread_without_turns_has_no_calls() -> None:
    assert tool_calls(StringThread([])) == []


def test_the_prompt_shows_the_definitions(tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer = tokenizers["hermes"]
    prompt = tokenizer.decode(tokenizer.prompt_ids(reply(tokenizer, "x").user("y")))
    assert json.dumps([WEATHER.definition()]) in prompt
    bare: dict[str, Any] = Tool("now", "The time.", None).definition()
    assert bare["function"]["parameters"] == {"type": "object", "properties": {}}
