"""The documented functions that train one sample by its tangents, on a live model."""

from __future__ import annotations

from typing import Any

import pytest

from engines import LiveEngine, pair
from harmony_core.algorithms.tangents import train_dpo_tangents, train_grpo_tangents, train_sft_tangents
from harmony_core.errors import NothingToTrain
from harmony_core.text.threads import StringThread


async def compared(engine: LiveEngine) -> list[tuple[dict[str, float], dict[str, float], dict[str, float]]]:
    """For SFT, GRPO, GSPO and DPO: metrics of the tangents, of their step, and of the step of the model's own loss."""
    builder = engine.client.model("builtin:tiny-lm", kv_cache_len=512, tokens_to_generate=8).dtype("float64")
    model = await builder.spawn_train("tangents", max_batch_size=256)

    async def step() -> dict[str, float]:
        return await model.optim_step(0.0, 0.0, 1e9)

    found: list[Any] = []
    thread, other = pair("q", "abc"), pair("q", "xyzxyz")
    metrics = await train_sft_tangents(model, thread)
    tangents = await step()
    await model.train_language_modelling(thread)
    found.append((metrics, tangents, await step()))

    completion = await model.generate_tokens(StringThread([("user", "q")]))
    then = [x - 0.3 for x in await model.logprobs_per_token(completion)]
    ref = [x + 0.2 for x in then]
    arguments = completion, then, ref, [1.5] * len(then), 0.1, 0.04
    metrics = await train_grpo_tangents(model, *arguments)
    tangents = await step()
    await model.train_grpo(*arguments)
    found.append((metrics, tangents, await step()))

    metrics = await train_grpo_tangents(model, *arguments[:3], [-1.5] * len(then), 0.1, 0.04, True)
    tangents = await step()
    await model.train_gspo(*arguments[:3], [-1.5], 0.1, 0.1, 0.04)
    found.append((metrics, tangents, await step()))

    metrics = await train_dpo_tangents(model, thread, other, -15.0, -28.0, 0.2)
    tangents = await step()
    await model.train_dpo(thread, other, -15.0, -28.0, 0.2)
    found.append((metrics, tangents, await step()))
    with pytest.raises(NothingToTrain):
        await train_sft_tangents(model, thread.with_weight_assistant_turns_from_index(1))
    await model.dealloc()
    return found


def test_each_is_the_step_of_the_models_own_loss(one_rank: LiveEngine) -> None:
    sft, grpo, gspo, dpo = one_rank.run(compared(one_rank))
    for _, tangents, native in (sft, grpo, gspo, dpo):
        assert tangents["grad_norm"] == pytest.approx(native["grad_norm"], rel=1e-6)
        assert tangents["grad_norm"] > 0
    assert sft[0]["loss"] == pytest.approx(sft[2]["loss"], rel=1e-6)
    assert sft[0]["num_tokens"] == sft[2]["num_tokens"] == 4
    assert grpo[0]["pg_clipfrac"] == grpo[2]["pg_clipfrac"] == 1.0
    assert grpo[0]["Dkl"] == pytest.approx(grpo[2]["Dkl"], rel=1e-5)
    assert gspo[0]["pg_clipfrac"] == gspo[2]["pg_clipfrac"] == 0.0
    assert dpo[0]["loss"] == pytest.approx(dpo[2]["loss"], rel=1e-6)
