"""Constrained sampling on the device: graphs against plain steps, and the records against a masked softmax."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

import tiny_models
from engines import LiveEngine
from grammars import ALL, STOPS, check_records, tokenizer_json
from harmony_core.engine.inference.runner import Runner
from harmony_core.engine.inference.scheduler import Scheduler
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.rpc.protocol import Generated, Sampling
from harmony_core.rpc.wire import unpack_floats, unpack_ints
from harmony_core.text.threads import StringThread
from step_plans import Requests, serve

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda", 0)
VOCAB = 3001
SETTINGS: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {}, {"temperature": 0.7}, {"top_p": 0.6}, {"top_k": 3})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build(tmp_path_factory.mktemp("llama"), hidden=64, vocab=VOCAB, seed=7)


def mixed(count: int, constrained: bool = True) -> Requests:
    """Every third request has no constraint; with `constrained` false these alone."""
    requests: Requests = {}
    prompts = tiny_models.random_tokens([3 + 11 * (i % 9) for i in range(count)], VOCAB, seed=1)
    for i, prompt in enumerate(prompts):
        constraint = None if i % 3 == 2 else ALL[i % 4]
        settings = {"max_tokens": 90, "seed": i, "stop_ids": STOPS, **SETTINGS[i % 5]}
        if constrained or constraint is None:
            requests[i] = prompt, Sampling(**settings, constraint=constraint, min_tokens=4 * (i % 2))
    return requests


def answers(directory: Path, requests: Requests, kv_tokens: int = 16384, **options: Any) -> dict[int, Generated]:
    model = load_model(directory, TensorParallel.single(), DEVICE, torch.float32)
    runner = Runner(model, kv_tokens, max_running=64, tokenizer=lambda: tokenizer_json(VOCAB), **options)
    scheduler = Scheduler(
        kv_tokens=kv_tokens,
        max_positions=512,
        vocab_size=VOCAB,
        version=lambda: 0,
        prefill_tokens=512,
        max_running=64,
        max_splits=runner.max_splits,
    )
    return serve(scheduler, runner, requests)


def check(directory: Path, requests: Requests, done: dict[int, Generated]) -> None:
    peer = tiny_models.reference(directory, torch.float64)
    for id, (prompt, sampling) in requests.items():
        tokens = unpack_ints(done[id].tokens)
        if sampling.constraint is not None and tokens:
            with torch.no_grad():
                logits = peer(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            kept = structs.replace(sampling, min_tokens=0)
            if not sampling.min_tokens:  # it changes the processed distribution
                check_records(done[id], kept, logits, atol=2e-4)
            assert done[id].finish_reason == ("stop" if tokens[-1] in STOPS else "length")


@pytest.mark.parametrize("way", ["graphs", "static", "plain"])
def test_records_are_those_of_a_masked_softmax(directory: Path, way: str) -> None:
    requests = mixed(60)
    check(directory, requests, answers(directory, requests, static=way != "plain", graphs=way == "graphs"))


def test_graphs_draw_what_plain_steps_draw(directory: Path) -> None:
    requests = mixed(48)
    graphs, plain = answers(directory, requests), answers(directory, requests, static=False)
    assert {id: unpack_ints(done.tokens) for id, done in graphs.items()} == {
        id: unpack_ints(done.tokens) for id, done in plain.items()
    }
    for id, done in graphs.items():
        for name in ("logprobs", "sampled_logprobs", "masked_logprobs"):
            found, wanted = unpack_floats(getattr(done, name)), unpack_floats(getattr(plain[id], name))
            assert found == pytest.approx(wanted, abs=2e-4)


def test_neighbours_without_a_constraint_draw_the_same(directory: Path) -> None:
    free = mixed(48, constrained=False)
    together, alone = answers(directory, mixed(48)), answers(directory, free)
    assert all(together[id].tokens == alone[id].tokens for id in free)


def test_preempted_sequences_go_on_in_their_grammar(directory: Path) -> None:
    requests = mixed(24)
    check(directory, requests, answers(directory, requests, kv_tokens=512))


def test_a_live_engine_generates_json(cuda: LiveEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }

    async def go() -> None:
        model = await cuda.client.model("builtin:tiny-lm", tokens_to_generate=64).spawn_inference("constrained")
        answer = await model.constrained_decoding(json.dumps(schema)).generate(StringThread([("user", "say")]))
        assert answer.generation is not None and answer.generation.masked_logprobs
        if answer.generation.finish_reason == "stop":
            assert isinstance(json.loads(answer.last_content())["a"], int)
        await model.dealloc()

    cuda.run(go())
