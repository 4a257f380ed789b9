"""Decode steps as CUDA graphs against the same steps run plainly, and against a plain forward pass."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_models
from engine.kernels import sampling_cases
from harmony_core.engine.inference.device_decode import DecodeGraphs
from harmony_core.engine.inference.runner import Runner
from harmony_core.engine.inference.sampler import sample
from harmony_core.engine.inference.scheduler import Scheduler
from harmony_core.engine.inference.step import (
    FILTERED,
    GREEDY as GREEDY_TAIL,
    PLAIN,
    StepResult,
    float64,
    int32,
    unpack_sampling,
)
from harmony_core.engine.models.adapters import add_lora
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.rpc.protocol import LoraSettings, Sampling
from harmony_core.rpc.wire import unpack_floats
from step_plans import GREEDY, Book, ragged_requests, serve, tokens_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda", 0)
VOCAB = 3001
FAMILIES = ["llama", "qwen3", "gemma3_text"]
SETTINGS = [
    GREEDY,
    Sampling(temperature=1.0),
    Sampling(temperature=0.7),
    Sampling(temperature=1.0, top_k=5),
    Sampling(temperature=0.9, top_p=0.8, min_p=0.01),
    Sampling(temperature=1.3, min_p=0.05),
]


def build(directory: Path, family: str = "llama") -> Path:
    return tiny_models.build(directory, family, hidden=64, vocab=VOCAB, seed=7)


def load(directory: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    return load_model(directory, TensorParallel.single(), DEVICE, dtype)


def prompts_of(count: int, seed: int = 0) -> list[list[int]]:
    """Among them lengths at the edges of pages and of attention's splits."""
    lengths = [(1, 15, 16, 17, 31, 33, 255, 256, 257, 40)[i % 10] for i in range(count)]
    return tiny_models.random_tokens(lengths, VOCAB, seed)


def new_book(seed: int = 0) -> Book:
    return Book(slots=64, pages=512, seed=seed)


def runners(model: CausalLM, **options: Any) -> dict[str, Runner]:
    sizes: dict[str, Any] = {"max_running": 64, **options}
    return {
        "plain": Runner(model, 8192, static=False, **sizes),
        "static": Runner(model, 8192, graphs=False, **sizes),
        "graphs": Runner(model, 8192, **sizes),
    }


def start(all_runners: dict[str, Runner], book: Book, count: int, sampling: Sampling = GREEDY) -> list[int]:
    plan, slots = book.prefill(prompts_of(count), sampling)
    compare(all_runners, plan)
    return slots


def compare(all_runners: dict[str, Runner], plan: Any) -> StepResult:
    results = {name: runner.run(plan) for name, runner in all_runners.items()}
    expected = results["plain"]
    for name, result in results.items():
        assert result.tokens == expected.tokens, name
        np.testing.assert_allclose(float64(result.logprobs), float64(expected.logprobs), atol=1e-4, err_msg=name)
        np.testing.assert_allclose(float64(result.sampled_logprobs), float64(expected.sampled_logprobs), atol=1e-4)
    return expected


