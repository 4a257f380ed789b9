"""Steps over static tensors against the ordinary ones, on CPU; launching and collecting."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs

import tiny_models
from harmony_core.engine.inference.device_decode import buckets_up_to
from harmony_core.engine.inference.runner import KVCache, Runner
from harmony_core.engine.inference.scheduler import Scheduler
from harmony_core.engine.inference.step import StepPlan, StepResult, float64
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.errors import ResourceError
from harmony_core.memory import plan as memory
from harmony_core.memory.plan import MAX_RUNNING
from harmony_core.model.spec import ModelSpec
from harmony_core.rpc.protocol import Sampling, Spawn
from harmony_core.rpc.wire import unpack_floats
from step_plans import GREEDY, Book, ragged_requests, serve, tokens_of

CPU = torch.device("cpu")
SETTINGS = [
    GREEDY,
    Sampling(temperature=1.0),
    Sampling(temperature=0.7),
    Sampling(temperature=1.0, top_k=5),
    Sampling(temperature=0.9, top_p=0.8, min_p=0.01),
    Sampling(temperature=1.3, min_p=0.05),
]


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    return build(request.param, tmp_path_factory.mktemp(request.param))


def build(family: str, directory: Path) -> CausalLM:
    tiny_models.build(directory, family, seed=3)
    return load_model(directory, TensorParallel.single(), torch.device("cpu"), torch.float32)


def both(model: CausalLM, max_running: int = 64) -> tuple[Runner, Runner]:
    return Runner(model, 4096, max_running=max_running), Runner(model, 4096, max_running=max_running, static=True)


def assert_same(ours: StepResult, reference: StepResult) -> None:
    assert ours.tokens == reference.tokens
    np.testing.assert_allclose(float64(ours.logprobs), float64(reference.logprobs), atol=1e-5)
    np.testing.assert_allclose(float64(ours.sampled_logprobs), float64(reference.sampled_logprobs), atol=1e-5)


def compare(runners: tuple[Runner, Runner], plan: StepPlan) -> StepResult:
    plain, static = runners
    reference = plain.run(plan)
    assert_same(static.run(plan), reference)
    return reference


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 16, 17])
def test_static_steps_give_what_plain_ones_give_at_every_bucket_edge(model: CausalLM, count: int) -> None:
    runners, book = both(model), Book()
    prompts = tiny_models.random_tokens([5 + 3 * i for i in range(count)])
    slots = []
    for i, prompt in enumerate(prompts):
        plan, targets = book.prefill([prompt], SETTINGS[i % len(SETTINGS)])
        compare(runners, plan)
        slots += targets
    for _ in range(6):
        compare(runners, book.decode(slots))


def test_buckets_are_dense_and_end_at_the_most_rows() -> None:
    assert buckets_up_to(1) == (1,) and buckets_up_to(1, least=2) == (1,)
    assert buckets_up_to(20) == (1, 2, 4, 8, 16, 20) and buckets_up_to(20, least=2)[0] == 2
    assert buckets_up_to(256)[-3:] == (192, 224, 256)
    assert buckets_up_to(400)[-4:] == (256, 320, 384, 400)


def test_pages_end_and_begin(model: CausalLM) -> None:
    runners, book = both(model), Book()
    plan, slots = book.prefill(tiny_models.random_tokens([14, 15, 16, 17, 31, 32, 33]))
    compare(runners, plan)
    for _ in range(20):
        compare(runners, book.decode(slots))


def test_forks_share_pages_and_go_their_own_way(model: CausalLM) -> None:
    runners, book = both(model), Book()
    plan, slots = book.prefill(tiny_models.random_tokens([37, 32]), Sampling(temperature=1.5), forks=4)
    first = compare(runners, plan)
    assert len(set(tokens_of(first))) > 3
    for _ in range(18):
        compare(runners, book.decode(slots))
    # What one of them reads is what it would read alone.
    alone = Runner(model, 4096)
    solo = Book(seed=5)
    prompt = tiny_models.random_tokens([37, 32])[0]
    again, _ = solo.prefill([prompt], Sampling(temperature=1.5))
    alone.run(again)
    assert torch.allclose(page(alone, solo.tables, 0), page(runners[1], book.tables, 0), atol=1e-5)


def page(runner: Runner, tables: dict[int, list[int]], place: int) -> torch.Tensor:
    first = next(iter(tables.values()))[place]
    return torch.stack([keys[first * 16 : first * 16 + 16] for keys in runner.cache.keys])


def test_sequences_leave_and_others_take_their_places(model: CausalLM) -> None:
    runners, book = both(model), Book(slots=8, pages=24)
    plan, slots = book.prefill(tiny_models.random_tokens([20, 9, 3, 30]))
    compare(runners, plan)
    for turn in range(10):
        compare(runners, book.decode(slots))
        if turn % 3 == 0:
            book.leave(slots.pop(0))
            plan, targets = book.prefill(tiny_models.random_tokens([7 + 5 * turn], seed=turn))
            compare(runners, plan)
            slots = targets + slots


def test_rows_of_padding_touch_only_the_spare_page(model: CausalLM) -> None:
    runner, book = Runner(model, 256, static=True, buckets=(16,), max_running=16), Book(slots=16, pages=16)
    plan, slots = book.prefill(tiny_models.random_tokens([5, 6, 7]))
    runner.run(plan)
    for store in (*runner.cache.keys, *runner.cache.values):
        store.nan_to_num_()
        used = torch.zeros(len(store), dtype=torch.bool)
        for slot, length in book.contexts.items():
            used[[book.tables[slot][i // 16] * 16 + i % 16 for i in range(length + 1)]] = True
        store[:256][~used[:256]] = float("nan")
    result = runner.run(book.decode(slots))
    assert np.isfinite(float64(result.logprobs)).all()
    for store in (*runner.cache.keys, *runner.cache.values):
        assert int(store[:256].isfinite().all(-1).all(-1).sum()) == 5 + 6 + 7 + 3
        assert store[256:].isfinite().all()


def test_suppressed_ids_and_mixed_settings(model: CausalLM) -> None:
    runners, book = both(model), Book()
    slots = []
    for i, sampling in enumerate(SETTINGS):
        plan, targets = book.prefill(tiny_models.random_tokens([4 + i], seed=i), sampling)
        compare(runners, plan)
        slots += targets
    banned = {row: list(range(40)) for row in (0, 1, 4)}
    drawn = tokens_of(compare(runners, book.decode(slots, banned)))
    assert all(drawn[row] >= 40 for row in banned)


def test_ids_without_a_token_are_drawn_by_no_kind_of_step(model: CausalLM) -> None:
    hidden, slots, book = ((0, 20), (50, 67)), [], Book()
    plain, static = (Runner(model, 4096, max_running=64, static=way, tokenless=hidden) for way in (False, True))
    for i, sampling in enumerate(SETTINGS):
        plan, targets = book.prefill(tiny_models.random_tokens([4 + i], seed=i), sampling)
        compare((plain, static), plan)
        slots += targets
    for step in range(8):
        banned = {row: list(range(20, 40)) for row in (0, 1, 4)} if step % 2 else {}
        drawn = tokens_of(compare((plain, static), book.decode(slots, banned)))
        assert all(20 <= token < 50 for token in drawn) and all(drawn[row] >= 40 for row in banned)


def test_a_decode_step_that_is_none_of_the_usual_runs_all_the_same(model: CausalLM) -> None:
    runners, book = both(model), Book()
    plan, slots = book.prefill(tiny_models.random_tokens([5, 18]))
    compare(runners, plan)
    usual = book.decode(slots)
    first = np.array([0, 1], dtype=np.int32)
    reordered = {"sampled": first[::-1].tobytes(), "targets": np.array(slots[::-1], dtype=np.int32).tobytes()}
    values = {name: getattr(usual, name) for name in usual.__struct_fields__}
    compare(runners, StepPlan(**{**values, **reordered}))
    compare(runners, book.decode(slots))


def test_more_attention_than_there_is_room_for_runs_without_the_static_tensors(model: CausalLM) -> None:
    plain, static = both(model)
    assert static._state is not None
    static._state.most_splits = 2
    book = Book()
    plan, slots = book.prefill(tiny_models.random_tokens([300, 20]))
    compare((plain, static), plan)
    for _ in range(3):
        usual = book.decode(slots)
        assert not static._continues(usual, static._state)
        compare((plain, static), usual)


def test_steps_launched_ahead_are_collected_later_in_order(model: CausalLM) -> None:
    plain, static = both(model)
    book = Book()
    plan, slots = book.prefill(tiny_models.random_tokens([12, 15]), Sampling(temperature=1.0))
    plans = [plan, *(book.decode(slots) for _ in range(7))]
    expected = [plain.run(p) for p in plans]
    under_way = [static.launch(p) for p in plans[:3]]
    collected = []
    for p in plans[3:]:
        collected.append(static.collect(under_way.pop(0)))
        under_way.append(static.launch(p))
    collected += [static.collect(pending) for pending in under_way]
    for ours, reference in zip(collected, expected, strict=True):
        assert_same(ours, reference)
    # Every buffer is one of those under way at once, and serves again.
    assert len(static._idle) == 3
    assert static.statistics["steps"] == 8
    assert static.statistics["prefill_tokens"] == 27 and static.statistics["decode_tokens"] == 14
    assert static.statistics["decode_seconds"] > 0


def test_other_weights_take_over_with_the_pages_kept(model: CausalLM, tmp_path: Path) -> None:
    runners, book = both(model), Book()
    plan, slots = book.prefill(tiny_models.random_tokens([12, 15]))
    compare(runners, plan)
    compare(runners, book.decode(slots))
    other = model.copy_weights()
    with torch.no_grad():
        for parameter in other.base_parameters.values():
            parameter.mul_(1.1)
    before = compare(runners, book.decode(slots))
    for runner in runners:
        runner.rebind(other)
    after = compare(runners, book.decode(slots))
    assert float64(before.logprobs).tolist() != float64(after.logprobs).tolist()


@pytest.mark.parametrize("kv_tokens", [4096, 640])
def test_a_scheduler_that_plans_ahead_gets_the_same_answers(model: CausalLM, kv_tokens: int) -> None:
    requests = ragged_requests(40, 67)
    answers = []
    for static, depth in ((False, 0), (True, 2)):
        runner = Runner(model, kv_tokens, max_running=24, static=static)
        runner.depth = depth
        scheduler = Scheduler(
            kv_tokens=kv_tokens,
            max_positions=model.max_positions,
            vocab_size=model.vocab_size,
            version=lambda: 0,
            prefill_tokens=128,
            max_running=24,
            max_splits=runner.max_splits,
        )
        answers.append(serve(scheduler, runner, requests))
    plain, static_ones = answers
    assert plain.keys() == static_ones.keys() == requests.keys()
    for id, expected in plain.items():
        assert static_ones[id].tokens == expected.tokens
        assert static_ones[id].finish_reason == expected.finish_reason
        np.testing.assert_allclose(unpack_floats(static_ones[id].logprobs), unpack_floats(expected.logprobs), atol=1e-5)


def test_the_memory_plan_knows_what_decode_steps_work_on(tmp_path: Path) -> None:
    tiny_models.build(tmp_path, "llama")
    spec = ModelSpec.read(tmp_path)
    for kv_tokens in (256, 4096, 65_536):
        shape = Spawn(spec=spec, max_batch_tokens=64, kv_tokens=kv_tokens, device="cuda", dtype="float32")
        model = load_model(tmp_path, TensorParallel.single(), torch.device("cpu"), torch.float32)
        runner = Runner(model, kv_tokens, static=True)
        state = runner._state
        assert state is not None
        tensors = sum(map(size_of, (state.block_table, state.last, state.logits, state._inputs, state._outputs)))
        spare = sum(map(size_of, (*runner.cache.keys, *runner.cache.values))) - runner.cache.bytes
        scratch = 4 * (state.most_splits + MAX_RUNNING) * (4 * 8 + 4)
        held = memory.decode_bytes(shape) - memory._GRAPH_BYTES
        assert tensors + spare + scratch < held < tensors + spare + scratch + (2 << 20)
        without = memory.plan(structs.replace(shape, device="cpu"))
        assert memory.plan(shape).resident == without.resident + held + memory._GRAPH_BYTES


def size_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_promise_is_every_slot_of_every_layer_rounded_up_to_pages() -> None:
    cache = KVCache(100, num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.float32, device=CPU, block_size=16)
    assert cache.slots == 112
    assert cache.bytes == 2 * 3 * 112 * 2 * 8 * 4
    held = [*cache.keys, *cache.values]
    assert [tensor.shape for tensor in held] == [(112, 2, 8)] * 6
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == cache.bytes
    half = KVCache(100, num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.bfloat16, device=CPU, block_size=16)
    assert half.bytes == cache.bytes // 2


def test_layers_do_not_share_memory() -> None:
    cache = KVCache(32, num_layers=2, num_kv_heads=1, head_dim=4, dtype=torch.float32, device=CPU)
    for index, tensor in enumerate((*cache.keys, *cache.values)):
        tensor.fill_(index + 1)
    assert [tensor.unique().tolist() for tensor in (*cache.keys, *cache.values)] == [[1], [2], [3], [4]]


@pytest.mark.parametrize("deterministic", [False, True])
def test_memory_is_taken_when_tokens_are_written(deterministic: bool) -> None:
    before = resident()
    torch.use_deterministic_algorithms(deterministic)
    try:
        cache = KVCache(131_072, num_layers=4, num_kv_heads=8, head_dim=64, dtype=torch.float32, device=CPU)
    finally:
        torch.use_deterministic_algorithms(False)
    assert cache.bytes == 2 << 30
    assert resident() - before < 16 << 20
    slots = torch.arange(16_384)
    for tensor in (*cache.keys, *cache.values):
        tensor.index_copy_(0, slots, torch.ones(len(slots), 8, 64))
    grown = resident() - before
    written = 256 << 20
    assert 0.9 * written < grown < 1.3 * written
    assert float(cache.keys[3][20_000].abs().max()) == 0
    del cache, tensor
    assert resident() - before < 0.3 * grown


def test_what_the_system_cannot_give_is_an_error_with_the_size() -> None:
    with pytest.raises(ResourceError, match="bytes of address space") as caught:
        KVCache(1 << 50, num_layers=32, num_kv_heads=8, head_dim=128, dtype=torch.float32, device=CPU)
    assert caught.value.details["bytes"] == 2 * 32 * (1 << 50) * 8 * 128 * 4
