"""The closed-form plan: what it counts, what fits, and the ways out that it computes."""

from __future__ import annotations

from dataclasses import replace as replace_spec

import pytest
from msgspec.structs import replace

from harmony_core.errors import MemoryRefused
from harmony_core.memory.ledger import Ledger
from harmony_core.memory.plan import (
    BATCH_STEP,
    DEFAULT_KV_TOKENS,
    LOGITS_AT_ONCE,
    MAX_RUNNING,
    adapter_elements,
    choose_checkpointing,
    default_kv_tokens,
    kv_token_bytes,
    largest_batch,
    plan,
    ways_out,
    weight_elements,
)
from harmony_core.model.spec import ModelSpec
from harmony_core.rpc.protocol import LoraSettings, Spawn

SPEC = ModelSpec(
    architecture="LlamaForCausalLM",
    model_type="llama",
    vocab_size=1001,
    hidden_size=128,
    intermediate_size=384,
    num_layers=6,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    tied=False,
    max_positions=2048,
    stored_dtype="float32",
    num_parameters=0,
    attention_bias=False,
    qk_norm=False,
)
FULL = Spawn(spec=SPEC, train=True, private=True, max_batch_tokens=4096, kv_tokens=1000)
LORA = replace(FULL, lora=LoraSettings(), private=False)
SERVE = replace(FULL, train=False, private=False)
MIB = 1 << 20


def test_static_parts_are_elements_times_bytes() -> None:
    weights = weight_elements(SPEC, 1)
    attention, feed_forward, norms = 128 * (128 + 2 * 32) + 128 * 128, 3 * 128 * 384, 2 * 128
    assert weights == 6 * (attention + feed_forward + norms) + 2 * 1001 * 128 + 128
    found = plan(FULL)
    assert (found.weights, found.gradients, found.optimizer) == (4 * weights, 4 * weights, 8 * weights)
    assert found.kv == 1000 * 6 * 2 * 32 * 4 == 1000 * kv_token_bytes(FULL)
    assert found.total == sum(found.parts().values())


def test_cuda_takes_eighteen_bytes_a_parameter() -> None:
    found = plan(replace(FULL, device="cuda"))
    weights = weight_elements(SPEC, 1)
    assert found.weights == 2 * weights
    assert found.weights + found.gradients + found.optimizer == 18 * weights
    assert plan(replace(FULL, dtype="float64")).optimizer == 16 * weights


def test_four_norms_and_windows() -> None:
    four = replace_spec(SPEC, post_norms=True)
    assert weight_elements(four, 2) - weight_elements(SPEC, 2) == 6 * 2 * 128
    assert plan(replace(FULL, spec=four)).activations - plan(FULL).activations == 4096 * 6 * 2 * (2 * 128 + 1) * 4
    for window, masks in ((512, 4096 * 4096 * 4), (4096, 0)):
        windowed = replace_spec(SPEC, window=window, windowed_layers=5)
        assert plan(replace(FULL, spec=windowed)).total - plan(FULL).total == masks
        assert plan(replace(SERVE, spec=windowed)).total - plan(SERVE).total == masks
        assert plan(replace(FULL, spec=windowed, device="cuda")) == plan(replace(FULL, device="cuda"))


def test_an_adapter_trains_only_itself() -> None:
    adapter = adapter_elements(SPEC, LoraSettings(), 1)
    assert adapter == 6 * 16 * sum((128 + 128, 128 + 32, 128 + 32, 128 + 128, 128 + 384, 128 + 384, 384 + 128))
    found = plan(LORA)
    assert (found.adapter, found.gradients, found.optimizer) == (4 * adapter, 4 * adapter, 8 * adapter)
    assert found.weights == plan(FULL).weights
    assert plan(replace(LORA, train=False)).gradients == 0
    one_layer = LoraSettings(targets=("model.layers.0.self_attn.q_proj",))
    assert adapter_elements(SPEC, one_layer, 1) == 16 * 256
    assert adapter_elements(SPEC, LoraSettings(targets=("q_proj",)), 1) == 6 * 16 * 256


def test_a_scalar_head_takes_the_place_of_the_vocabulary() -> None:
    full = replace(FULL, kv_tokens=0, scalar=True)
    weights = weight_elements(SPEC, 1) - 1001 * 128 + 128
    found = plan(full)
    assert (found.weights, found.gradients, found.optimizer) == (4 * weights, 4 * weights, 8 * weights)
    assert found.kv == 0 and plan(replace(full, device="cuda")).decode == 0
    # Shared weights keep the head that policies need; beside an adapter there is one more matrix to train.
    lora, shared = replace(LORA, scalar=True), replace(SERVE, scalar=True)
    assert plan(lora).gradients - plan(LORA).gradients == 4 * 128
    assert (plan(lora).weights, plan(shared).weights) == (plan(LORA).weights, plan(SERVE).weights)
    assert plan(lora).workspace <= plan(LORA).workspace


def test_weights_on_the_ranks_already_count_nothing_unless_they_are_trained() -> None:
    assert plan(replace(LORA, weights_shared=True)).weights == 0
    assert plan(replace(SERVE, weights_shared=True)).weights == 0
    assert plan(replace(FULL, weights_shared=True)).weights == plan(FULL).weights