def reference_logprobs(directory: Path, sequences: list[list[int]], drawn: int) -> np.ndarray[Any, Any]:
    """Of the last `drawn` tokens of each sequence, by plain transformers in float32: `[drawn, N]`."""
    plain = tiny_models.reference(directory).to(DEVICE)
    columns = []
    with torch.no_grad():
        for tokens in sequences:
            ids = torch.tensor([tokens], device=DEVICE)
            logprobs = plain(ids).logits[0, :-1].float().log_softmax(-1)
            columns.append(logprobs.gather(-1, ids[0, 1:, None])[-drawn:, 0].cpu().numpy())
    return np.stack(columns, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_score_what_a_plain_forward_pass_scores(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    directory = build(tmp_path, family)
    runner, book = Runner(load(directory, dtype), 8192, max_running=64), new_book()
    prompts = prompts_of(10)
    plan, slots = book.prefill(prompts, Sampling(temperature=1.0))
    results = [runner.run(plan)] + [runner.run(book.decode(slots)) for _ in range(20)]
    drawn = np.stack([int32(result.tokens) for result in results])
    ours = np.stack([float64(result.logprobs) for result in results])
    sequences = [prompt + drawn[:, row].tolist() for row, prompt in enumerate(prompts)]
    expected = reference_logprobs(directory, sequences, len(results))
    assert runner.statistics["graphs"] == 2
    if dtype == torch.float32:
        np.testing.assert_allclose(ours, expected, atol=1e-4)
    else:
        assert np.abs(ours - expected).mean() < 0.05


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_every_bucket_edge(family: str, tmp_path: Path) -> None:
    all_runners, book = runners(load(build(tmp_path, family))), new_book()
    slots = start(all_runners, book, 33, Sampling(temperature=0.8))
    while slots:
        compare(all_runners, book.decode(slots))
        slots.pop(len(slots) // 2)
    assert all_runners["graphs"].statistics["graphs"] == 2 * len([1, 2, 4, 8, 16, 24, 32, 48])
    plan, slots = book.prefill(prompts_of(5, seed=1), Sampling(temperature=0.8))
    compare(all_runners, plan)
    compare(all_runners, book.decode(slots))


def test_tails_of_all_settings_draw_what_the_cpu_draws_from_the_same_logits(tmp_path: Path) -> None:
    runner, book = Runner(load(build(tmp_path)), 8192, max_running=64), new_book()
    groups: dict[int, list[int]] = {}
    for index, sampling in enumerate(SETTINGS * 3):
        plan, slots = book.prefill(prompts_of(1, seed=index), sampling)
        runner.run(plan)
        groups[index] = slots
    everyone = [slot for slots in groups.values() for slot in slots]
    mixes = [everyone, groups[0] + groups[6], groups[1] + groups[2] + groups[0], groups[3], groups[4] + groups[5]]
    assert runner._state is not None
    for turn in range(30):
        slots = mixes[turn % len(mixes)]
        banned = {0: list(range(0, VOCAB, 2))} if turn % 7 == 6 else {}
        plan = book.decode(slots, banned)
        result = runner.run(plan)
        logits = runner._state.logits[: len(slots)].cpu()
        expected = sample(logits, unpack_sampling(plan.sampling), banned)
        assert tokens_of(result) == expected.tokens.tolist()
        np.testing.assert_allclose(float64(result.logprobs), expected.logprobs.numpy(), atol=1e-5)
        np.testing.assert_allclose(float64(result.sampled_logprobs), expected.sampled_logprobs.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", sampling_cases.CHECKS)
def test_draws_by_kernels(name: str) -> None:
    sampling_cases.CHECKS[name](DEVICE)


@pytest.mark.parametrize("vocab", [128256, 151936])
@pytest.mark.parametrize("tail", [GREEDY_TAIL, PLAIN, FILTERED])
def test_draws_by_kernels_from_a_large_vocabulary(vocab: int, tail: int) -> None:
    sampling_cases.check(vocab, tail, DEVICE, repeats=3)


def test_rows_that_are_no_distribution_are_reported_and_feed_a_token_all_the_same(tmp_path: Path) -> None:
    model = load(build(tmp_path))
    runner, book = Runner(model, 8192, max_running=64), new_book()
    slots = []
    for index, sampling in enumerate(SETTINGS):
        plan, targets = book.prefill(prompts_of(1, seed=index), sampling)
        runner.run(plan)
        slots += targets
    assert np.isfinite(float64(runner.run(book.decode(slots)).logprobs)).all()
    with torch.no_grad():
        model.head_weight[5] = float("nan")
    for _ in range(2):
        result = runner.run(book.decode(slots))
        assert not np.isfinite(float64(result.logprobs)).any()
        assert not np.isfinite(float64(result.sampled_logprobs)).any()
        assert min(tokens_of(result)) >= 0 and max(tokens_of(result)) < VOCAB


def test_weights_updated_in_place_need_no_new_graph(tmp_path: Path) -> None:
    model = load(build(tmp_path))
    all_runners, book = runners(model), new_book()
    slots = start(all_runners, book, 8)
    before = compare(all_runners, book.decode(slots))
    recorded = all_runners["graphs"].statistics["graphs"]
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.base_parameters.values():
                parameter.mul_(1.05)
        for runner in all_runners.values():
            runner.weights_changed()
        after = compare(all_runners, book.decode(slots))
        assert float64(after.logprobs).tolist() != float64(before.logprobs).tolist()
    graphs = all_runners["graphs"]
    assert graphs._graphs is not None
    assert graphs.statistics["graphs"] == recorded == len(graphs._graphs)
    # A weight that moved is noticed.
    with torch.no_grad():
        name, parameter = next(iter(model.base_parameters.items()))
        parameter.data = parameter.data.clone().mul_(1.5)
    for runner in all_runners.values():
        runner.weights_changed()
    assert len(graphs._graphs) == 0, name
    compare(all_runners, book.decode(slots))


def test_steps_launched_ahead(tmp_path: Path) -> None:
    model = load(build(tmp_path))
    plain, graphs = Runner(model, 8192, static=False, max_running=64), Runner(model, 8192, max_running=64)
    book = new_book()
    plan, slots = book.prefill(prompts_of(20), Sampling(temperature=1.0))
    plans = [plan] + [book.decode(slots) for _ in range(6)]
    more, others = book.prefill(prompts_of(7, seed=3), Sampling(temperature=1.0), forks=2)
    plans += [more] + [book.decode(slots + others) for _ in range(20)]
    under_way, results = [], []
    for p in plans:
        under_way.append(graphs.launch(p))
        if len(under_way) > graphs.depth:
            results.append(graphs.collect(under_way.pop(0)))
    results += [graphs.collect(pending) for pending in under_way]
    for p, result in zip(plans, results, strict=True):
        expected = plain.run(p)
        assert result.tokens == expected.tokens
        np.testing.assert_allclose(float64(result.logprobs), float64(expected.logprobs), atol=1e-4)
    assert len(graphs._idle) == graphs.depth + 1
    assert graphs.statistics["decode_seconds"] > 0 and graphs.statistics["prefill_seconds"] > 0


@pytest.mark.parametrize("kv_tokens", [8192, 1024])
def test_a_scheduler_that_plans_ahead_gets_the_same_answers(kv_tokens: int, tmp_path: Path) -> None:
    model = load(build(tmp_path))
    requests = ragged_requests(80, VOCAB)
    answers = []
    for static in (False, True):
        runner = Runner(model, kv_tokens, max_running=48, static=static)
        scheduler = Scheduler(
            kv_tokens=kv_tokens,
            max_positions=model.max_positions,
            vocab_size=model.vocab_size,
            version=lambda: 0,
            prefill_tokens=256,
            max_running=48,
            max_splits=runner.max_splits,
        )
        answers.append(serve(scheduler, runner, requests))
        assert runner.depth == (2 if static else 0)
    plain, graphs = answers
    assert plain.keys() == graphs.keys() == requests.keys()
    for id, expected in plain.items():
        assert graphs[id].tokens == expected.tokens
        np.testing.assert_allclose(unpack_floats(graphs[id].logprobs), unpack_floats(expected.logprobs), atol=1e-4)


def test_memory_comes_back(tmp_path: Path) -> None:
    directory = build(tmp_path)

    def once() -> None:
        model = load(directory)
        runner, book = Runner(model, 8192, max_running=64), new_book()
        runner.prepare()
        plan, slots = book.prefill(prompts_of(20))
        runner.run(plan)
        for _ in range(3):
            runner.run(book.decode(slots))
        runner.close()

    reserved = []
    for _ in range(3):
        once()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    # The first round leaves what libraries keep for themselves.
    assert reserved[1] == reserved[2]


def test_compiled_layers_in_graphs(tmp_path: Path) -> None:
    directory = build(tmp_path)
    compiled = load(directory)
    compiled.compile()
    all_runners, book = runners(load(directory)), new_book()
    all_runners["compiled"] = Runner(compiled, 8192, max_running=64)
    all_runners["compiled static"] = Runner(compiled, 8192, max_running=64, graphs=False)
    slots = start(all_runners, book, 9, Sampling(temperature=0.9))
    while slots:
        compare(all_runners, book.decode(slots))
        slots = slots[: len(slots) // 2]


@pytest.mark.parametrize("compiled", [False, True])
def test_adapters_in_graphs(compiled: bool, tmp_path: Path) -> None:
    model = load(build(tmp_path))
    add_lora(model, "style", LoraSettings(rank=4, alpha=8.0, seed=5))
    with torch.no_grad():
        for name, parameter in model.adapters["style"].parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    options = {"max_running": 64}
    plain = Runner(model, 8192, adapter="style", static=False, **options)
    base = Runner(model, 8192, **options)
    book, base_book = new_book(), new_book()
    if compiled:
        model.compile()
    all_runners = {"plain": plain, "graphs": Runner(model, 8192, adapter="style", **options)}
    slots = start(all_runners, book, 9)
    base_slots = start({"plain": base}, base_book, 9)
    for _ in range(4):
        styled = compare(all_runners, book.decode(slots))
        assert float64(styled.logprobs).tolist() != float64(base.run(base_book.decode(base_slots)).logprobs).tolist()


def test_what_cannot_be_recorded_runs_eagerly_with_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    told: list[str] = []
    all_runners, book = runners(load(build(tmp_path))), new_book()
    all_runners["failing"] = Runner(
        all_runners["plain"].model, 8192, max_running=64, notify=lambda what, _fields: told.append(what)
    )
    slots = start(all_runners, book, 9)
    compare(all_runners, book.decode(slots))
    assert all_runners["failing"]._graphs is not None
    all_runners["failing"]._graphs.drop()
    monkeypatch.setattr(DecodeGraphs, "_capture", refuse)
    for _ in range(3):
        compare(all_runners, book.decode(slots))
        slots.pop()
    assert told == ["decode_graph", "decode_graph", "decode_graphs_failed"]
