"""GRPO and GSPO without an engine: batches, order, advantages, what is dropped and what is counted."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from fake_policy import FakeModel, length_grader, prompts, questions
from harmony_core.algorithms import GRPO, GSPO
from harmony_core.algorithms.training import CosineScheduler
from harmony_core.data.datasets import DataSet
from harmony_core.errors import DataError, IgnoreGradeException, RankDied, TooManyFailures, UsageError
from harmony_core.graders import BaseGrader
from harmony_core.journal import kept
from harmony_core.loggers import EventLogger, StdoutLogger
from harmony_core.text.threads import StringThread

SMALL: dict[str, Any] = {"completions_per_sample": 4, "samples_per_batch": 16, "samples_per_mini_batch": 16}


class Run:
    """One run over a fake model, with its metrics."""

    def __init__(self, dataset: list[StringThread], cls: type[GRPO] = GRPO, **options: Any) -> None:
        self.model: FakeModel = options.pop("model", None) or FakeModel()
        self.metrics: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        grader = options.pop("grader", None) or length_grader()
        self.training = cls(dataset, self.model.as_model(), grader, EventLogger(self._log), **{**SMALL, **options})

    def _log(self, type: str, data: dict[str, Any]) -> None:
        if type == "metrics":
            self.metrics.append(data["metrics"])
        else:
            self.config = data

    def go(self) -> dict[str, Any]:
        return asyncio.run(self.training.run())


def test_steps_rates_and_metrics() -> None:
    run = Run(prompts(8), max_num_grpo_steps=3, lr=1e-3)
    last = run.go()
    schedule = CosineScheduler(1e-3)
    assert run.model.steps == [(16, schedule(1 / 3)), (16, schedule(2 / 3)), (16, schedule(1.0))]
    assert [metrics["completion_percentage"] for metrics in run.metrics] == pytest.approx([1 / 3, 2 / 3, 1.0])
    documented = """completion_percentage percentage_no_advantages score_mean score_std kl_div advantages
        generation_length logprobs ref_logprobs rewards/score/mean rewards/score/count loss lr"""
    assert set(documented.split()) <= set(run.metrics[0])
    assert last == run.metrics[-1]
    first = run.metrics[0]
    # Sixteen completions, number n with 1 + n % 5 tokens and as many points, and log-probs -0.1, -0.2, ...
    lengths = [1 + n % 5 for n in range(1, 17)]
    assert first["score_mean"] == first["generation_length"] == sum(lengths) / 16 == first["rewards/score/mean"]
    assert first["rewards/score/count"] == 16
    assert first["percentage_truncated"] == lengths.count(5) / 16
    tokens = [-0.1 * (i + 1) for length in lengths for i in range(length)]
    assert first["logprobs"] == pytest.approx(sum(tokens) / len(tokens))
    assert first["ref_logprobs"] == -0.5
    assert first["kl_div"] == pytest.approx(first["logprobs"] + 0.5)
    assert first["score_std"] == pytest.approx((sum((x - first["score_mean"]) ** 2 for x in lengths) / 16) ** 0.5)
    assert run.config["algorithm"] == "GRPO" and run.config["samples"] == 8 and run.config["kl_beta"] == 0.01


def test_what_a_sample_is_trained_with() -> None:
    run = Run(prompts(4), max_num_grpo_steps=1, clip_range=0.3, kl_beta=0.2)
    run.go()
    by_question: dict[str, list[tuple[Any, ...]]] = {}
    for question, arguments in run.model.trained:
        by_question.setdefault(question, []).append(arguments)
    assert len(by_question) == 4
    for group in by_question.values():
        scores = [len(logprobs) for logprobs, *_ in group]
        mean = sum(scores) / 4
        std = (sum((score - mean) ** 2 for score in scores) / 4) ** 0.5
        for score, (logprobs, ref, advantages, clip, beta) in zip(scores, group, strict=True):
            assert logprobs == pytest.approx([-0.1 * (i + 1) for i in range(score)])
            assert ref == [-0.5] * score
            assert advantages == pytest.approx([(score - mean) / (std + 1e-8)] * score)
            assert (clip, beta) == (0.3, 0.2)
    assert run.model.scored == [], "the policy's log-probs are the sampler's"
    assert len(run.model.clones[0].scored) == 16
    assert run.model.clones[0].freed


def test_gspo_gives_one_advantage_and_the_clip_twice() -> None:
    run = Run(prompts(4), GSPO, max_num_gspo_steps=1)
    run.go()
    for _, (logprobs, ref, advantage, left, right, beta) in run.model.trained:
        assert len(advantage) == 1 and len(ref) == len(logprobs)
        assert (left, right, beta) == (0.01, 0.01, 0.01)
    assert run.config["algorithm"] == "GSPO"
    assert run.training.stage_notifier.stage_name == "GSPO Training"


def test_prompts_are_taken_in_the_order_of_the_dataset() -> None:
    dataset = prompts(8)
    run = Run(dataset, epochs=1, data_seed=5)
    run.go()
    order = [thread.last_content() for thread in DataSet(dataset, seed=5)]
    assert run.model.generated == [question for question in order for _ in range(4)]


def test_samples_are_trained_in_the_mini_batches_order_and_that_is_the_same_in_every_run() -> None:
    first, second, other = (Run(prompts(8), epochs=2, data_seed=seed) for seed in (1, 1, 2))
    for run in (first, second, other):
        run.go()
    assert first.model.trained == second.model.trained
    assert first.model.trained != other.model.trained
    # Shuffled: a prompt's completions are not all in a row.
    assert questions(first.model.trained[:16]) != sorted(questions(first.model.trained[:16]))


def test_mini_batches_are_steps_and_those_before_the_last_are_logged() -> None:
    run = Run(prompts(4), max_num_grpo_steps=2, samples_per_mini_batch=6, mini_epochs_per_batch=2)
    run.go()
    assert [size for size, _ in run.model.steps] == [6, 6, 4] * 4
    assert len({lr for _, lr in run.model.steps[:6]}) == 1, "one rate for a batch"
    assert [set(m) == {"loss", "lr", "completion_percentage"} for m in run.metrics] == ([True] * 5 + [False]) * 2
    trained = Counter(questions(run.model.trained[:32]))
    assert set(trained.values()) == {8}, "each completion twice"


def test_log_probs_of_an_older_policy_are_computed_anew() -> None:
    class Stale(FakeModel):
        def get_optim_step(self) -> int:
            return super().get_optim_step() + 1

    run = Run(prompts(4), model=Stale(), max_num_grpo_steps=1)
    run.go()
    assert len(run.model.scored) == 16
    assert all(set(logprobs) == {-0.5} for _, (logprobs, *_) in run.model.trained)


def test_without_a_divergence_term_there_is_no_reference() -> None:
    run = Run(prompts(4), max_num_grpo_steps=1, kl_beta=0.0)
    run.go()
    assert run.model.clones == []
    assert "ref_logprobs" not in run.metrics[0] and "kl_div" not in run.metrics[0]
    assert all(logprobs == ref for _, (logprobs, ref, *_) in run.model.trained)


def test_prompts_that_fail_are_dropped_counted_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    def judge(thread: StringThread) -> None:
        question = thread.messages()[0][1]
        if question == "short-1":
            raise IgnoreGradeException
        if question == "short-2":
            raise KeyError("no answer")

    run = Run(prompts(16, frozenset({5})), grader=length_grader(judge), epochs=1, data_seed=3)
    run.go()
    assert [size for size, _ in run.model.steps] == [16, 16, 16, 4], "16 prompts, 3 of them dropped"
    dropped = {key: sum(m.get(key, 0) for m in run.metrics) for m in run.metrics for key in m if "dropped" in key}
    assert dropped == {"dropped/grade_ignored": 1, "dropped/grade_failed": 1, "dropped/prompt_too_long": 1}
    assert not {"short-1", "short-2", "long-5"} & set(questions(run.model.trained))
    assert "dropped 3 of 16 samples" in caplog.text


def test_completions_are_capped_at_what_is_trained_and_none_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(prompts(12), model=FakeModel(max_batch_size=7), epochs=1)
    run.go()
    assert [size for size, _ in run.model.steps] == [16] * 3
    assert max(len(logprobs) for _, (logprobs, *_) in run.model.trained) == 4
    # Of five completions one wants to be longer, and one ends there by itself.
    assert run.metrics[0]["percentage_truncated"] == 6 / 16
    assert len([r for r in caplog.records if "capped at max_batch_size=7" in r.getMessage()]) == 1
    caplog.clear()
    Run(prompts(4), model=FakeModel(max_batch_size=8), epochs=1).go()
    assert "capped" not in caplog.text


def test_dropped_prompts_never_cost_a_step_when_steps_are_counted() -> None:
    run = Run(prompts(10, frozenset({0, 7})), max_num_grpo_steps=5)
    run.go()
    assert [size for size, _ in run.model.steps] == [16] * 5
    assert run.training.loader.dropped["prompt_too_long"] >= 2
    assert run.metrics[-1]["completion_percentage"] == 1.0


def test_prompts_that_are_too_long_never_end_the_run() -> None:
    run = Run(prompts(16, frozenset(range(14))), max_num_grpo_steps=3)
    run.go()
    assert [size for size, _ in run.model.steps] == [16] * 3
    run = Run(prompts(16, frozenset(range(16))), max_num_grpo_steps=3)
    with pytest.raises(DataError, match=r"a whole pass .* nothing: 16 prompt_too_long"):
        run.go()


def test_a_grader_that_fails_on_many_rows_does_not_end_the_run_and_one_that_always_fails_does() -> None:
    def some(thread: StringThread) -> None:
        if int(thread.messages()[0][1].split("-")[1]) < 9:
            raise KeyError("no answer")

    def every(thread: StringThread) -> None:
        raise KeyError("no answer")

    run = Run(prompts(16), grader=length_grader(some), max_num_grpo_steps=3, max_failure_rate=0)
    run.go()
    assert [size for size, _ in run.model.steps] == [16] * 3
    with pytest.raises(TooManyFailures, match=r"the last 64 grades all failed; .* raised KeyError: 'no answer'"):
        Run(prompts(64), grader=length_grader(every), max_num_grpo_steps=100).go()
    with pytest.raises(DataError, match=r"a whole pass .* nothing: 4 grade_failed"):
        Run(prompts(4), grader=length_grader(every), max_num_grpo_steps=3).go()


@pytest.mark.parametrize("cls", [GRPO, GSPO])
def test_an_unscored_completion_leaves_its_group_and_nothing_else(cls: type[Any]) -> None:
    """Of each way in which a grade fails: counted by its reason, never 0, and the others' advantages have mean 0."""
    calls = iter(range(10**6))

    async def grade(thread: StringThread) -> float:
        way = next(calls) % 12
        if way == 1:
            raise KeyError("no answer")
        if way == 4:
            await asyncio.Event().wait()
        if way == 7:
            return float("nan")
        if way == 8:
            return "1.0"  # type: ignore[return-value]
        if way == 10:
            raise IgnoreGradeException
        return 100.0 + len(thread.last_content())

    grader = BaseGrader.from_function("poisoned", grade)
    grader.timeout = 0.05
    run = Run(prompts(32), cls=cls, grader=grader, **{f"max_num_{cls.__name__.lower()}_steps": 3})
    run.go()
    seen = [metrics for metrics in run.metrics if "rewards/unscored" in metrics]
    totals = Counter({key: sum(m.get(key, 0) for m in seen) for m in seen for key in m if "unscored/" in key})
    assert {key.rpartition("/")[2] for key in totals} == {"grade_failed", "grade_ignored", "grade_timed_out"}
    assert all(0.3 < metrics["rewards/unscored_rate"] < 0.6 for metrics in seen)
    assert all(metrics["score_mean"] > 100 for metrics in seen), "none counts as 0"
    assert all(abs(metrics["advantages"]) < 1e-9 for metrics in seen)
    assert not any("dropped" in key for metrics in seen for key in metrics), "two of four are left"


