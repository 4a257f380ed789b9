"""Shared, copied and recomputed pages on real models: what comes out is what each request gets alone."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest
import torch

import tiny_models
from generator import Generator
from harmony_core.engine.inference.runner import Pending, Runner
from harmony_core.engine.inference.step import StepPlan
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.rpc.protocol import Generated, Sampling
from harmony_core.rpc.wire import unpack_floats, unpack_ints

Requests = dict[int, tuple[list[int], Sampling]]


@pytest.fixture(scope="module", params=["qwen3", "gemma3_text"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    """A family that sees everything, and one with windows and scaled norms."""
    directory: Path = tiny_models.build(tmp_path_factory.mktemp(request.param), request.param)
    return load_model(directory, TensorParallel.single(), torch.device("cpu"), torch.float32)


def run(generator: Generator, requests: Requests, lag: int = 0) -> dict[int, Generated]:
    """Answer all; results are read once `lag` later steps have been launched."""
    for id, (prompt, sampling) in requests.items():
        generator.submit(id, prompt, sampling)
    done: dict[int, Generated] = {}
    flying: deque[tuple[StepPlan, Pending]] = deque()
    while generator.has_work or flying:
        plan = generator.scheduler.plan()
        if plan is not None:
            flying.append((plan, generator.runner.launch(plan)))
        if plan is None or len(flying) > lag:
            oldest, pending = flying.popleft()
            for finished in generator.commit(oldest, generator.runner.collect(pending)):
                assert finished.generated is not None, finished.error
                done[finished.id] = finished.generated
    assert generator.scheduler.pool.available == generator.scheduler.pool.capacity
    return done


def assert_as_alone(model: CausalLM, requests: Requests, done: dict[int, Generated]) -> None:
    assert set(done) == set(requests)
    for id, (prompt, sampling) in requests.items():
        alone = run(Generator(model, 1024), {id: (prompt, sampling)})[id]
        assert unpack_ints(done[id].tokens) == unpack_ints(alone.tokens), f"request {id}"
        assert done[id].finish_reason == alone.finish_reason
        for name in ("logprobs", "sampled_logprobs"):
            found, wanted = (torch.tensor(unpack_floats(getattr(one, name))) for one in (done[id], alone))
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def made(model: CausalLM, kv_tokens: int, prefill_tokens: int, lag: int) -> Generator:
    """With a lag, decode steps go the way that they go on a device: on tensors that never move."""
    generator = Generator(model, kv_tokens, prefill_tokens=prefill_tokens)
    if lag:
        generator.runner = Runner(model, kv_tokens, static=True, buckets=(4, 16))
    return generator


def group(prompts: list[list[int]], samples: int, max_tokens: int) -> Requests:
    """`samples` requests of each prompt, in turn, some warm, some cold."""
    settings = [Sampling(max_tokens=max_tokens, seed=seed, temperature=(1.0, 0.6)[seed % 2]) for seed in range(samples)]
    pairs = [(prompt, sampling) for sampling in settings for prompt in prompts]
    return dict(enumerate(pairs))


@pytest.mark.parametrize(("prefill_tokens", "lag"), [(512, 0), (24, 2)])
def test_samples_of_one_prompt_are_what_each_would_be_alone(model: CausalLM, prefill_tokens: int, lag: int) -> None:
    requests = group(tiny_models.random_tokens([1, 16, 37, 64], seed=21), 3, 20)
    generator = made(model, 4096, prefill_tokens, lag)
    done = run(generator, requests, lag)
    assert generator.scheduler.statistics["forked_requests"] == 8
    assert generator.scheduler.statistics["computed_tokens"] == 1 + 16 + 37 + 64
    assert_as_alone(model, requests, done)


def test_what_is_read_from_known_pages_is_what_would_be_computed(model: CausalLM) -> None:
    stem, *ends = tiny_models.random_tokens([45, 1, 3, 19, 36], seed=22)
    generator = Generator(model, 2048, prefill_tokens=64)
    for store in (*generator.runner.cache.keys, *generator.runner.cache.values):
        store.fill_(float("nan"))  # what is read must have been written
    first = run(generator, {0: (stem, Sampling(max_tokens=40, seed=3))})[0]
    longer = stem + unpack_ints(first.tokens)
    requests = {
        id: (start + end, Sampling(max_tokens=12, seed=id))
        for id, (start, end) in enumerate(zip((stem, longer, longer, stem[:33]), ends, strict=True))
    }
    done = run(generator, requests, lag=1)
    assert generator.scheduler.statistics["prefix_hit_tokens"] == 32 + 80 + 80 + 32
    assert_as_alone(model, requests, done)


@pytest.mark.parametrize("lag", [0, 2])
def test_a_request_that_was_moved_out_goes_on_as_if_nothing_had_been(model: CausalLM, lag: int) -> None:
    requests = group(tiny_models.random_tokens([30, 5, 17], seed=23), 3, 60)
    generator = made(model, 256, 64, lag)
    done = run(generator, requests, lag)
    assert generator.scheduler.statistics["preemptions"] >= 2
    assert_as_alone(model, requests, done)