def test_tensor_parallel_ranks_hold_about_their_part() -> None:
    whole, half = plan(FULL), plan(replace(FULL, tp=2))
    for part in ("weights", "gradients", "optimizer", "kv"):
        assert getattr(half, part) <= 0.51 * getattr(whole, part), part
    # Two key-value heads over four ranks: projections whole, one head attended to.
    quarter = replace(FULL, tp=4)
    assert kv_token_bytes(quarter) == kv_token_bytes(FULL) // 2
    assert weight_elements(SPEC, 4) > weight_elements(SPEC, 1) / 4
    assert plan(quarter).total < half.total


def test_more_work_needs_more_memory_and_recomputing_less() -> None:
    totals = [plan(replace(FULL, max_batch_tokens=tokens)).total for tokens in (512, 1024, 4096, 16384)]
    assert totals == sorted(set(totals))
    by_layers = [plan(replace(FULL, checkpointed_layers=layers)).total for layers in range(6)]
    assert by_layers == sorted(by_layers, reverse=True) and by_layers[-1] < by_layers[0] / 2
    assert plan(replace(LORA, lora=LoraSettings(dropout=0.1))).activations > plan(LORA).activations
    assert plan(SERVE).total < plan(LORA).total < plan(FULL).total


LLAMA_8B = replace_spec(
    SPEC,
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
)


@pytest.mark.parametrize(("compiled", "most"), [(True, 6), (False, 15)])
def test_an_adapter_recomputes_only_what_does_not_fit(compiled: bool, most: int) -> None:
    """Layers of 8 billion parameters on a device of 80 GB: some keep their activations, more of them when compiled."""
    shape = Spawn(
        spec=LLAMA_8B, train=True, lora=LoraSettings(), max_batch_tokens=16_384, device="cuda", compile=compiled
    )
    free = 78 * 1024 * MIB
    chosen = choose_checkpointing(shape, free)
    assert 0 < chosen <= most
    assert plan(replace(shape, checkpointed_layers=chosen)).total <= free
    assert choose_checkpointing(replace(shape, max_batch_tokens=4096), free) == 0
    recomputed = replace(shape, checkpointed_layers=32)
    assert plan(replace(recomputed, compile=True)).total < plan(replace(recomputed, compile=False)).total


def test_the_head_on_a_device_stays_within_a_gibibyte() -> None:
    spec = replace_spec(SPEC, vocab_size=151_936, num_layers=1, hidden_size=8, intermediate_size=8)
    shape = Spawn(spec=spec, train=True, lora=LoraSettings(rank=1), max_batch_tokens=16_384, device="cuda")
    assert 850 * MIB < plan(shape).workspace <= 1024 * MIB
    assert plan(replace(shape, train=False)).workspace < 512 * MIB


@pytest.mark.parametrize(("vocabulary", "drawn"), [(20_000, MAX_RUNNING * 20_000), (151_936, LOGITS_AT_ONCE)])
@pytest.mark.parametrize(("dtype", "wide"), [("float32", 4), ("bfloat16", 4), ("float64", 8)])
def test_sampling_has_room_for_the_logits_of_every_sequence(vocabulary: int, drawn: int, dtype: str, wide: int) -> None:
    """The logits of a step, and nine times as much while top-p sorts them, as large as the widest model makes them."""
    spec = replace_spec(SPEC, vocab_size=vocabulary, num_layers=1, hidden_size=8, intermediate_size=8)
    shape = Spawn(spec=spec, max_batch_tokens=512, kv_tokens=1000, dtype=dtype)
    assert plan(shape).workspace == 10 * wide * drawn
    assert plan(replace(shape, kv_tokens=0)).workspace < 10 * wide * drawn / 4, "without pages it only scores"
    assert plan(replace(shape, train=True, lora=LoraSettings(rank=1))).workspace > 9 * wide * drawn


@pytest.mark.parametrize("shape", [FULL, LORA])
def test_as_few_layers_recompute_as_it_takes(shape: Spawn) -> None:
    for layers in range(6):
        needed = plan(replace(shape, checkpointed_layers=layers)).total
        chosen = choose_checkpointing(shape, needed)
        assert plan(replace(shape, checkpointed_layers=chosen)).total <= needed
        assert chosen == 0 or plan(replace(shape, checkpointed_layers=chosen - 1)).total > needed
    least = plan(replace(shape, checkpointed_layers=choose_checkpointing(shape, 1))).total
    assert least == min(plan(replace(shape, checkpointed_layers=layers)).total for layers in range(7))
    assert choose_checkpointing(SERVE, 1) == 0
    # What another model needs while it works is not lost to this one: they do not work at once.
    assert choose_checkpointing(shape, plan(shape).total, transient=plan(shape).transient) == 0