def test_an_engine_error_in_a_grader_ends_the_run() -> None:
    def judge(thread: StringThread) -> None:
        raise RankDied("rank 0 is gone")

    with pytest.raises(RankDied):
        Run(prompts(4), grader=length_grader(judge), epochs=1).go()


def test_equal_scores_are_trained_and_counted() -> None:
    run = Run(prompts(4), max_num_grpo_steps=1, completions_per_sample=5, samples_per_batch=15)
    run.go()
    assert run.metrics[0]["percentage_no_advantages"] == 0.0
    grader: Any = BaseGrader.from_function("same", lambda thread: 2.0)
    run = Run(prompts(4), max_num_grpo_steps=1, grader=grader)
    run.go()
    assert run.metrics[0]["percentage_no_advantages"] == 1.0
    assert run.model.steps[0][0] == 16
    assert all(set(advantages) == {0.0} for _, (_, _, advantages, _, _) in run.model.trained)


def test_a_last_assistant_turn_is_no_part_of_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    threads = [StringThread([("user", f"q{i}"), ("assistant", "known")], {"k": i}) for i in range(4)]
    run = Run(threads, max_num_grpo_steps=1)
    run.go()
    assert set(run.model.generated) == {"q0", "q1", "q2", "q3"}
    assert "4 of 4 prompts end with an assistant turn" in caplog.text


