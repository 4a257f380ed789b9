"""The deterministic mode on its way to the ranks: where it is refused, and the whole of it once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from engines import LiveEngine, pairs, start_engine, stop_engine
from harmony_core.client import EngineOptions
from harmony_core.client.engine import find_machine
from harmony_core.errors import ModelRefused, ResourceError
from harmony_core.launch.launcher import AccelerateSettings, Launch, launch_environment
from harmony_core.options import RunOptions
from harmony_core.text.threads import StringThread, TokenizedThread

TINY = "builtin:tiny-lm"


def test_it_is_refused_on_cuda(tmp_path: Path) -> None:
    options = EngineOptions(log_dir=tmp_path, run_id="run", assume="1x80GiB", deterministic=True)
    with pytest.raises(ResourceError, match="for ranks on CPU") as caught:
        find_machine(options)
    assert caught.value.exit_code == 4
    assert "sampler_logprob" in caught.value.hint


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_it_is_refused_for_other_types(tmp_path: Path, dtype: str) -> None:
    engine = start_engine(tmp_path, 1, dry_run=True, deterministic=True)
    try:
        builder = engine.client.model(TINY).dtype(dtype)
        with pytest.raises(ModelRefused, match=dtype):
            engine.run(builder.spawn_inference("model"))
        engine.run(engine.client.model(TINY).spawn_inference("model"))
    finally:
        stop_engine(engine)


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_ranks_hear_of_it(tmp_path: Path, deterministic: bool) -> None:
    options = EngineOptions(log_dir=tmp_path, run_id="run", deterministic=deterministic)
    env = launch_environment(options, Launch("cpu", 1, AccelerateSettings()), {"OMP_NUM_THREADS": "4"})
    assert RunOptions.of_rank(env).deterministic == deterministic
    assert env["OMP_NUM_THREADS"] == ("1" if deterministic else "4")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_sampled_scored_and_trained_logprobs_are_equal(tmp_path: Path, ranks: int) -> None:
    engine = start_engine(tmp_path, ranks, deterministic=True)
    try:
        for regex in ("", "([a-f]|[0-9]+|xyz){20,40}"):
            sampled, scored, metrics = engine.run(a_step(engine, ranks, regex))
            assert len(sampled) > 200
            assert sampled == scored
            assert metrics["sampler_logprob_diff_max"] == 0.0
    finally:
        stop_engine(engine)


async def a_step(engine: LiveEngine, tp: int, regex: str) -> tuple[list[float], list[float], dict[str, float]]:
    """Completions of ragged prompts, their log-probs from sampler and scorer, and a step of training on them."""
    model = await engine.client.model(TINY).tp(tp).spawn_train(f"policy-{bool(regex)}", 256)
    model = model.constrained_decoding(regex, "regex") if regex else model
    prompts = [StringThread([thread.get_turns()[0]]) for thread in pairs(12, letters=9)]
    made: list[TokenizedThread] = await asyncio.gather(
        *(model.temperature(1.0).max_gen_len(8 + 3 * i).generate_tokens(prompt) for i, prompt in enumerate(prompts))
    )
    scored = await asyncio.gather(*(model.logprobs_per_token(thread) for thread in made))
    await asyncio.gather(*(model.train_language_modelling(thread) for thread in made))
    metrics = await model.optim_step(1e-3, 0.0, 1.0)
    sampled = [value for thread in made for value in thread.policy_logprobs or ()]
    return sampled, [value for values in scored for value in values], metrics
