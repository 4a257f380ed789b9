"""PPO without an engine: rewards, advantages, returns and the order of its phases."""

from __future__ import annotations

import asyncio
from statistics import fmean, pstdev
from typing import Any

import pytest

from fake_policy import FakeModel, length_grader, prompts
from harmony_core.algorithms import PPO
from harmony_core.algorithms.training import CosineScheduler
from harmony_core.errors import UsageError
from harmony_core.loggers import EventLogger
from harmony_core.returns import discounted_cumulative_rewards, gae_advantages


class Run:
    """One run over a fake policy and a fake value model, with its metrics."""

    def __init__(self, **options: Any) -> None:
        self.policy, self.value = FakeModel(), options.pop("value", None) or FakeModel(scalar=True)
        self.metrics: list[dict[str, Any]] = []
        logger = EventLogger(lambda type, data: self.metrics.append(data["metrics"]) if type == "metrics" else None)
        options = {"samples_per_batch": 8, "samples_per_mini_batch": 8, **options}
        dataset = options.pop("dataset", None) or prompts(8)
        models = self.policy.as_model(), self.value.as_model()
        self.training = PPO(dataset, *models, length_grader(), logger, **options)

    def go(self) -> dict[str, Any]:
        return asyncio.run(self.training.run())


def test_rewards_advantages_and_returns() -> None:
    run = Run(max_num_ppo_steps=1, value_only_fraction=0.0, kl_beta=0.3, gae_lambda=0.5, gae_gamma=0.9, clip_range=0.2)
    run.go()
    assert len(run.policy.trained) == len(run.value.trained) == 8
    assert [clone.freed for clone in run.policy.clones] == [True], "the reference is freed at the end"
    assert not run.policy.freed and not run.value.freed
    for (_, (logprobs, advantages, clip)), (_, (returns,)) in zip(run.policy.trained, run.value.trained, strict=True):
        count = len(logprobs)
        # The fake's reference gives -0.5 everywhere; the score is the completion's length, on its last token.
        rewards = [-0.3 * (logprob + 0.5) for logprob in logprobs]
        rewards[-1] += count
        assert advantages == pytest.approx(gae_advantages([0.25] * count, rewards, 0.5, 0.9))
        assert returns == pytest.approx(discounted_cumulative_rewards(rewards, 0.9))
        assert clip == 0.2


def test_whitened_advantages() -> None:
    """The same ones on the policy's scale; the value model's targets and the metrics stay."""
    options: dict[str, Any] = {"max_num_ppo_steps": 1, "value_only_fraction": 0.0, "samples_per_mini_batch": 4}
    plain, white = Run(**options), Run(**options, whiten_advantages=True)
    metrics = [run.go() for run in (plain, white)]
    raw, found = ([a for _, (_, given, _) in run.policy.trained for a in given] for run in (plain, white))
    assert fmean(found) == pytest.approx(0, abs=1e-12) and pstdev(found) == pytest.approx(1)
    assert found == pytest.approx([(a - fmean(raw)) / pstdev(raw) for a in raw])
    assert [targets for _, targets in plain.value.trained] == [targets for _, targets in white.value.trained]
    assert metrics[0]["advantages"] == metrics[1]["advantages"] == pytest.approx(fmean(raw))


def test_the_policy_waits_for_the_value_model() -> None:
    run = Run(max_num_ppo_steps=8, value_only_fraction=0.5, lr_policy=1e-3, lr_value=1e-2)
    run.go()
    assert len(run.value.steps) == 8
    # At 4/8 the policy's own schedule begins, at rate 0.
    schedule = CosineScheduler(1e-3)
    assert [lr for _, lr in run.policy.steps] == pytest.approx([schedule(x) for x in (0.25, 0.5, 0.75, 1.0)])
    assert [lr for _, lr in run.value.steps] == [CosineScheduler(1e-2)((k + 1) / 8) for k in range(8)]
    assert ["loss" in metrics for metrics in run.metrics] == [False] * 4 + [True] * 4
    assert all("value/loss" in metrics for metrics in run.metrics)


def test_documented_metrics() -> None:
    run = Run(max_num_ppo_steps=1, value_only_fraction=0.0)
    last = run.go()
    documented = """completion_percentage score_mean score_std kl_div advantages generation_length logprobs ref_logprobs
        returns kl_penalty explained_variance cumulative_reward rewards/score/mean loss lr value/loss value/lr"""
    assert set(documented.split()) <= set(last)
    assert last["cumulative_reward"] == pytest.approx(last["score_mean"] - last["kl_penalty"])


def test_mini_batches_of_both_models() -> None:
    run = Run(max_num_ppo_steps=2, value_only_fraction=0.0, samples_per_mini_batch=5, mini_epochs_per_batch=2)
    run.go()
    assert [size for size, _ in run.policy.steps] == [size for size, _ in run.value.steps] == [5, 3] * 4
    before, last = ({"loss", "lr", "completion_percentage"}, {"value/loss", "value/lr", "completion_percentage"})
    assert [set(m) for m in run.metrics[:6]] == [before] * 3 + [last] * 3
    assert "score_mean" in run.metrics[6] and len(run.metrics) == 14


def test_no_mini_batch_has_a_single_completion() -> None:
    run = Run(max_num_ppo_steps=1, value_only_fraction=0.0, samples_per_mini_batch=7)
    run.go()
    assert [size for size, _ in run.policy.steps] == [size for size, _ in run.value.steps] == [8]


def test_dropped_prompts_are_replaced() -> None:
    run = Run(dataset=prompts(10, frozenset({3})), epochs=1)
    run.go()
    assert [size for size, _ in run.value.steps] == [8, 1]
    assert sum(metrics.get("dropped/prompt_too_long", 0) for metrics in run.metrics) == 1


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="into_scoring_model"):
        Run(value=FakeModel(scalar=False), epochs=1)
    with pytest.raises(UsageError, match="samples_per_batch must be at least 1, got 0"):
        Run(epochs=1, samples_per_batch=0)
    with pytest.raises(UsageError, match="not that of a resumed run"):
        Run(epochs=1, checkpoint_restore_data={})

    class OtherTokenizer(FakeModel):
        async def tokenize(self, text: str) -> list[int]:
            return [1]

    with pytest.raises(UsageError, match="different tokenizers"):
        Run(value=OtherTokenizer(scalar=True), epochs=1).go()