def test_each_completion_has_metadata_of_its_own() -> None:
    seen: list[dict[str, Any]] = []

    def judge(thread: StringThread) -> None:
        thread.metadata["graded"] = thread.metadata.get("graded", 0) + 1
        seen.append(thread.metadata)

    dataset = prompts(4, key="value")
    Run(dataset, grader=length_grader(judge), max_num_grpo_steps=1).go()
    assert len(seen) == 16 and {metadata["graded"] for metadata in seen} == {1}
    assert {metadata["key"] for metadata in seen} == {"value"}
    assert "graded" not in dataset[0].metadata


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "either a number of epochs or a number of steps"),
        ({"epochs": 1, "max_num_grpo_steps": 2}, "either a number of epochs or a number of steps"),
        ({"max_num_grpo_steps": 0}, "steps must be at least 1"),
        ({"epochs": 1, "completions_per_sample": 0}, "completions_per_sample must be at least 2, got 0"),
        ({"epochs": 1, "completions_per_sample": 1}, "completions_per_sample must be at least 2, got 1"),
        ({"epochs": 1, "samples_per_batch": 3}, r"samples_per_batch \(3\) .* holds not one prompt's 4"),
        ({"epochs": 1, "samples_per_batch": 0}, "holds not one prompt's 4"),
        ({"epochs": 1, "completions_per_sample": 17}, "holds not one prompt's 17"),
        ({"epochs": 1, "samples_per_mini_batch": 0}, "samples_per_mini_batch"),
        ({"epochs": 1, "mini_epochs_per_batch": 0}, "mini_epochs_per_batch"),
        ({"epochs": 1, "checkpoint_restore_data": {}}, "not that of a resumed run"),
        ({"epochs": 1, "checkpoint_frequency": 0}, "checkpoint_frequency"),
        ({"epochs": 1, "loss_options": {"clip_higher": 0.3}}, "takes no 'clip_higher'"),
        ({"epochs": 1, "use_tangents": True, "loss_options": {"dual_clip": 3.0}}, "loss_options"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        Run(prompts(4), **options)


@pytest.mark.parametrize("cls", [GRPO, GSPO])
def test_a_batch_holds_whole_groups_and_says_which_sizes_do(cls: type[GRPO], caplog: pytest.LogCaptureFixture) -> None:
    steps = "max_num_gspo_steps" if cls is GSPO else "max_num_grpo_steps"
    run = Run(prompts(4), cls, samples_per_batch=11, **{steps: 2})
    run.go()
    assert [size for size, _ in run.model.steps] == [8, 8]
    (told,) = [record.message for record in caplog.records if "samples_per_batch" in record.message]
    assert "samples_per_batch=11" in told and "completions_per_sample=4" in told and told.endswith("are 8 and 12")
    caplog.clear()
    for fits in (8, 12):
        Run(prompts(4), cls, samples_per_batch=fits, **{steps: 1}).go()
    assert "samples_per_batch" not in caplog.text
    with pytest.raises(UsageError, match="completions_per_sample must be at least 2"):
        Run(prompts(4), cls, completions_per_sample=1, **{steps: 1})


def test_no_mini_batch_has_a_single_completion() -> None:
    run = Run(prompts(4), max_num_grpo_steps=1, samples_per_mini_batch=5, mini_epochs_per_batch=2)
    run.go()
    assert [size for size, _ in run.model.steps] == [5, 5, 6] * 2
    assert set(Counter(questions(run.model.trained)).values()) == {8}


def test_no_prompts_are_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        Run([], epochs=1)


def test_the_runs_report_is_told_phases_samples_and_drops() -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    with kept(lambda type, data: told.append((type, data))):
        Run(prompts(20, frozenset({3})), epochs=1).go()
    phases = {data["name"] for type, data in told if type == "phase"}
    assert phases == {"rollout", "grading", "reference", "training", "optimizer"}
    assert [data["reasons"] for type, data in told if type == "samples.dropped"] == [{"prompt_too_long": 1}]
    samples = [data for type, data in told if type == "sample"]
    assert [sample["step"] for sample in samples] == [step for step in (1, 2, 3, 4, 5) for _ in range(4)]
    assert {"reward", "advantage"} <= set(samples[0])
    role, pieces = samples[0]["turns"][1]["role"], samples[0]["turns"][1]["pieces"]
    assert role == "assistant" and len(pieces) == samples[0]["reward"]
    assert pieces[0] == ["x", 1.0, -0.1], "a token, its weight, its log-prob"


def test_any_logger_s_metrics_reach_the_run_s_report_once() -> None:
    """Also those of a logger that knows nothing of runs, and of none given."""
    found = []
    for logger in (None, StdoutLogger(), "events"):
        events: list[tuple[str, dict[str, Any]]] = []

        def write(type: str, data: dict[str, Any], events: list[tuple[str, dict[str, Any]]] = events) -> None:
            events.append((type, data))

        with kept(write):
            given = EventLogger(write) if isinstance(logger, str) else logger
            policy, grader = FakeModel().as_model(), length_grader()
            asyncio.run(GRPO(prompts(8), policy, grader, given, epochs=1, **SMALL).run())
        found.append([(type, data) for type, data in events if type.startswith("metrics")])
    assert [type for type, _ in found[0]] == ["metrics.config", "metrics", "metrics"]
    assert found[0] == found[1] == found[2]
    assert found[0][2][1]["step"] == 2 and found[0][2][1]["metrics"]["loss"] == 1.0
