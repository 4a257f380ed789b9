from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models
from engine.inference.generation_cases import LORA, add_adapter
from engine.inference.simulated_rank import rows_of
from generator import Generator
from harmony_core.engine.inference.step import Finished, int32
from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.models.heads import linear_logprob_loss, token_logprobs
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.errors import EngineError
from harmony_core.rpc.protocol import Generated, Sampling
from harmony_core.rpc.wire import unpack_floats, unpack_ints
from ranks import RankPool

GREEDY = Sampling(temperature=0, max_tokens=40)
EDGES = [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 5]
"""Prompt lengths around the edges of pages."""

Loader = Callable[..., tuple[CausalLM, Path]]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    made: dict[str, tuple[CausalLM, Path]] = {}

    def loader(family: str = "llama", **options: Any) -> tuple[CausalLM, Path]:
        name = f"{family} {options}"
        if name not in made:
            directory = tiny_models.build(tmp_path_factory.mktemp(family), family, **options)
            model = load_model(directory, TensorParallel.single(), torch.device("cpu"), torch.float32)
            made[name] = model, directory
        return made[name]

    return loader


def drain(generator: Generator) -> dict[int, Finished]:
    done: dict[int, Finished] = {}
    while generator.has_work:
        done.update({finished.id: finished for finished in generator.step()})
    return done


def answers(generator: Generator) -> dict[int, Generated]:
    results: dict[int, Generated] = {}
    for id, finished in drain(generator).items():
        assert finished.generated is not None, finished.error
        results[id] = finished.generated
    return results


def tokens_of(generated: Generated) -> list[int]:
    return unpack_ints(generated.tokens)


@torch.no_grad()
def peer_greedy(peer: Any, prompt: list[int], count: int) -> list[int]:
    """New tokens of transformers' own greedy `generate`."""
    output = peer.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_greedy_output_equals_transformers_generate(load: Loader, family: str, tied: bool) -> None:
    model, directory = load(family, tied=tied)
    prompts = tiny_models.random_tokens(EDGES[:8])
    generator = Generator(model, 4096, prefill_tokens=64)
    for id, prompt in enumerate(prompts):
        generator.submit(id, prompt, GREEDY)
    done = answers(generator)
    peer = tiny_models.reference(directory)
    for id, prompt in enumerate(prompts):
        assert tokens_of(done[id]) == peer_greedy(peer, prompt, 40)
        assert done[id].finish_reason == "length"
    assert len({token for answer in done.values() for token in tokens_of(answer)}) > 10
    assert generator.scheduler.pool.available == generator.scheduler.pool.capacity


