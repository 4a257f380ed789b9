"""Completions of prompts, with their scores and log-probs: what a reinforcement-learning step trains on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from statistics import fmean
from typing import TYPE_CHECKING, Any

from harmony_core.algorithms.showing import show_sample
from harmony_core.algorithms.tangents import recorded_logprobs
from harmony_core.errors import SampleTooLong, UsageError
from harmony_core.graders import BaseGrader, score_or_refuse
from harmony_core.journal import phase
from harmony_core.mapping import async_map
from harmony_core.thread_tools import repeat_thread
from harmony_core.threads import StringThread, TokenizedThread

if TYPE_CHECKING:
    from harmony_core.client import InferenceModel, TrainingModel

log = logging.getLogger(__name__)

SHOWN = 4
"""Completions of one step in the run's report."""


@dataclass(frozen=True)
class Completion:
    """One scored completion; lists have one number for each generated token.

    `logprobs` are those under which it was drawn, at temperature 1; `ref_logprobs` the reference model's, the same
    numbers again where there is no reference model.
    """

    thread: TokenizedThread
    text: StringThread
    score: float
    logprobs: list[float]
    ref_logprobs: list[float]

    @cached_property
    def kl_div(self) -> list[float]:
        """logprob - ref_logprob of each token."""
        return [now - ref for now, ref in zip(self.logprobs, self.ref_logprobs, strict=True)]

    @property
    def truncated(self) -> bool:
        """Whether it ended for its length, not by itself."""
        return self.thread.generation is not None and self.thread.generation.finish_reason == "length"


class Rollout:
    """Generates completions with a policy, and scores them with a grader and a reference model (None: without one)."""

    def __init__(self, policy: TrainingModel, reference: InferenceModel | None, grader: BaseGrader[Any]) -> None:
        self.policy = policy
        self.reference = reference
        self.grader = grader
        self._limit = policy.get_builder_args().get("max_batch_size")
        self._shown: set[int] = set()

    async def group(self, prompt: StringThread, count: int) -> list[Completion]:
        """`count` completions of one prompt. A failure of any of them is the prompt's.

        Raises PromptTooLong, SampleTooLong, TokenizationError, GradeFailed, IgnoreGradeException.
        """
        with phase("rollout"):
            threads = await async_map(self.policy.generate_tokens, list(islice(repeat_thread(prompt), count)))
        for thread in threads:
            self._check_length(thread)
        texts = await async_map(self.policy.detokenize_thread, threads)
        with phase("grading"):
            scores = await async_map(self._score, texts)
        with phase("reference"):
            logprobs = await async_map(self._logprobs, threads)
        return [
            Completion(thread, text, score, *pair)
            for thread, text, score, pair in zip(threads, texts, scores, logprobs, strict=True)
        ]

    async def _score(self, text: StringThread) -> float:
        return await score_or_refuse(self.grader, text)

    async def _logprobs(self, thread: TokenizedThread) -> tuple[list[float], list[float]]:
        """Of the policy that drew the thread's completion, and of the reference."""
        logprobs = recorded_logprobs(self.policy, thread)
        if logprobs is None:
            logprobs = await self.policy.logprobs_per_token(thread)
        return logprobs, logprobs if self.reference is None else await self.reference.logprobs_per_token(thread)

    def _check_length(self, thread: TokenizedThread) -> None:
        tokens = len(thread.token_ids)
        if self._limit is not None and tokens > self._limit:
            raise SampleTooLong(
                f"a prompt and its completion have {tokens} tokens; the policy trains at most {self._limit}",
                hint=f"spawn_train(..., max_batch_size={tokens}), or generate less (tokens_to_generate)",
                tokens=tokens,
                limit=self._limit,
            )

    async def show(self, completions: Sequence[Completion], advantages: Sequence[float], step: int, at: float) -> None:
        """Put some completions into the run's report, once in each tenth of the run; `at` is how much of it is done."""
        tenth = int(at * 10)
        if tenth in self._shown:
            return
        self._shown.add(tenth)
        for completion, advantage in list(zip(completions, advantages, strict=True))[:SHOWN]:
            await show_sample(self.policy, completion.thread, step, reward=completion.score, advantage=advantage)


def prompts_of(dataset: Sequence[StringThread]) -> list[StringThread]:
    """The threads without a last assistant turn: what is left is what the policy answers."""
    ending = sum(thread.completion() is not None for thread in dataset)
    if ending:
        log.warning("%d of %d prompts end with an assistant turn, which is left out", ending, len(dataset))
    return [prompt_of(thread) for thread in dataset]


def prompt_of(thread: StringThread) -> StringThread:
    """The thread without a last assistant turn."""
    if thread.completion() is None:
        return thread
    return StringThread.from_turns(thread.turns[:-1], thread.metadata, thread.uuid())


def completion_metrics(completions: Sequence[Completion], with_reference: bool) -> dict[str, float]:
    """Means over tokens of log-probs and divergence, over completions of scores, lengths and truncation."""
    scores = [c.score for c in completions]
    mean = fmean(scores)
    metrics = {
        "score_mean": mean,
        "score_std": fmean((score - mean) ** 2 for score in scores) ** 0.5,
        "generation_length": fmean(len(c.logprobs) for c in completions),
        "percentage_truncated": fmean(float(c.truncated) for c in completions),
        "logprobs": _mean(c.logprobs for c in completions),
    }
    if with_reference:
        metrics["ref_logprobs"] = _mean(c.ref_logprobs for c in completions)
        metrics["kl_div"] = metrics["logprobs"] - metrics["ref_logprobs"]
    return metrics


def _mean(lists: Iterable[Sequence[float]]) -> float:
    """Of all numbers in them."""
    return fmean([*chain.from_iterable(lists)])


def check_sizes(samples_per_batch: int, completions_per_sample: int, samples_per_mini_batch: int, passes: int) -> None:
    """Raises UsageError for sizes of which no batch can be made."""
    if completions_per_sample < 1:
        raise UsageError(f"completions_per_sample must be at least 1, got {completions_per_sample}")
    if samples_per_batch < completions_per_sample:
        raise UsageError(
            f"samples_per_batch ({samples_per_batch}) counts completions and holds not one prompt's "
            f"{completions_per_sample} (completions_per_sample)"
        )
    if samples_per_mini_batch < 1:
        raise UsageError(f"samples_per_mini_batch must be at least 1, got {samples_per_mini_batch}")
    if passes < 1:
        raise UsageError(f"mini_epochs_per_batch must be at least 1, got {passes}")
