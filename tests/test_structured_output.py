"""Schemas of pydantic models, their text for prompts, and instances read from completions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, RootModel

from harmony_core.errors import HarmonyError, JsonParseError, OutputParserException, UndescribedField, UsageError
from harmony_core.rpc.wire import error_of, failure_of
from harmony_core.structured_output import (
    FIX_OUTPUT_FORMAT,
    generate_and_validate,
    get_pydantic_schema,
    get_simple_pydantic_schema,
    pydantic_parse,
    remove_reasoning,
    render_pydantic_model,
    render_schema,
)
from harmony_core.text.threads import StringThread


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Place(BaseModel):
    x: int = Field(description="to the right")


class Everything(BaseModel):
    name: str = Field(description="what it is called")
    places: list[Place] = Field(description="where it is")
    best: Place | None = Field(None, description="the best place")
    kind: Literal["X", "Y"] = Field(description="one of two")
    colour: Colour = Field(description="its colour")
    sizes: Mapping[str, Annotated[float, Field(gt=0)]] = Field(description="by side")
    id: int | str = Field(description="its key")
    more: Any = Field(description="all else")


class Small(BaseModel):
    a: int
    b: list[str]


class Node(BaseModel):
    inner: list[Node] = Field(description="below it")


def test_a_schema_as_text_for_a_prompt() -> None:
    assert render_schema(Small, with_field_descriptions=False) == '{\n  "a": int,\n  "b": [str]\n}'
    text, _, described = render_schema(Everything).partition("\n\n")
    assert text.splitlines() == [
        "{",
        '  "name": str,',
        '  "places": [{',
        '    "x": int',
        "  }],",
        '  "best": Optional[{',
        '    "x": int',
        "  }],",
        '  "kind": Literal["X", "Y"],',
        '  "colour": Enum["red", "blue"],',
        '  "sizes": Dict[str, float],',
        '  "id": Union[int, str],',
        '  "more": Any',
        "}",
    ]
    lines = described.splitlines()
    assert lines[:5] == [
        "name: what it is called",
        "places: where it is",
        "places[].x: to the right",
        "best: the best place",
        "best.x: to the right",
    ]
    assert len(lines) == 10
    assert render_schema(Node) == '{\n  "inner": [Node]\n}\n\ninner: below it'
    with pytest.raises(ValueError, match="the field a of Small has no description") as caught:
        render_schema(Small)
    assert isinstance(caught.value, UndescribedField) and "with_field_descriptions=False" in caught.value.hint


def test_a_schema_as_json() -> None:
    schema = json.loads(get_pydantic_schema(Everything))
    assert schema["additionalProperties"] is False and schema["$defs"]["Place"]["additionalProperties"] is False
    assert "title" not in schema["properties"]["name"]
    assert schema["properties"]["sizes"]["additionalProperties"]["type"] == "number"
    simple = json.loads(get_simple_pydantic_schema(Small))
    assert list(simple) == ["properties", "required", "additionalProperties"]
    small = Small(a=1, b=["é"])
    assert json.loads(render_pydantic_model(small)) == {"a": 1, "b": ["é"]} and "\n" in render_pydantic_model(small)


def test_only_pydantic_models_have_schemas() -> None:
    for wrong in (dict, Small(a=1, b=[]), "Small"):
        with pytest.raises(UsageError, match="a pydantic model is needed, not"):
            get_pydantic_schema(wrong)  # type: ignore[arg-type]


GOOD = '{"a": 1, "b": ["x"]}'


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"<think>first {{}}</think>\n{GOOD}",
        f"so it is</think>{GOOD}",
        f"Here it is:\n```json\n{GOOD}\n```\nDone.",
        f"```\n{GOOD}\n```",
        f"`{GOOD}`",
        f"Well, <json>{GOOD}</json>.",
        f"Well, {GOOD} it is",
        '{"a": 1, "b": ["x',
        '{"a": 1, "b": ["x"],',
        "{'a': 1, 'b': ['x'],}",
        '```json\n{"a": 1, "b": ["x"',
        f'The form is {{"a": int}}. ```json\n{GOOD}\n```',
    ],
)
def test_instances_are_read_from_completions(text: str) -> None:
    assert pydantic_parse(text, Small) == Small(a=1, b=["x"])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is not JSON"),
        ("I cannot say", "it is not JSON"),
        (f"<think>{GOOD}", "it is not JSON"),
        ('{"a": 1}', "b: Field required"),
        ('{"a": "one", "b": []}', "a: Input should be a valid integer"),
        ("[" * 20_000, "it is not JSON"),
        ('{"a":' * 5_000, "it is not JSON"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_has_it(text: str, why: str) -> None:
    with pytest.raises(OutputParserException, match=why) as caught:
        pydantic_parse(text, Small)
    assert caught.value.llm_output == text and isinstance(caught.value, ValueError)
    again = error_of(failure_of(caught.value, 0))
    assert isinstance(again, OutputParserException) and again.llm_output == text


def test_prose_is_no_string_model() -> None:
    with pytest.raises(OutputParserException):
        pydantic_parse("prose", RootModel[str])
    assert pydantic_parse('"a word"', RootModel[str]).root == "a word"


def test_reasoning_is_removed() -> None:
    for text, rest in [
        ("a", "a"),
        ("<think>b</think>a", "a"),
        ("b</think>a", "a"),
        ("a<think>b", "a"),
        ("<think>b</think>a<think>c</think>", "a<think>c</think>"),
        ("b</think>a<think>c</think>", "a<think>c</think>"),
    ]:
        assert remove_reasoning(text) == rest


class Scripted:
    """A model of someone else: it only answers threads, here with prepared texts."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.asked: list[StringThread] = []

    async def generate(self, thread: StringThread) -> StringThread:
        self.asked.append(thread)
        return thread.assistant(self.answers.pop(0))


