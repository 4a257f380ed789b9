"""Scalar heads on a CUDA device learn what they learn on the CPU; a state taken back is the one that was kept."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import LiveEngine, pair, pairs
from harmony_core.client import TrainingModel
from harmony_core.text.threads import StringThread

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TINY = "builtin:tiny-lm"
THREADS = [pair(f"say {i}", "abc"[i % 3] * (1 + i % 5)) for i in range(24)]


async def value_step(model: TrainingModel, loss: str, lr: float) -> dict[str, float]:
    """An optimizer step on all threads: the value is the answer's length, and longer answers are preferred."""
    if loss == "ranking":
        longer = sorted(THREADS, key=lambda thread: len(thread.last_content()))
        await asyncio.gather(*(model.train_ranking(a, b) for a, b in zip(longer[12:], longer[:12], strict=True)))
    else:
        lengths = [float(len(thread.last_content())) for thread in THREADS]
        await asyncio.gather(*(model.train_mse(t, length) for t, length in zip(THREADS, lengths, strict=True)))
    return await model.optim_step(lr, 0.0, 1.0)


async def trained_values(engine: LiveEngine, loss: str, dtype: str, adapter: bool) -> tuple[list[float], list[float]]:
    """The losses of some steps, and what the model says of each thread after the first eight."""
    builder = engine.client.model(TINY).into_scoring_model().dtype(dtype).with_adapter(adapter)
    model = await builder.spawn_train(f"values-{dtype}", 512)
    losses = [(await value_step(model, loss, 3e-3))["loss"] for _ in range(8)]
    scored = [await model.score_last_token(thread) for thread in THREADS]
    tokenized = [await model.tokenize_thread(thread) for thread in THREADS]
    each = [await model.score(thread) for thread in tokenized]
    assert [len(values) for values in each] == [len(thread.last_content() or []) for thread in tokenized]
    losses += [(await value_step(model, loss, 3e-3))["loss"] for _ in range(12)]
    await model.dealloc()
    return losses, scored


@pytest.mark.parametrize(("loss", "adapter"), [("mse", False), ("ranking", True)])
def test_scalar_heads(cuda: LiveEngine, one_rank: LiveEngine, loss: str, adapter: bool) -> None:
    """Late steps amplify rounding: of those only that they have learned is asked."""
    on_cpu, said = one_rank.run(trained_values(one_rank, loss, "float32", adapter))
    exact, others = cuda.run(trained_values(cuda, loss, "float32", adapter))
    assert exact[:8] == pytest.approx(on_cpu[:8], rel=1e-2) and others == pytest.approx(said, abs=0.05)
    rounded, _ = cuda.run(trained_values(cuda, loss, "bfloat16", adapter))
    assert rounded[:3] == pytest.approx(exact[:3], rel=5e-2)
    for losses in (exact, rounded):
        assert min(losses[-3:]) < 0.15 * losses[0]


async def digest(model: TrainingModel, folder: Path) -> str:
    """sha256 over the stored weights and the optimizer's state."""
    folder.mkdir(parents=True)
    await model.state().save(folder)
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()


@pytest.mark.parametrize(("adapter", "scalar"), [(False, False), (True, False), (False, True)])
def test_a_state_taken_back_has_the_same_bits_and_goes_on_alike(
    cuda: LiveEngine, tmp_path: Path, adapter: bool, scalar: bool
) -> None:
    """Weights, moments and masters, counters, the dropout's and the requests' seeds."""

    async def spawn() -> TrainingModel:
        builder = cuda.client.model(TINY, kv_cache_len=1024)
        builder = builder.with_adapter(dropout=0.1) if adapter else builder
        return await (builder.into_scoring_model() if scalar else builder).spawn_train("kept", 512)

    async def step(model: TrainingModel) -> dict[str, float]:
        if scalar:
            return await value_step(model, "mse", 1e-3)
        await asyncio.gather(*(model.train_language_modelling(thread) for thread in pairs(24)))
        return await model.optim_step(1e-3, 0.01, 1.0)

    async def drawn(model: TrainingModel) -> Any:
        if scalar:
            return await model.score_last_token(THREADS[0])
        thread = await model.max_gen_len(16).generate_tokens(StringThread([("user", "say 5")]))
        return thread.token_ids

    async def work() -> None:
        model = await spawn()
        for _ in range(3):
            await step(model)
        await drawn(model)
        numbers, steps = model.state().request_numbers, model.get_optim_step()
        kept = await digest(model, tmp_path / "kept")
        said, after = await drawn(model), await step(model)
        await model.dealloc()

        other = await spawn()
        await other.state().load(tmp_path / "kept", steps)
        other.state().set_request_numbers(numbers)
        assert await digest(other, tmp_path / "again") == kept
        assert await drawn(other) == said
        again = await step(other)
        assert await digest(other, tmp_path / "later") != kept
        await other.dealloc()
        assert again["step"] == after["step"] == 4
        for name in ("loss", "grad_norm"):
            assert again[name] == pytest.approx(after[name], rel=1e-3), name

    cuda.run(work())
