"""The engine on one CUDA device: attention, training, generation, adapters, and memory given back."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import LiveEngine, pair, pairs
from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.text.threads import StringThread
from tiny_models import FAMILIES, build, random_tokens, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TINY = "builtin:tiny-lm"
DEVICE = torch.device("cuda", 0)


def packed_losses(directory: Path, dtype: torch.dtype, sequences: list[list[int]]) -> tuple[torch.Tensor, Any]:
    model = load_model(directory, TensorParallel.single(), DEVICE, dtype)
    tokens = torch.tensor([t for s in sequences for t in s], device=DEVICE)
    positions = torch.cat([torch.arange(len(s), device=DEVICE) for s in sequences])
    lengths = tuple(len(s) for s in sequences)
    model.trainable_parameters(None)
    with forward_context(ForwardContext(PackedAttention(lengths))):
        logits = torch.nn.functional.linear(model.hidden_states(tokens, positions), model.head_weight).float()
        losses = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
        losses.mean().backward()
    return losses.detach(), {n: p.grad.float() for n, p in model.base_parameters.items() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_attention_on_the_device(family: str, tmp_path: Path) -> None:
    """fp32 against plain transformers sequence by sequence; bf16 (the variable-length kernel) against fp32."""
    directory = build(tmp_path, family, hidden=64, heads=4, kv_heads=2)
    sequences = random_tokens([5, 40, 1, 17])
    plain = reference(directory).to(DEVICE)
    expected = torch.cat([plain(torch.tensor([s], device=DEVICE)).logits[0].float() for s in sequences])
    ids = torch.tensor([t for s in sequences for t in s], device=DEVICE)
    expected_losses = torch.nn.functional.cross_entropy(expected[:-1], ids[1:], reduction="none").detach()
    exact, exact_gradients = packed_losses(directory, torch.float32, sequences)
    torch.testing.assert_close(exact, expected_losses, atol=1e-4, rtol=1e-4)
    rounded, rounded_gradients = packed_losses(directory, torch.bfloat16, sequences)
    assert (rounded - exact).abs().mean() < 0.05
    for name, gradient in exact_gradients.items():
        error = (rounded_gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert error < 0.15, (name, float(error))


def test_greedy_in_fp32_equals_transformers(cuda: LiveEngine) -> None:
    async def work() -> list[list[int]]:
        model = await cuda.client.model(TINY, kv_cache_len=4096).dtype("float32").spawn_inference("greedy")
        asked = [StringThread([("user", f"say {i} please"[: 5 + i])]) for i in range(6)]
        threads = await asyncio.gather(*(model.temperature(0).max_gen_len(24).generate_tokens(q) for q in asked))
        for thread in threads:
            scored = await model.logprobs_per_token(thread)
            assert scored == pytest.approx(thread.logprobs, abs=1e-4)
        await model.dealloc()
        return [[*t.token_ids, t.len_last_turn()] for t in threads]

    plain = reference(cuda.registry.resolve(TINY).path).to(DEVICE)
    for *ids, completed in cuda.run(work()):
        prompt = torch.tensor([ids[:-completed]], device=DEVICE)
        expected = plain.generate(prompt, do_sample=False, max_new_tokens=24, eos_token_id=3)[0].tolist()
        assert ids == expected


@pytest.mark.parametrize("adapter", [False, True])
def test_training_in_bf16_learns_and_agrees_with_fp32(cuda: LiveEngine, adapter: bool) -> None:
    async def curve(dtype: str) -> list[float]:
        builder = cuda.client.model(TINY, kv_cache_len=1024).dtype(dtype).with_adapter(adapter)
        model = await builder.spawn_train(f"curve-{dtype}", 1024)
        losses = []
        for _ in range(30):
            await asyncio.gather(*(model.train_language_modelling(t) for t in pairs(48)))
            losses.append((await model.optim_step(3e-3, 0.0, 1.0))["loss"])
        ref = await model.save(f"saved-{dtype}")
        thread = pair("say 3", "bbbb3")
        ours = await model.logprobs(thread)
        again = await cuda.client.model(ref, kv_cache_len=512).dtype(dtype).spawn_inference("again")
        assert await again.logprobs(thread) == pytest.approx(ours, abs=1e-3 if dtype == "float32" else 0.2)
        await again.dealloc()
        await model.dealloc()
        return losses

    exact, rounded = cuda.run(curve("float32")), cuda.run(curve("bfloat16"))
    assert exact[-1] < exact[0] - 0.5
    assert max(abs(a - b) for a, b in zip(exact, rounded, strict=True)) < 0.1
    print(json.dumps({"adapter": adapter, "fp32": exact[-1], "bf16": rounded[-1]}))


def test_sampler_and_trainer_agree_in_bf16(cuda: LiveEngine) -> None:
    async def work() -> None:
        model = await cuda.client.model(TINY, kv_cache_len=65_536).spawn_inference("bf16")
        asked = [StringThread([("user", f"question {i}")]) for i in range(256)]
        threads = await asyncio.gather(*(model.max_gen_len(32).generate_tokens(q) for q in asked))
        gaps = []
        for thread in threads:
            scored = await model.logprobs_per_token(thread)
            gaps += [abs(a - b) for a, b in zip(scored, thread.logprobs or [], strict=True)]
        assert math.fsum(gaps) / len(gaps) < 0.02
        print(json.dumps({"mean_abs_logprob_gap": math.fsum(gaps) / len(gaps), "tokens": len(gaps)}))
        await model.dealloc()

    cuda.run(work())


def test_spawning_again_and_again_returns_the_memory(cuda: LiveEngine) -> None:
    async def work() -> None:
        before = cuda.client.memory()
        for round_ in range(6):
            model = await cuda.client.model(TINY, kv_cache_len=200_000).spawn_train(f"round-{round_}", 4096)
            await asyncio.gather(*(model.train_language_modelling(t) for t in pairs(16)))
            await model.optim_step(1e-3, 0.0, 1.0)
            await model.dealloc()
        assert cuda.client.memory() == before

    cuda.run(work())
