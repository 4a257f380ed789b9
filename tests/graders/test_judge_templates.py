"""The Handlebars subset, sentences, and the schema of verdicts: without a model."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import BaseModel

from harmony_core.errors import UsageError
from harmony_core.graders import BinaryJudgeOutput, FaithfulnessGraderOutput, SimpleReasonedFloatOutput, split_sentences
from harmony_core.graders.templates import render
from harmony_core.graders.verdict_schema import verdict_schema
from harmony_core.grammar import Constraint


class Pair(NamedTuple):
    role: str
    content: str


VARIABLES: dict[str, Any] = {
    "name": "<b>Ann & Bob</b>",
    "turns": [Pair("user", "hi {{name}}"), {"role": "assistant", "content": "yes"}],
    "scores": {"a": 1, "b": 2.5},
    "metadata": {"documents": ["one", "two"], "deep": {"er": "here"}},
    "thisthing": "not this",
    "none": None,
    "no": False,
    "yes": True,
    "empty": [],
}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain } text {", "plain } text {"),
        ("{{name}} {{{name}}} {{& name}} {{ name }}", " ".join([VARIABLES["name"]] * 4)),
        ("a{{! left {out} }}b{{!-- also }} this --}}c", "abc"),
        ("{{metadata.deep.er}} {{metadata/deep/er}} {{metadata.documents.1}} {{thisthing}}", "here here two not this"),
        ("[{{absent}}{{none}}{{metadata.absent.deeper}}{{metadata.documents.7}}]", "[]"),
        ("{{yes}} {{no}} {{scores.b}} {{metadata.documents}}", 'true false 2.5 ["one", "two"]'),
        ("{{#each turns}}{{@index}}{{role}}: {{this.content}}{{#unless @last}}|{{/unless}}{{/each}}",
         "0user: hi {{name}}|1assistant: yes"),
        ("{{#each metadata.documents}}{{#if @first}}>{{/if}}{{this}}{{.}}{{/each}}", ">oneonetwotwo"),
        ("{{#each scores}}{{@key}}={{this}};{{/each}}", "a=1;b=2.5;"),
        ("{{#each empty}}x{{else}}none{{/each}}{{#each absent}}x{{/each}}", "none"),
        ("{{#if name}}1{{else}}2{{/if}}{{#if empty}}3{{else}}4{{/if}}{{#unless no}}5{{^}}6{{/unless}}", "145"),
        ("{{#with metadata}}{{deep.er}} {{../yes}}{{/with}}{{#with none}}x{{else}}y{{/with}}", "here truey"),
        ("{{#each turns}}{{#each ../metadata.documents}}{{this}}{{../role}} {{/each}}{{/each}}",
         "oneuser twouser oneassistant twoassistant "),
        ("{{name.__class__}}{{turns.append}}{{turns.0._fields}}", ""),
    ],
)  # fmt: skip
def test_what_a_template_writes(template: str, expected: str) -> None:
    assert render(template, VARIABLES) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("one\n  {{#loop turns}}", "line 2, column 3: there is no helper 'loop'"),
        ("{{upper name}}", "line 1, column 1: 'upper name' is not a path, and there is no such helper"),
        ("a {{#if name}} b", "line 1, column 3: the block {{#if}} is not closed"),
        ("{{#if name}}{{#each turns}}{{/if}}", "line 1, column 28: {{/if}} closes no open block"),
        ("x{{/each}}", "column 2: {{/each}} closes no open block"),
        ("x{{/}}", "column 2: {{/}} closes no open block"),
        ("{{else}}", "{{else}} stands in no block"),
        ("text\n{{name", "line 2, column 1: the tag is not closed"),
        ("{{}}", "'' is not a path"),
        ("{{#if}}x{{/if}}", "'' is not a path"),
        ("{{> partial}}", "'> partial' is not a path"),
    ],
)
def test_what_cannot_be_read_has_a_position(template: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        render(template, VARIABLES)
    assert reason in caught.value.message and caught.value.details["line"] >= 1


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "Dr. Smith paid 3.50 dollars. He left! Why?", ["Dr. Smith paid 3.50 dollars.", "He left!", "Why?"]),
        ("en", "It ran, e.g. at night. J. R. Smith saw it... and left.", [
            "It ran, e.g. at night.", "J. R. Smith saw it... and left."]),
        ("en", "1. First thing. Then more.\n2. Second\n\n- third", [
            "1. First thing.", "Then more.", "2. Second", "- third"]),
        ("en", 'She said "Go." Then (it was late.) He went.', ['She said "Go."', "Then (it was late.)", "He went."]),
        ("en", "No end", ["No end"]),
        ("en", " \n... !\n", []),
        ("de", "Am 3. Mai kam z.B. Anna. Sie blieb.", ["Am 3. Mai kam z.B. Anna.", "Sie blieb."]),
        ("fr", "Bonjour ! « Ça va ? » Oui.", ["Bonjour !", "« Ça va ? »", "Oui."]),
        ("es", "¿Qué hora es? ¡Son las dos! Bien.", ["¿Qué hora es?", "¡Son las dos!", "Bien."]),
        ("ru", "Это книга. Она новая, т.е. не старая.", ["Это книга.", "Она новая, т.е. не старая."]),
        ("zh", "今天下雨。我们走吧！好吗？", ["今天下雨。", "我们走吧！", "好吗？"]),
        ("ja", "「行く。」と言った。雨だ！", ["「行く。」", "と言った。", "雨だ！"]),
        ("hi", "यह किताब है। वह नई है।", ["यह किताब है।", "वह नई है।"]),
        ("ur", "یہ کتاب ہے۔ کیا وہ نئی ہے؟", ["یہ کتاب ہے۔", "کیا وہ نئی ہے؟"]),
        ("ar", "هل هذا كتاب؟ نعم.", ["هل هذا كتاب؟", "نعم."]),
        ("am", "ሰላም ነው። ደህና ነህ፧", ["ሰላም ነው።", "ደህና ነህ፧"]),
        ("hy", "Սա գիրք է։ Այո։", ["Սա գիրք է։", "Այո։"]),
        ("my", "ဒါ စာအုပ်။ ဟုတ်တယ်။", ["ဒါ စာအုပ်။", "ဟုတ်တယ်။"]),
        ("el", "Τι κάνεις; Καλά.", ["Τι κάνεις;", "Καλά."]),
        ("en", "One; two.", ["One; two."]),
    ],
)  # fmt: skip
def test_sentences(language: Any, text: str, expected: list[str]) -> None:
    assert split_sentences(text, language) == expected


BYTES = LLTokenizer("byte")


def accepts(schema: str, text: str) -> bool:
    matcher = LLMatcher(BYTES, Constraint("json", schema).compiled(), log_level=0)  # with the engine's own settings
    assert not matcher.is_error(), matcher.get_error()
    tokens = BYTES.tokenize_str(text)
    for token in tokens:
        if not matcher.consume_token(token):
            return False
    return bool(matcher.is_accepting())


def test_a_verdict_has_an_end_whatever_the_model_prefers() -> None:
    schema = verdict_schema(BinaryJudgeOutput, 2000)
    assert accepts(schema, '{"reasoning": "It does.", "score": "PASS"}')
    assert accepts(schema, json.dumps({"reasoning": "x" * 300, "score": "NA"}))
    refused = [
        json.dumps({"reasoning": "x" * 301, "score": "NA"}),
        '{"reasoning": "It does.", "score": "PASS", "more": 1}',
        '{"reasoning": "It does."  , "score": "PASS"}',
        '{\n"reasoning": "It does.", "score": "PASS"}',
        '{"score": "PASS"}',
        '{"reasoning": "It does.", "score": "pass"}',
    ]
    assert not any(accepts(schema, text) for text in refused)
    number = verdict_schema(SimpleReasonedFloatOutput, 2000)
    assert accepts(number, '{"reasoning": "", "score": -2.5}') and accepts(number, '{"reasoning": "", "score": 7}')
    assert not accepts(number, '{"reasoning": "", "score": 0.3333}') and not accepts(
        number, '{"reasoning": "", "score": 1e9}'
    )


@pytest.mark.parametrize("room", [0, 50, 120, 640])
def test_the_texts_of_a_verdict_share_the_room_there_is(room: int) -> None:
    schema = verdict_schema(BinaryJudgeOutput, room)
    longest = max(n for n in range(301) if accepts(schema, json.dumps({"reasoning": "x" * n, "score": "PASS"})))
    assert 4 * longest <= room and (room < 100 or longest >= (room - 60) // 4)


def test_lists_have_the_length_that_is_asked_for() -> None:
    schema = verdict_schema(FaithfulnessGraderOutput, 2000, 2)
    entry = '{"statement_idx": 0, "reasoning": "so", "score": "1"}'

    def written(count: int) -> str:
        return '{"all_statements_scoring": [' + ", ".join([entry] * count) + "]}"

    assert [accepts(schema, written(count)) for count in (1, 2, 3)] == [False, True, False]


class Tree(BaseModel):
    children: list[Tree]


class Many(BaseModel):
    note: str | None = None
    tags: list[str]
    count: int


def test_other_models() -> None:
    with pytest.raises(UsageError, match="Tree contains itself"):
        verdict_schema(Tree, 100)
    schema = verdict_schema(Many, 4000)
    assert accepts(schema, '{"note": null, "tags": ["a", "b"], "count": -3}')
    assert not accepts(schema, '{"tags": [], "count": 1}') and not accepts(
        schema, json.dumps({"note": "", "tags": ["a"] * 9, "count": 1})
    )
