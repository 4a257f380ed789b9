"""Constrained sampling in the engine: records, neighbours, preemption, sharing, and completions that must end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs

import tiny_models
from grammars import ALL, CHOICE, JSON, REGEX, STOPS, check_records, text_of, tokenizer_json
from harmony_core.engine.inference.runner import Runner
from harmony_core.engine.inference.scheduler import Scheduler
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.errors import EngineError
from harmony_core.grammar import Constraint
from harmony_core.rpc.protocol import Generated, Sampling
from harmony_core.rpc.wire import unpack_floats, unpack_ints
from ranks import RankPool
from step_plans import Requests, serve

VOCAB = 131
SETTINGS: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {}, {"temperature": 0.7}, {"top_p": 0.6}, {"top_k": 3})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build(tmp_path_factory.mktemp("llama"), vocab=VOCAB, seed=2)


def load(directory: Path, deterministic: bool = False) -> CausalLM:
    return load_model(
        directory, TensorParallel.single(), torch.device("cpu"), torch.float32, deterministic=deterministic
    )


@pytest.fixture(scope="module")
def model(directory: Path) -> CausalLM:
    return load(directory)


def parts(model: CausalLM, kv_tokens: int = 4096, missing: str = "", **options: Any) -> tuple[Scheduler, Runner]:
    runner = Runner(model, kv_tokens, max_running=64, tokenizer=lambda: tokenizer_json(VOCAB, missing), **options)
    scheduler = Scheduler(
        kv_tokens=kv_tokens, max_positions=512, vocab_size=VOCAB, version=lambda: 0, prefill_tokens=256, max_running=64
    )
    return scheduler, runner


def answer(model: CausalLM, requests: Requests, **options: Any) -> dict[int, Generated]:
    return serve(*parts(model, **options), requests)


def constrained(constraint: Constraint, **settings: Any) -> Sampling:
    return Sampling(**{"max_tokens": 90, "stop_ids": STOPS, **settings}, constraint=constraint)


def mixed(count: int = 40) -> Requests:
    """All kinds of constraints and settings; every fifth request has no constraint, every eighth a prompt twice."""
    prompts = tiny_models.random_tokens([3 + 7 * (i % 9) for i in range(count)], VOCAB, seed=1)
    requests: Requests = {}
    for i, prompt in enumerate(prompts):
        sampling = constrained(ALL[i % 4], seed=i, **SETTINGS[i % 5])
        if i % 5 == 4:
            sampling = structs.replace(sampling, constraint=None, max_tokens=20)
        requests[i] = prompts[i - 1] if i % 8 == 7 else prompt, sampling
    return requests


def matches(constraint: Constraint, text: str) -> bool:
    if constraint is JSON:
        found = json.loads(text)
        return list(found) == ["name", "age", "kind"] and len(found["name"]) <= 8 and 0 <= found["age"] <= 130
    if constraint is CHOICE:
        return text in json.loads(CHOICE.text)
    pattern = REGEX.text if constraint is REGEX else r"<[a-f]{1,3}(,[a-f]{1,3}){0,3}>"
    return re.fullmatch(pattern, text) is not None


def check(directory: Path, requests: Requests, answers: dict[int, Generated]) -> None:
    peer = tiny_models.reference(directory, torch.float64)
    assert answers.keys() == requests.keys()
    for id, (prompt, sampling) in requests.items():
        done, tokens = answers[id], unpack_ints(answers[id].tokens)
        if sampling.constraint is None:
            assert not done.masked_logprobs
            continue
        with torch.no_grad():
            logits = peer(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        check_records(done, sampling, logits, atol=3e-5)
        assert done.finish_reason == ("stop" if tokens[-1] in STOPS else "length")
        if done.finish_reason == "stop":
            assert matches(sampling.constraint, text_of(tokens, VOCAB))


@pytest.mark.parametrize("way", ["plain", "static", "ahead", "deterministic"])
def test_records_are_those_of_a_masked_softmax(directory: Path, way: str) -> None:
    requests = mixed()
    scheduler, runner = parts(load(directory, way == "deterministic"), static=way in ("static", "ahead"))
    runner.depth = 2 if way == "ahead" else runner.depth
    answers = serve(scheduler, runner, requests)
    check(directory, requests, answers)
    ended = [done.finish_reason == "stop" for id, done in answers.items() if requests[id][1].constraint]
    assert sum(ended) > 0.8 * len(ended)


def test_tensor_parallel_ranks_draw_the_same(rank_pool: RankPool, directory: Path) -> None:
    requests = mixed(16)
    arguments = {
        "directory": str(directory),
        "prompts": [prompt for prompt, _ in requests.values()],
        "samplings": [structs.asdict(sampling) for _, sampling in requests.values()],
        "adapter": False,
        "tokenizer": tokenizer_json(VOCAB),
    }
    for sampling in arguments["samplings"]:
        sampling["constraint"] = sampling["constraint"] and structs.asdict(sampling["constraint"])
    one, two = (
        rank_pool.run("engine.inference.generation_cases:generate", ranks=ranks, **arguments)[0]["results"]
        for ranks in (1, 2)
    )
    for id in one:
        assert one[id][0] == two[id][0]
        for ours, theirs in zip(one[id][1:], two[id][1:], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    alone = answer(load(directory), requests)
    assert {id: unpack_ints(done.tokens) for id, done in alone.items()} == {
        int(id): found[0] for id, found in two.items()
    }


@pytest.mark.parametrize("static", [False, True])
def test_neighbours_without_a_constraint_draw_the_same(model: CausalLM, static: bool) -> None:
    requests = mixed()
    free = {id: request for id, request in requests.items() if request[1].constraint is None}
    together, alone = answer(model, requests, static=static), answer(model, free, static=static)
    for id in free:
        assert together[id].tokens == alone[id].tokens
        np.testing.assert_allclose(unpack_floats(together[id].logprobs), unpack_floats(alone[id].logprobs), atol=1e-5)


@pytest.mark.parametrize("ahead", [0, 2])
def test_preempted_sequences_go_on_in_their_grammar(directory: Path, model: CausalLM, ahead: int) -> None:
    prompts = tiny_models.random_tokens([40] * 6, VOCAB, seed=3)
    requests = {i: (p, constrained(JSON, seed=i)) for i, p in enumerate(prompts)}
    scheduler, runner = parts(model, kv_tokens=256, static=ahead > 0)
    runner.depth = ahead
    answers = serve(scheduler, runner, requests)
    assert scheduler.statistics["preemptions"] > 0
    check(directory, requests, answers)


def test_groups_fork_and_prefixes_are_shared(directory: Path, model: CausalLM) -> None:
    prompt = tiny_models.random_tokens([70], VOCAB, seed=4)[0]
    requests = {i: (prompt, constrained(ALL[i % 4], seed=i)) for i in range(12)}
    requests |= {20 + i: ([*prompt[:64], 9 + i], constrained(ALL[i % 4], seed=i)) for i in range(4)}
    scheduler, runner = parts(model)
    answers = serve(scheduler, runner, requests)
    assert scheduler.statistics["forked_requests"] > 0 and scheduler.statistics["prefix_hit_tokens"] > 0
    check(directory, requests, answers)
    assert len({answers[id].tokens for id in (1, 5, 9)}) > 1


def test_a_row_is_free_of_the_grammar_of_its_last_sequence(model: CausalLM) -> None:
    scheduler, runner = parts(model)
    first = serve(scheduler, runner, {0: ([5, 6, 7], constrained(CHOICE))})
    free = Sampling(max_tokens=30, stop_ids=STOPS, seed=8)
    again = serve(scheduler, runner, {1: ([5, 6, 7, 8], free)})
    assert text_of(unpack_ints(first[0].tokens), VOCAB) in json.loads(CHOICE.text)
    assert again[1].tokens == answer(model, {1: ([5, 6, 7, 8], free)})[1].tokens


@pytest.mark.parametrize("static", [False, True])
def test_the_grammar_wins_over_min_tokens(model: CausalLM, static: bool) -> None:
    requests = {
        0: ([5, 6, 7], constrained(CHOICE, min_tokens=50)),
        1: ([5, 6, 7], constrained(Constraint("regex", "[ab]*"), min_tokens=20, max_tokens=60)),
    }
    answers = answer(model, requests, static=static)
    assert answers[0].finish_reason == "stop"
    assert text_of(unpack_ints(answers[0].tokens), VOCAB) in json.loads(CHOICE.text)
    assert len(unpack_ints(answers[1].tokens)) >= 20
    assert set(text_of(unpack_ints(answers[1].tokens), VOCAB)) <= {"a", "b"}


def test_a_completion_is_cut_at_its_limit(model: CausalLM) -> None:
    done = answer(model, {0: ([5, 6, 7], constrained(JSON, max_tokens=6))})[0]
    assert done.finish_reason == "length" and len(unpack_floats(done.masked_logprobs)) == 6


def test_a_grammar_that_cannot_go_on_fails_its_request_alone(model: CausalLM) -> None:
    scheduler, runner = parts(model, missing="}")
    scheduler.submit(0, [5, 6, 7], constrained(Constraint("regex", "a}")))
    scheduler.submit(1, [5, 6, 7], constrained(REGEX))
    done = {}
    while scheduler.has_work:
        plan = scheduler.plan()
        assert plan is not None
        for finished in scheduler.commit(plan, runner.run(plan)):
            done[finished.id] = finished
    assert isinstance(done[0].error, EngineError) and "constraint allows no token" in done[0].error.message
    assert done[1].generated is not None and done[1].generated.finish_reason == "stop"