def ask(answers: Sequence[str], **settings: int) -> tuple[str, Small, Scripted]:
    model = Scripted(*answers)
    text, found = asyncio.run(generate_and_validate(model, StringThread([("user", "q")]), Small, **settings))
    return text, found, model


def test_a_bad_completion_is_given_back_once() -> None:
    text, found, model = ask([GOOD])
    assert (text, found, len(model.asked)) == (GOOD, Small(a=1, b=["x"]), 1)
    text, found, model = ask(["one and x {it}", GOOD])
    assert (text, found) == (GOOD, Small(a=1, b=["x"]))
    (turn,) = model.asked[1].get_turns()
    assert turn.role == "user" and "one and x {it}" in turn.content and get_pydantic_schema(Small) in turn.content
    assert all(part in FIX_OUTPUT_FORMAT for part in ("{schema}", "{completion}", "{error}"))


def test_retries_end_with_the_last_completion() -> None:
    with pytest.raises(JsonParseError, match=r"asked 2 times") as caught:
        ask(["one", "two"])
    assert caught.value.completion == "two" and isinstance(caught.value, HarmonyError)
    again = error_of(failure_of(caught.value, 0))
    assert isinstance(again, JsonParseError) and again.completion == "two"
    with pytest.raises(JsonParseError, match="asked 1 times"):
        ask(["one"], max_parsing_retries=0)


def test_a_turn_of_an_instance_holds_json_strings() -> None:
    (fragment,) = StringThread([("user", "q")]).structured(Small(a=1, b=[])).get_fragments()[-1][1]
    assert fragment["type"] == "structured_output" and fragment["raw_text"] == fragment["parsed_json"]
    assert json.loads(fragment["parsed_json"]) == {"a": 1, "b": []}
    assert json.loads(fragment["schema"])["required"] == ["a", "b"]
    thread = StringThread.from_json(StringThread().structured(Small(a=1, b=[])).to_json())
    assert thread.get_fragments()[-1][1] == [fragment]
