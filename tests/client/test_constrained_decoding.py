"""`constrained_decoding` on handles: the four formats on real ranks, what is refused, and what is recorded."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import small_models
from engines import LiveEngine
from harmony_core.client import InferenceModel
from harmony_core.errors import EngineError, ModelRefused, UsageError
from harmony_core.grammar import Constraint
from harmony_core.text.threads import StringThread

TINY = "builtin:tiny-lm"
QUESTION = StringThread([("user", "say")])
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMATS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "json": (json.dumps(PERSON), lambda text: json.loads(text)["age"] < 100),
    "regex": (r"[a-c]{2,4}-\d{2}", lambda text: re.fullmatch(r"[a-c]{2,4}-\d{2}", text) is not None),
    "choice": ('["left", "right"]', lambda text: text in ("left", "right")),
    "lark": ('start: "go " DIRECTION\nDIRECTION: "up" | "down"', lambda text: text in ("go up", "go down")),
}


async def spawn(engine: LiveEngine, tp: int = 1, tokens: int = 256) -> InferenceModel:
    return await engine.client.model(TINY, tokens_to_generate=tokens).tp(tp).spawn_inference("constrained")


@pytest.mark.parametrize("tp", [1, 2])
def test_all_formats(one_rank: LiveEngine, two_ranks: LiveEngine, tp: int) -> None:
    engine = one_rank if tp == 1 else two_ranks

    async def go() -> None:
        model = await spawn(engine, tp)
        for format, (text, good) in FORMATS.items():
            other = model.constrained_decoding(text, format)
            threads = await asyncio.gather(*(other.generate_tokens(QUESTION) for _ in range(4)))
            for thread in threads:
                record, turn = thread.generation, thread.token_turns[-1]
                assert record is not None and record.finish_reason == "stop"
                assert good(turn.text), turn.text
                assert record.constraint == Constraint(format, text)  # type: ignore[arg-type]
                assert len(record.masked_logprobs) == len(record.logprobs)
                assert record.masked_logprobs == pytest.approx(record.sampled_logprobs, abs=1e-5)
                pairs = zip(record.masked_logprobs, record.logprobs, strict=True)
                assert all(masked >= raw - 1e-5 for masked, raw in pairs)
                assert await model.logprobs_per_token(thread) == pytest.approx(record.masked_logprobs, abs=1e-4)
                raw = (await model.raw_logprobs(thread.token_ids))[turn.start : turn.end]
                assert raw == pytest.approx(record.logprobs, abs=1e-4)
        free = await model.max_gen_len(8).generate_tokens(QUESTION)
        assert free.generation is not None
        assert free.generation.constraint is None and free.generation.masked_logprobs == ()
        await model.dealloc()

    engine.run(go())


def test_a_handle_is_copied_and_continued_turns_are_constrained_alone(one_rank: LiveEngine) -> None:
    async def go() -> None:
        model = await spawn(one_rank)
        choosing = model.constrained_decoding('["left", "right"]', "choice")
        assert choosing is not model and model._settings.constraint is None
        begun = StringThread([("user", "say"), ("assistant", "go ")])
        answer = await choosing.generate(begun, continue_final=True)
        assert answer.last_content() in ("go left", "go right")
        assert (await choosing.raw_string_create("go ")) in ("left", "right")
        cut = await model.constrained_decoding("a{9}", "regex").max_gen_len(4).generate_tokens(QUESTION)
        assert cut.generation is not None and cut.generation.finish_reason == "length"
        again = await model.constrained_decoding("b{3}", "regex").generate_tokens(cut, continue_final=True)
        assert again.generation is not None and again.token_turns[-1].text == "aaaabbb"
        assert len(again.generation.masked_logprobs) == len(again.generation.logprobs) == 8
        assert again.generation.constraint == Constraint("regex", "b{3}")
        await model.dealloc()

    one_rank.run(go())


def test_what_cannot_be_done_is_said_at_once(one_rank: LiveEngine) -> None:
    async def go() -> None:
        model = await spawn(one_rank)
        for text, format, words in (
            ('{"not": {}}', "json", "not"),
            ("{", "json", "json constraint"),
            ("(a", "regex", "unclosed"),
            ("[]", "choice", "at least one"),
            ("{}", "jsn", "no format 'jsn'"),
        ):
            with pytest.raises(UsageError, match=words) as caught:
                model.constrained_decoding(text, format)
            assert caught.value.hint
        # The built-in tokenizer has no such character.
        with pytest.raises(EngineError, match="constraint allows no token"):
            await model.constrained_decoding('["\u4e2d"]', "choice").generate(QUESTION)
        await model.dealloc()

    one_rank.run(go())


def test_a_model_without_a_tokenizer_refuses(one_rank: LiveEngine, tmp_path: Any) -> None:
    async def go() -> None:
        one_rank.registry.add(
            "bare-for-grammars", str(small_models.write_model(tmp_path / "bare", with_tokenizer=False))
        )
        model = await one_rank.client.model("bare-for-grammars").spawn_inference("bare")
        with pytest.raises(ModelRefused, match="no tokenizer"):
            model.constrained_decoding("{}")
        await model.dealloc()

    one_rank.run(go())


def schema(random: Random, depth: int = 0) -> dict[str, Any]:
    """A random JSON schema whose instances have an end."""
    kinds = ["string", "integer", "boolean", "enum", "number", "null", "const"]
    kinds += ["object", "object", "array", "anyOf"] if depth < 3 else []
    kind = "object" if depth == 0 else random.choice(kinds)
    if kind == "object":
        names = random.sample(["id", "name", "tags", "x", "kind", "note", "a b", "ok"], random.randint(1, 4))
        required = [name for name in names if random.random() < 0.7]
        return {
            "type": "object",
            "properties": {name: schema(random, depth + 1) for name in names},
            "required": required,
            "additionalProperties": False,
        }
    if kind == "array":
        low = random.randint(0, 1)
        return {
            "type": "array",
            "items": schema(random, depth + 2),
            "minItems": low,
            "maxItems": low + random.randint(0, 2),
        }
    if kind == "anyOf":
        return {"anyOf": [schema(random, depth + 2) for _ in range(random.randint(1, 3))]}
    if kind == "string":
        low = random.randint(0, 3)
        return random.choice(
            [
                {"type": "string", "minLength": low, "maxLength": low + random.randint(0, 6)},
                {"type": "string", "pattern": "^[a-z]{1,5}$"},
                {"type": "string", "format": "date"},
            ]
        )
    if kind in ("integer", "number"):
        low = random.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + random.randint(0, 200)}
    if kind == "enum":
        return {"enum": random.sample(["red", "green", 1, 2.5, None, True, 'a"b'], random.randint(1, 4))}
    return {"const": random.choice(["x", 7, False])} if kind == "const" else {"type": kind}


@pytest.mark.slow
def test_completions_of_random_schemas_validate(one_rank: LiveEngine) -> None:
    random = Random(7)
    schemas = [schema(random) for _ in range(1000)]

    async def one(model: InferenceModel, schema: dict[str, Any]) -> bool:
        answer = await model.constrained_decoding(json.dumps(schema)).generate(QUESTION)
        record = answer.generation
        assert record is not None
        if record.finish_reason == "stop":
            Draft202012Validator(schema).validate(json.loads(answer.last_content()))
        return record.finish_reason == "stop"

    async def go() -> list[bool]:
        model = await spawn(one_rank, tokens=450)
        ended = await asyncio.gather(*(one(model, schema) for schema in schemas))
        await model.dealloc()
        return ended

    ended = one_rank.run(go())
    assert sum(ended) >= 950, sum(ended)