@pytest.mark.parametrize("shape", [FULL, LORA])
@pytest.mark.parametrize("free", [24 * MIB, 40 * MIB, 100 * MIB, 999 * MIB])
def test_the_largest_batch_fits_and_the_next_does_not(shape: Spawn, free: int) -> None:
    batch = largest_batch(shape, free)
    assert batch % BATCH_STEP == 0

    def least(tokens: int) -> int:
        return min(plan(replace(shape, max_batch_tokens=tokens, checkpointed_layers=n)).total for n in range(7))

    if batch:
        assert least(batch) <= free
    assert least(batch + BATCH_STEP) > free
    assert largest_batch(shape, 1000) == 0


def test_the_default_pool_is_what_is_left_up_to_the_default() -> None:
    rest = plan(replace(SERVE, kv_tokens=0))
    per_token = kv_token_bytes(SERVE)
    assert default_kv_tokens(SERVE, rest.total - 1) == 0
    tokens = default_kv_tokens(SERVE, 200 * MIB)
    assert 0 < tokens < DEFAULT_KV_TOKENS
    assert plan(replace(SERVE, kv_tokens=tokens)).total <= 200 * MIB
    assert plan(replace(SERVE, kv_tokens=tokens + 1)).total > 200 * MIB
    assert default_kv_tokens(SERVE, 10 * DEFAULT_KV_TOKENS * per_token) == DEFAULT_KV_TOKENS


def _apply(shape: Spawn, way: str) -> Spawn:
    name, _, value = way.partition("=")
    if " and " in way:
        for part in way.split(" and "):
            shape = _apply(shape, part)
        return shape
    changes = {
        "max_batch_size": lambda: replace(shape, max_batch_tokens=int(value)),
        "tp": lambda: replace(shape, tp=int(value), weights_shared=False),
        "with_adapter()": lambda: replace(shape, lora=LoraSettings()),
        "kv_cache_len": lambda: replace(shape, kv_tokens=int(value)),
    }
    return changes[name]()


@pytest.mark.parametrize("kv_tokens", [0, 4000, 40_000])
@pytest.mark.parametrize("megabytes", [16, 24, 32, 48, 64, 128])
def test_every_way_out_fits_by_itself(megabytes: int, kv_tokens: int) -> None:
    shape, free = replace(FULL, max_batch_tokens=32_768, kv_tokens=kv_tokens), megabytes * MIB
    for way in ways_out(shape, free, world=4):
        changed = _apply(shape, way)
        changed = replace(changed, checkpointed_layers=choose_checkpointing(changed, free))
        assert plan(changed).total <= free, way


def test_ways_out_name_what_helps() -> None:
    batch_helps = ways_out(replace(FULL, max_batch_tokens=65_536), 60 * MIB, world=4)
    assert any(way.startswith("max_batch_size=") for way in batch_helps)
    tight = replace(FULL, max_batch_tokens=1024, kv_tokens=0)
    assert [way.partition("=")[0] for way in ways_out(tight, 32 * MIB, world=4)] == [
        "max_batch_size",
        "tp",
        "with_adapter()",
    ]
    assert not any(way.startswith("tp=") for way in ways_out(tight, 32 * MIB, world=1))
    (both,) = ways_out(tight, 17 * MIB, world=1)
    assert both.startswith("with_adapter() and max_batch_size=")
    big_pool = replace(SERVE, kv_tokens=10**6)
    assert ways_out(big_pool, 200 * MIB, world=1)[-1].startswith("kv_cache_len=")
    assert ways_out(SERVE, 1000, world=1) == []


def test_with_adapter_may_share_weights_that_are_there() -> None:
    shape = replace(FULL, max_batch_tokens=512, kv_tokens=0)
    shared = plan(replace(shape, lora=LoraSettings(), weights_shared=True, checkpointed_layers=6)).total
    assert "with_adapter()" not in ways_out(shape, shared, world=1)
    assert "with_adapter()" in ways_out(shape, shared, world=1, base_live=True)


def test_one_limit_serves_refuses_full_training_and_takes_the_ways_out() -> None:
    full, adapter = replace(FULL, max_batch_tokens=1024), replace(LORA, max_batch_tokens=1024, weights_shared=True)
    book = Ledger(44 * MIB)
    book.promise("judge", plan(replace(SERVE, max_batch_tokens=1024)), weights_key="base")
    before = book.snapshot()

    def try_full(tokens: int) -> None:
        shape = replace(full, max_batch_tokens=tokens)
        shape = replace(shape, checkpointed_layers=choose_checkpointing(shape, book.free, book.transient))
        book.promise(
            "policy",
            plan(shape),
            ways_out=lambda free, transient: ways_out(shape, free, 2, transient, base_live=True),
        )

    with pytest.raises(MemoryRefused, match="promised to judge") as refusal:
        try_full(1024)
    assert "with_adapter()" in refusal.value.hint and "max_batch_size=" in refusal.value.hint
    assert book.snapshot() == before
    book.promise("policy", plan(_recomputing(adapter, book)), weights_key="base")
    book.release("policy")
    batch = int(refusal.value.hint.split("max_batch_size=")[1].split(";")[0])
    with pytest.raises(MemoryRefused):
        try_full(int(1.1 * batch) + 1)
    try_full(batch)


def _recomputing(shape: Spawn, book: Ledger) -> Spawn:
    return replace(shape, checkpointed_layers=choose_checkpointing(shape, book.free, book.transient))
