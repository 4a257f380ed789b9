"""Constraints as text: what can be used, what is refused and with which words, and the replay of a completion."""

from __future__ import annotations

import json

import numpy as np
import pytest

from grammars import ALL, CHOICE, STOPS, text_of, tokenizer_json
from harmony_core.errors import DataError, UsageError
from harmony_core.grammar import Constraint, Entry, GrammarTokenizer, Kind, Matchers

VOCAB = 400


@pytest.fixture(scope="module")
def grammar() -> GrammarTokenizer:
    return GrammarTokenizer(tokenizer_json(VOCAB), VOCAB, STOPS)


@pytest.mark.parametrize("constraint", ALL, ids=lambda constraint: constraint.kind)
def test_all_kinds_compile(grammar: GrammarTokenizer, constraint: Constraint) -> None:
    assert not grammar.matcher(constraint).is_error()


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("json", "{", "Expecting property name"),
        ("json", "[]", "object schema"),
        ("json", '{"type": "strin"}', "strin"),
        ("json", '{"not": {"type": "string"}}', "not"),
        ("json", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json", '{"enum": []}', "Unsatisfiable"),
        ("json", '{"$ref": "http://example.com/x"}', "example.com"),
        ("json", "[" * 100_000, "recursion"),
        ("regex", "(a", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("choice", "[]", "at least one text"),
        ("choice", '["a", ""]', "none of them empty"),
        ("choice", '{"a": 1}', "JSON list"),
        ("choice", "yes", "Expecting value"),
        ("lark", "start: (", "Expected"),
        ("lark", 'begin: "a"', "start"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(kind: Kind, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        Constraint(kind, text).compiled()
    assert kind in caught.value.message and caught.value.hint
    assert len(caught.value.message) < 1000


def test_choices_are_literal(grammar: GrammarTokenizer) -> None:
    for text in ('a"b', "a\\b", "a|b", "/a/", "a\nb"):
        ids = [json.loads(tokenizer_json(VOCAB))["model"]["vocab"][c] for c in text.replace("\n", "\u010a")]
        found = grammar.replay(Constraint("choice", json.dumps([text, "zz"])), [*ids, STOPS[0]])
        assert len(found.index) == len(text) + 1


def test_thousands_of_choices_can_be_chosen_from(grammar: GrammarTokenizer) -> None:
    ids = json.loads(tokenizer_json(VOCAB))["model"]["vocab"]
    choices = json.dumps([f"v{number}" for number in range(5000)])
    found = grammar.replay(Constraint("choice", choices), [*(ids[c] for c in "v4321"), STOPS[0]])
    assert len(found.index) == 6


def test_a_replay_gives_the_mask_of_each_token(grammar: GrammarTokenizer) -> None:
    vocab = json.loads(tokenizer_json(VOCAB))["model"]["vocab"]
    tokens = [vocab["y"], vocab["e"], vocab["s"], STOPS[1]]
    found = grammar.replay(CHOICE, tokens)
    bits = np.unpackbits(found.masks.view(np.uint8), axis=1, bitorder="little")[found.index]
    words = {word: id for word, id in vocab.items() if "yes".startswith(word) and len(word) < 4}
    starts = {id for word, id in vocab.items() if any(text.startswith(word) for text in ("yes", "no", "perhaps"))}
    assert set(np.flatnonzero(bits[0])) == starts >= set(words.values())
    assert np.flatnonzero(bits[3]).tolist() == list(STOPS)
    for wrong in ([vocab["y"], vocab["x"]], [STOPS[0]], [*tokens, vocab["a"]]):
        with pytest.raises(DataError, match="its grammar allows"):
            grammar.replay(CHOICE, wrong)


def test_matchers_follow_rows() -> None:
    vocab = json.loads(tokenizer_json(VOCAB))["model"]["vocab"]
    matchers = Matchers(lambda: tokenizer_json(VOCAB), VOCAB)
    yes = np.array([vocab["y"], vocab["e"]], dtype=np.int32).tobytes()
    limits = matchers.limits([7, 4], {4: Entry(CHOICE, list(STOPS), yes)}, {0: [2], 1: [2, 3]})
    assert list(limits.members) == [1] and limits.suppressed == {0: [2], 1: [2, 3]}
    matchers.expect(limits.members, lambda: np.array([9, vocab["s"]]))
    after = matchers.limits([4], None, {0: list(STOPS)})
    assert after.suppressed == {}, "the end alone is allowed, so it may be drawn"
    assert text_of([vocab["s"], 2], VOCAB) == "s"
    matchers.expect(after.members, lambda: np.array([float(STOPS[0])]))
    assert matchers.limits([4], None, {}).allowed == {}, "it has ended"
    assert matchers.limits([4, 7], {}, {}).members == {}