def recorded(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The logits of every step from now on."""
    seen: list[Tensor] = []
    compute = generator.runner.model.logits

    def logits(hidden: Tensor) -> Tensor:
        seen.append(compute(hidden))
        return seen[-1]

    monkeypatch.setattr(generator.runner.model, "logits", logits)
    return seen


def logits_by_step(
    generator: Generator, arrivals: Iterable[tuple[int, list[int], Sampling]], seen: list[Tensor]
) -> tuple[dict[tuple[int, int], Tensor], dict[int, list[int]]]:
    """Logits by (request, context), and each request's new tokens; every second step a request arrives."""
    waiting = list(arrivals)
    found: dict[tuple[int, int], Tensor] = {}
    done: dict[int, list[int]] = {}
    steps = 0
    while waiting or generator.has_work:
        if waiting and steps % 2 == 0:
            generator.submit(*waiting.pop(0))
        plan = generator.plan()
        owner = rows_of(generator.scheduler)
        seen.clear()
        for finished in generator.commit(plan, generator.run(plan)):
            assert finished.generated is not None
            done[finished.id] = tokens_of(finished.generated)
        rows = torch.cat(seen) if seen else torch.empty(0)
        contexts = int32(plan.contexts)
        for row, slot, logits in zip(int32(plan.sampled), int32(plan.targets), rows, strict=True):
            found[owner[int(slot)], int(contexts[row])] = logits
        steps += 1
    return found, done


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("prefill_tokens", [512, 20])
def test_cached_decode_equals_the_full_forward_at_every_step(
    load: Loader, family: str, prefill_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, directory = load(family)
    generator = Generator(model, 700, prefill_tokens=prefill_tokens)
    for store in (*generator.runner.cache.keys, *generator.runner.cache.values):
        store.fill_(float("nan"))  # what is read must have been written
    prompts = tiny_models.random_tokens(EDGES, seed=1)
    sampling = [Sampling(max_tokens=3 + 5 * (id % 5), seed=id) for id in range(len(prompts))]
    seen = recorded(generator, monkeypatch)
    found, done = logits_by_step(generator, list(zip(range(len(prompts)), prompts, sampling, strict=True)), seen)
    peer = tiny_models.reference(directory)
    assert len(found) == sum(settings.max_tokens for settings in sampling)
    for id, prompt in enumerate(prompts):
        with torch.no_grad():
            full = peer(torch.tensor([prompt + done[id]])).logits[0]
        for context in range(len(prompt), len(prompt) + sampling[id].max_tokens):
            torch.testing.assert_close(found[id, context], full[context - 1], atol=2e-5, rtol=0)


def test_sampled_tokens_are_the_same_alone_and_among_64(load: Loader) -> None:
    model, _ = load("qwen2")
    lengths = [1 + (7 * id) % 60 for id in range(64)]
    prompts = tiny_models.random_tokens(lengths, seed=2)
    settings = [
        Sampling(max_tokens=30, seed=id, temperature=(1.0, 1.0, 0.0, 0.7)[id % 4], top_p=(1.0, 0.9)[id % 7 == 0])
        for id in range(64)
    ]
    crowd = Generator(model, 16384, prefill_tokens=200)
    for id in range(64):
        crowd.submit(id, prompts[id], settings[id])
    together = answers(crowd)
    for id in (0, 1, 2, 3, 7, 21, 33, 63):
        alone = Generator(model, 1024)
        alone.submit(id, prompts[id], settings[id])
        single = answers(alone)[id]
        assert tokens_of(single) == tokens_of(together[id])
        torch.testing.assert_close(
            torch.tensor(unpack_floats(single.logprobs)),
            torch.tensor(unpack_floats(together[id].logprobs)),
            atol=1e-5,
            rtol=0,
        )
    repeated = Generator(model, 16384)
    repeated.submit(5, prompts[5], Sampling(max_tokens=30, seed=6))
    assert tokens_of(answers(repeated)[5]) != tokens_of(together[5])


def scored(model: CausalLM, tokens: list[int]) -> Tensor:
    """Log-probs of tokens[1:] by the scoring path."""
    row = torch.tensor(tokens)
    with torch.no_grad(), forward_context(ForwardContext(PackedAttention((len(tokens) - 1,)))):
        hidden = model.hidden_states(row[:-1], torch.arange(len(tokens) - 1))
        return token_logprobs(model, hidden, row[1:])


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_sampler_and_the_scorer_agree_on_log_probs(load: Loader, family: str) -> None:
    model, _ = load(family)
    generator = Generator(model, 4096)
    prompts = tiny_models.random_tokens(EDGES, seed=3)
    for id, prompt in enumerate(prompts):
        generator.submit(id, prompt, Sampling(max_tokens=25, seed=id, temperature=(1.0, 0.8, 0.0)[id % 3]))
    done = answers(generator)
    for id, prompt in enumerate(prompts):
        expected = scored(model, prompt + tokens_of(done[id]))[len(prompt) - 1 :]
        raw = torch.tensor(unpack_floats(done[id].logprobs))
        torch.testing.assert_close(raw, expected, atol=2e-5, rtol=0)
        processed = torch.tensor(unpack_floats(done[id].sampled_logprobs))
        if id % 3 == 0:
            torch.testing.assert_close(processed, raw, atol=1e-5, rtol=0)
        else:
            assert not torch.allclose(processed, raw, atol=1e-2)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_two_tensor_parallel_ranks_generate_what_one_does(
    load: Loader, rank_pool: RankPool, family: str, adapter: bool
) -> None:
    _, directory = load(family)
    prompts = tiny_models.random_tokens([1, 16, 33, 90, 7, 20], seed=4)
    settings = [
        {"max_tokens": 12, "seed": id, "temperature": (1.0, 0.0, 0.7)[id % 3], "top_k": (0, 20)[id % 2]}
        for id in range(len(prompts))
    ]
    arguments = {"directory": str(directory), "prompts": prompts, "samplings": settings, "adapter": adapter}
    one, two = (
        rank_pool.run("engine.inference.generation_cases:generate", ranks=ranks, **arguments)[0] for ranks in (1, 2)
    )
    assert two["largest_plan"] < 2048
    assert two["kv_bytes"] == one["kv_bytes"] // 2
    for id in one["results"]:
        tokens, raw, processed = (torch.tensor(values) for values in one["results"][id][:3])
        other_tokens, other_raw, other_processed = (torch.tensor(values) for values in two["results"][id][:3])
        assert torch.equal(tokens, other_tokens)
        torch.testing.assert_close(other_raw, raw, atol=1e-5, rtol=0)
        torch.testing.assert_close(other_processed, processed, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_an_adapter_generates_what_merged_weights_do_and_the_base_stays_itself(tmp_path: Path, family: str) -> None:
    directory = tiny_models.build(tmp_path / family, family)
    model = load_model(directory, TensorParallel.single(), torch.device("cpu"), torch.float32)
    add_adapter(model, "style")
    base, merged = tiny_models.reference(directory), tiny_models.reference(directory)
    parameters = model.adapters["style"].parameters
    with torch.no_grad():
        for name, a in parameters.items():
            if name.endswith("lora_A.weight"):
                b = parameters[name.replace("lora_A", "lora_B")]
                path = name.removesuffix(".lora_A.weight")
                merged.get_submodule(path).weight += LORA.alpha / LORA.rank * (b @ a)
    plain, styled = Generator(model, 2048), Generator(model, 2048, adapter="style")
    prompts = tiny_models.random_tokens(EDGES[:6], seed=9)
    for id, prompt in enumerate(prompts):
        plain.submit(id, prompt, GREEDY)
        styled.submit(id, prompt, GREEDY)
    found: list[dict[int, Generated]] = [{}, {}]
    while plain.has_work or styled.has_work:
        for generator, done in zip((plain, styled), found, strict=True):
            for finished in generator.step() if generator.has_work else []:
                assert finished.generated is not None
                done[finished.id] = finished.generated
    for id, prompt in enumerate(prompts):
        assert tokens_of(found[0][id]) == peer_greedy(base, prompt, 40)
        assert tokens_of(found[1][id]) == peer_greedy(merged, prompt, 40)
        assert tokens_of(found[0][id]) != tokens_of(found[1][id])


def test_a_model_that_generated_can_be_trained_and_generates_with_what_it_learnt(tmp_path: Path) -> None:
    directory = tiny_models.build(tmp_path / "trained")
    model = load_model(directory, TensorParallel.single(), torch.device("cpu"), torch.float32)
    generator = Generator(model, 1024)
    prompt, lesson = [5, 6, 7], [20, 21, 22, 23]
    generator.submit(0, prompt, Sampling(temperature=0, max_tokens=4))
    assert tokens_of(answers(generator)[0]) != lesson
    row = torch.tensor(prompt + lesson)
    parameters = list(model.trainable_parameters(None).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(40):
        with forward_context(ForwardContext(PackedAttention((6,)))):
            hidden = model.hidden_states(row[:-1], torch.arange(6))
            loss, _ = linear_logprob_loss(model, hidden[2:], row[3:], torch.ones(4))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    generator.submit(1, prompt, Sampling(temperature=0, max_tokens=4))
    assert tokens_of(answers(generator)[1]) == lesson


def test_stopping_and_min_tokens(load: Loader) -> None:
    model, directory = load("llama")
    prompt = tiny_models.random_tokens([12], seed=5)[0]
    plain = peer_greedy(tiny_models.reference(directory), prompt, 30)
    stop = plain[6]
    first = plain.index(stop)
    generator = Generator(model, 1024)
    generator.submit(0, prompt, Sampling(temperature=0, max_tokens=30, stop_ids=(stop,)))
    generator.submit(1, prompt, Sampling(temperature=0, max_tokens=30, stop_ids=(stop,), min_tokens=first + 1))
    done = answers(generator)
    assert tokens_of(done[0]) == plain[: first + 1] and done[0].finish_reason == "stop"
    held_back = tokens_of(done[1])
    assert len(held_back) > first + 1
    assert stop not in held_back[: first + 1] and held_back[:first] == plain[:first]
    expected = scored(model, prompt + held_back)[len(prompt) - 1 :]
    torch.testing.assert_close(torch.tensor(unpack_floats(done[1].logprobs)), expected, atol=2e-5, rtol=0)


def test_not_a_number_ends_the_request_that_met_it_and_no_other(tmp_path: Path) -> None:
    directory = tiny_models.build(tmp_path / "poisoned")
    model = load_model(directory, TensorParallel.single(), torch.device("cpu"), torch.float32)
    prompts = tiny_models.random_tokens([30] * 5, seed=6)
    short = Sampling(temperature=0, max_tokens=15)
    clean = Generator(model, 128)
    for id, prompt in enumerate(prompts):
        clean.submit(id, prompt, short)
    expected = answers(clean)
    used = {token for id, prompt in enumerate(prompts) for token in prompt + tokens_of(expected[id])}
    poison = min(set(range(3, model.vocab_size)) - used)
    with torch.no_grad():
        model.module.get_input_embeddings().weight[poison] = float("nan")
    # Each request takes 3 of the pool's 8 pages: the later ones live where the broken one lived.
    generator = Generator(model, 128)
    generator.submit(7, [prompts[0][0], poison] * 15, short)
    for id, prompt in enumerate(prompts):
        generator.submit(id, prompt, short)
    done = drain(generator)
    error = done.pop(7).error
    assert isinstance(error, EngineError) and "request 7" in error.message
    assert generator.scheduler.pool.available == generator.scheduler.pool.capacity
    for id, finished in done.items():
        assert finished.generated is not None
        assert tokens_of(finished.generated) == tokens_of(expected[id])


def test_requests_that_come_and_go_leave_nothing_and_disturb_nobody(load: Loader) -> None:
    model, _ = load("qwen3")
    chance = random.Random(3)
    generator = Generator(model, 640, prefill_tokens=100)
    prompts = tiny_models.random_tokens([chance.randint(1, 60) for _ in range(150)], seed=7)
    settings = [Sampling(max_tokens=chance.choice((1, 5, 20)), seed=id) for id in range(150)]
    cancelled: set[int] = set()
    done: dict[int, Generated] = {}
    submitted = 0
    while submitted < 150 or generator.has_work:
        for _ in range(chance.randint(0, 6)):
            if submitted < 150:
                generator.submit(submitted, prompts[submitted], settings[submitted])
                submitted += 1
        if submitted and chance.random() < 0.3:
            victim = chance.randrange(submitted)
            if victim not in done:
                cancelled.add(victim)
            generator.cancel(victim)
        if generator.has_work:
            for finished in generator.step():
                assert finished.generated is not None
                done[finished.id] = finished.generated
    assert cancelled and set(done) | cancelled == set(range(150)) and not set(done) & cancelled
    assert generator.scheduler.pool.available == generator.scheduler.pool.capacity
    for id in list(done)[::20]:
        alone = Generator(model, 256)
        alone.submit(id, prompts[id], settings[id])
        assert tokens_of(answers(alone)[id]) == tokens_of(done[id])


def test_more_rows_than_fit_one_group_of_logits_draw_the_same(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load("llama")
    prompts = tiny_models.random_tokens([5] * 10, seed=8)

    def run() -> list[list[int]]:
        generator = Generator(model, 1024)
        for id, prompt in enumerate(prompts):
            generator.submit(id, prompt, Sampling(max_tokens=8, min_tokens=4, seed=id, stop_ids=(9, 10, 11)))
        return [tokens_of(answer) for _, answer in sorted(answers(generator).items())]

    whole = run()
    monkeypatch.setattr("harmony_core.engine.inference.runner.LOGITS_AT_ONCE", 3 * model.vocab_size)
    assert run() == whole


def test_tokens_record_the_version_that_drew_them(load: Loader) -> None:
    model, _ = load("llama")
    version = [3]
    generator = Generator(model, 1024, version=lambda: version[0])
    generator.submit(0, [5, 6], Sampling(max_tokens=5))
    generator.step()
    generator.step()
    version[0] = 4
    assert unpack_ints(answers(generator)[0].versions) == [3, 3, 4, 4, 4]


def test_a_step_with_little_work_runs_on_one_thread(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load()
    seen: list[int] = []
    hidden_states = model.hidden_states

    def watched(tokens: Tensor, positions: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return hidden_states(tokens, positions)

    monkeypatch.setattr(model, "hidden_states", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        generator = Generator(model, 8192)
        generator.submit(0, [1, 2, 3], Sampling(max_tokens=3))
        drain(generator)
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1, 1] and after == 2
