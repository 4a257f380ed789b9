"""StringThread and TokenizedThread: weights, JSON, fragments, what is shown."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
from itertools import islice
from typing import Any

import pytest
from pydantic import BaseModel

from harmony_core.algorithms.callbacks import prompt_of
from harmony_core.errors import DataError, HarmonyError, TokenizationError
from harmony_core.text.threads import (
    StringThread,
    StringTurn,
    TokenizedThread,
    override_system_prompt,
    repeat_thread,
    stringify_thread,
)
from harmony_core.text.turns import GenerationRecord, Text, TokenTurn

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(8))
PNG_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


def weights(*turns: tuple[str, str]) -> list[float]:
    return StringThread(turns).get_turn_weights()


def test_the_constructor_weighs_the_last_turn_whatever_its_role() -> None:
    assert weights(("user", "a")) == [1.0]
    assert weights(("system", "a"), ("user", "b"), ("assistant", "c")) == [0.0, 0.0, 1.0]
    assert weights(("assistant", "a"), ("user", "b")) == [0.0, 1.0]
    assert weights() == []


def test_fluent_methods_append_and_keep_earlier_weights() -> None:
    thread = StringThread([("user", "a")]).system("b").user("c").assistant("d").tool("e", "call-1")
    assert thread.get_turn_weights() == [1.0, 1.0, 0.0, 1.0, 0.0]
    assert thread.get_turns() == [("user", "a"), ("system", "b"), ("user", "c"), ("assistant", "d"), ("tool", "")]
    assert thread.last_turn_fragments() == [{"type": "tool_response", "call_id": "call-1", "content": "e"}]


def test_a_method_returns_a_new_thread_that_shares_metadata() -> None:
    metadata = {"k": 1}
    first = StringThread([("user", "a")], metadata)
    second = first.assistant("b")
    assert len(first.get_turns()) == 1 and second.metadata is metadata
    assert first != StringThread([("user", "a")], metadata)


@pytest.mark.parametrize(
    ("turns", "error"),
    [
        ([["user", "a"]], TypeError),
        ([("user", 1)], TypeError),
        ([("user", None)], TypeError),
        ([("user",)], ValueError),
        ([("user", "a", "b")], ValueError),
        ([(1, "a")], TypeError),
    ],
)
def test_turns_that_are_not_pairs_of_text(turns: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        StringThread(turns)


def test_string_turns_and_any_role_are_accepted() -> None:
    assert StringThread([StringTurn("critic", "a")]).get_turns() == [StringTurn("critic", "a")]


DIALOGUE = [("assistant", "0"), ("user", "q"), ("assistant", "1"), ("user", "q"), ("assistant", "2"), ("user", "q")]


def test_with_weight_methods_set_every_weight_anew() -> None:
    thread = StringThread(DIALOGUE)
    assert thread.with_weight_all_assistant_turns().get_turn_weights() == [1, 0, 1, 0, 1, 0]
    assert thread.with_weight_last_assistant_turn().get_turn_weights() == [0, 0, 0, 0, 1, 0]
    assert thread.with_weight_assistant_turns_from_index(1).get_turn_weights() == [0, 0, 1, 0, 1, 0]
    assert thread.with_weight_assistant_turns_from_index(3).get_turn_weights() == [0] * 6
    assert StringThread([("user", "a")]).with_weight_last_assistant_turn().get_turn_weights() == [0]
    with pytest.raises(OverflowError):
        thread.with_weight_assistant_turns_from_index(-1)


def test_messages_and_completion() -> None:
    thread = StringThread([("user", "a"), ("assistant", "b")])
    assert thread.messages() == [("user", "a")] and thread.completion() == "b" and thread.last_content() == "b"
    longer = thread.user("c")
    assert longer.messages() == [("user", "a"), ("assistant", "b"), ("user", "c")] and longer.completion() is None
    assert StringThread().messages() == [] and StringThread().completion() is None


def test_an_empty_thread_has_no_last_turn() -> None:
    for ask in (StringThread().last_content, StringThread().last_turn_fragments):
        with pytest.raises(HarmonyError, match="Empty thread error"):
            ask()


FRAGMENTS = [
    {"type": "reasoning", "text": "hm"},
    {"type": "text", "text": "see "},
    {"type": "image", "url": PNG_URL},
    {"type": "text", "text": "this"},
    {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"x": 1}'},
]


def test_fragments_survive_and_text_is_their_text() -> None:
    thread = asyncio.run(StringThread.from_fragments([("user", FRAGMENTS)], {"m": 1}))
    assert thread.get_fragments() == [("user", FRAGMENTS)]
    assert thread.last_content() == "see this"
    assert thread.get_turns() == [("user", "see <|image|>this")]
    assert thread.get_turn_weights() == [1.0] and thread.metadata == {"m": 1}


def test_from_dataset_takes_text_or_fragments_and_weighs_nothing() -> None:
    thread = asyncio.run(
        StringThread.from_dataset([("user", "a"), ("assistant", [{"type": "text", "text": "b", "parsed_json": 1}])], {})
    )
    assert thread.get_turn_weights() == [0.0, 0.0]
    assert thread.last_turn_fragments() == [{"type": "text", "text": "b"}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"type": "smell"}], "invalid fragment type: 'smell'"),
        ([{}], "invalid fragment type: None"),
        ([{"type": "text"}], "a text fragment: Object missing required field `text`"),
        (
            [{"type": "function_call", "call_id": "1", "name": "f", "arguments": {}}],
            "a function_call fragment: Expected `str`, got `object` - at `\\$.arguments`",
        ),
        ([{"type": "image", "url": "https://example.org/a.png"}], "base64 data URI"),
        ([{"type": "image", "url": "data:image/png;base64,@@@"}], "cannot be decoded"),
        ([{"type": "image", "url": "data:image/png;base64,AAAA"}], "must be PNG"),
        (["text"], "must be a dict"),
        (None, "must be text or a list of fragments, not NoneType"),
        (7, "not int"),
    ],
)
def test_content_that_is_none(content: Any, words: str) -> None:
    with pytest.raises(HarmonyError, match=words):
        asyncio.run(StringThread.from_dataset([("user", content)], None))


def test_json_form() -> None:
    thread = StringThread([("user", "é")], {"lost": True}).tool("r", "c").assistant("b")
    assert json.loads(thread.to_json()) == {
        "turns": [
            [{"role": "user", "content": [{"Text": "é"}]}, {"flavor": "PerToken", "mult": 1.0}],
            [
                {"role": "tool", "content": [{"ToolResponse": {"call_id": "c", "content": "r"}}]},
                {"flavor": "PerToken", "mult": 0.0},
            ],
            [{"role": "assistant", "content": [{"Text": "b"}]}, {"flavor": "PerToken", "mult": 1.0}],
        ],
        "uuid": None,
    }


def test_template_variables_stay_with_a_thread() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    first = StringThread([("user", "a")], {"m": 1})
    thread = first.with_template_kwargs(enable_thinking=False).with_template_kwargs(tools=tools)
    tools.clear()
    expected = {"enable_thinking": False, "tools": [{"type": "function", "function": {"name": "f"}}]}
    assert first.template_kwargs == {} and "template_kwargs" not in first.to_json()
    for copied in (
        thread.system("s").user("u").assistant("x").tool("t"),
        thread.assistant("x").with_weight_last_assistant_turn(),
        StringThread.from_json(thread.to_json()),
        next(repeat_thread(thread)),
        override_system_prompt([thread], "s")[0],
        prompt_of(thread.assistant("x")),
        copy.deepcopy(thread),
        tokenized(0.0, 1.0, 0.0, 1.0).with_template_kwargs(**expected).with_weight_last_assistant_turn(),
    ):
        assert copied.template_kwargs == expected and list(copied.template_kwargs) == ["enable_thinking", "tools"]
    thread.template_kwargs["tools"].clear()
    assert thread.template_kwargs == expected and thread.metadata is first.metadata
    assert hash(thread.template_kwargs) == hash(StringThread.from_json(thread.to_json()).template_kwargs)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"tools": {"name": "f"}}, "tools must be a list"),
        ({"tools": [len]}, "get_json_schema"),
        ({"x": {1, 2}}, "'x' must be JSON"),
        ({"x": float("nan")}, "'x' must be JSON"),
        ({"messages": []}, "made from the thread itself"),
        ({"add_generation_prompt": True}, "made from the thread itself"),
    ],
)
def test_template_variables_that_cannot_be(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        StringThread([("user", "a")]).with_template_kwargs(**given)


class Answer(BaseModel):
    value: int


def test_json_round_trip_keeps_turns_weights_and_uuid_but_not_metadata() -> None:
    thread = (
        asyncio.run(StringThread.from_fragments([("user", FRAGMENTS)], {"m": 1})).tool("r").structured(Answer(value=3))
    )
    text = thread.to_json().replace('"uuid": null', '"uuid": "0b0e"').replace('"mult": 1.0', '"mult": 0.25')
    again = StringThread.from_json(text)
    assert again.get_fragments() == thread.get_fragments()
    assert again.get_turn_weights() == [0.25, 0.0, 0.25]
    assert again.uuid() == "0b0e" and thread.uuid() is None and again.metadata is None
    assert again.to_json() == text


def test_structured_output_is_text_with_its_schema() -> None:
    thread = StringThread([("user", "a")]).structured(Answer(value=3))
    assert thread.completion() == '{"value":3}'
    fragment = thread.last_turn_fragments()[0]
    assert json.loads(fragment["parsed_json"]) == {"value": 3}
    assert json.loads(fragment["schema"])["properties"]["value"]["type"] == "integer"
    with pytest.raises(TypeError):
        thread.structured({"value": 3})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"turns": [["a"]]}',
        '{"turns": [[{"role": "user", "content": [{"Smell": "a"}]}, {"flavor": "PerToken", "mult": 1}]]}',
        '{"turns": [[{"role": 1, "content": []}, {"flavor": "PerToken", "mult": 1}]]}',
        '{"turns": [[{"role": "user", "content": [{"Text": 1}]}, {"flavor": "PerToken", "mult": 1}]]}',
        '{"turns": [[{"role": "user", "content": []}, {"flavor": "PerTurn", "mult": 1}]]}',
        '{"turns": [[{"role": "user", "content": []}, {"flavor": "PerToken", "mult": NaN}]]}',
        '{"turns": [[{"role": "user", "content": []}, {"flavor": "PerToken", "mult": -1}]]}',
        '{"turns": [[{"role": "user", "content": [{"Image": [1, 300]}]}, {"flavor": "PerToken", "mult": 1}]]}',
    ],
)
def test_json_that_is_not_a_thread(text: str) -> None:
    with pytest.raises(DataError):
        StringThread.from_json(text)


def test_repr_shows_roles_weights_and_cuts_tool_responses() -> None:
    thread = StringThread([("user", "two\nlines")], {"k": 1}).tool("x" * 600).assistant("done")
    shown = repr(thread)
    assert "* [user] two\n    lines" in shown and "  [tool] " + "x" * 500 + "…" in shown and "{'k': 1}" in shown
    assert "x" * 501 not in shown


def test_html_escapes_content() -> None:
    html = StringThread([("user", "<script>alert(1)</script>")], {"m": "<b>"})._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html and "<b>'" not in html


def tokenized(*weights: float) -> TokenizedThread:
    """user 2 tokens, assistant 3, user unknown, assistant 2 generated; headers between."""
    record = GenerationRecord((-0.5, -0.25), (-0.4, -0.2), (3, 4), "stop")
    turns = [
        TokenTurn("user", (Text("u"),), weights[0], 1, 3),
        TokenTurn("assistant", (Text("a"),), weights[1], 4, 7),
        TokenTurn("user", (Text(""),), weights[2], problem="it is rewritten"),
        TokenTurn("assistant", (Text("b"),), weights[3], 9, 11, generation=record),
    ]
    return TokenizedThread(list(range(100, 111)), turns, {"m": 1}, "id")


def test_tokenized_turns_have_no_headers() -> None:
    thread = tokenized(0, 0, 0, 1)
    assert thread.get_turns() == [
        ("user", [101, 102]),
        ("assistant", [104, 105, 106]),
        ("user", []),
        ("assistant", [109, 110]),
    ]
    assert thread.turns() == thread.get_turns()
    assert thread.last_content() == [109, 110] and thread.len_last_turn() == 2
    assert thread.uuid() == "id" and thread.metadata == {"m": 1}
    assert thread.get_fragments()[1] == ("assistant", [{"type": "text", "text": "a"}])
    assert TokenizedThread([], []).last_content() is None and TokenizedThread([], []).len_last_turn() == 0


def test_token_weights_are_the_turns_multipliers() -> None:
    thread = tokenized(0.5, 0, 0, 2.0)
    assert thread.token_weights == [0, 0.5, 0.5, 0, 0, 0, 0, 0, 0, 2.0, 2.0]
    everything = thread.with_weight_all_assistant_turns()
    assert everything.get_turn_weights() == [0, 1, 0, 1]
    assert thread.with_weight_assistant_turns_from_index(1).get_turn_weights() == [0, 0, 0, 1]
    assert thread.with_weight_last_assistant_turn().get_turn_weights() == [0, 0, 0, 1]
    with pytest.raises(OverflowError):
        thread.with_weight_assistant_turns_from_index(-1)


def test_records_are_given_only_where_they_match_the_weighted_tokens() -> None:
    thread = tokenized(0, 0, 0, 1)
    assert thread.logprobs == [-0.5, -0.25] and thread.sampled_logprobs == [-0.4, -0.2] and thread.versions == [3, 4]
    more = thread.with_weight_all_assistant_turns()
    assert more.logprobs is None and more.sampled_logprobs is None and more.versions is None
    assert more.with_weight_last_assistant_turn().logprobs == [-0.5, -0.25]


def test_a_turn_whose_tokens_are_unknown_cannot_be_weighted() -> None:
    thread = TokenizedThread([1], [TokenTurn("assistant", (Text(""),), 0.0, problem="it is rewritten")])
    with pytest.raises(TokenizationError, match=r"turn 0 \(assistant\) cannot be trained: it is rewritten"):
        thread.with_weight_all_assistant_turns()


def test_tokenized_repr() -> None:
    assert "TokenizedThread 11 tokens" in repr(tokenized(0, 0, 0, 1))
    assert "* [assistant] 2 tokens [109, 110]" in repr(tokenized(0, 0, 0, 1))


def test_repeated_threads_are_independent_copies() -> None:
    thread = StringThread(
        [("user", "q"), ("assistant", "a")], metadata={"labels": [1]}
    ).with_weight_all_assistant_turns()
    first, second = islice(repeat_thread(thread), 2)
    assert first.get_turns() == second.get_turns() == thread.get_turns()
    assert first.get_turn_weights() == thread.get_turn_weights()
    first.metadata["labels"].append(2)
    assert second.metadata == thread.metadata == {"labels": [1]}


def test_a_thread_as_text() -> None:
    thread = StringThread([("system", "s"), ("user", "q\nr")])
    assert stringify_thread(thread) == "[system]\ns\n\n[user]\nq\nr"
    assert stringify_thread(thread, sep=" | ") == "[system]\ns | [user]\nq\nr"


def test_another_system_prompt() -> None:
    threads = [
        StringThread([("system", "a"), ("user", "q"), ("system", "b")], metadata={"k": 1}),
        StringThread([("user", "r")]),
    ]
    first, second = override_system_prompt(threads, "new")
    assert first.get_turns() == [("system", "new"), ("user", "q")]
    assert first.metadata == {"k": 1}
    assert first.get_turn_weights() == [0.0, 1.0]
    assert second.get_turns() == [("system", "new"), ("user", "r")]


def test_what_would_be_lost_is_refused() -> None:
    fragments = [("assistant", [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "a"}])]
    thread = asyncio.run(StringThread.from_fragments(fragments))
    with pytest.raises(DataError, match="assistant turn has reasoning"):
        override_system_prompt([thread], "new")
