"""Completions of prompts with their scores and log-probs, their mini-batches, and samples for the run's report."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from harmony_core.algorithms.batch_loader import Unscored, async_map, at_least
from harmony_core.algorithms.callbacks import prompt_of, result_of
from harmony_core.algorithms.tangents import old_logprobs
from harmony_core.algorithms.training import Training, means
from harmony_core.errors import GradeFailed, IgnoreGradeException, TooManyFailures, UsageError
from harmony_core.graders import BaseGrader, score_or_refuse
from harmony_core.journal import Piece, phase, samples_wanted, tell_dropped, tell_sample
from harmony_core.text.threads import StringThread, TokenizedThread, repeat_thread

if TYPE_CHECKING:
    from harmony_core.client import InferenceModel, TrainingModel

_CONTEXT = 8
"""Number of preceding tokens that are decoded together with a turn."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


async def show_sample(
    model: InferenceModel,
    thread: StringThread | TokenizedThread,
    step: int,
    *,
    source: str = "training",
    reward: float | None = None,
    advantage: float | None = None,
    group: str | int | None = None,
    grades: Mapping[str, float] | None = None,
) -> None:
    """Add a sample of optimizer step `step` (from 1) to the run's report, unless the report has enough of them.

    A StringThread is tokenized first, and shown in as many parts as it is trained in. Log-probs are shown if the
    thread has those of its generation.
    """
    if not samples_wanted(step, source):
        return
    for part in await model.tokenize_parts(thread) if isinstance(thread, StringThread) else [thread]:
        turns = await pieces_of(model, part)
        tell_sample(step, turns, source=source, reward=reward, advantage=advantage, group=group, grades=grades)


async def pieces_of(model: InferenceModel, thread: TokenizedThread) -> list[tuple[str, list[Piece]]]:
    """Role and pieces of every turn: one piece per token in weighted turns, a single piece in others."""
    logprobs = iter(thread.logprobs or ())
    shown = []
    for turn in thread.token_turns:
        if turn.weight:
            before = thread.token_ids[max(turn.start - _CONTEXT, 0) : turn.start]
            texts = await token_texts(model, thread.token_ids[turn.start : turn.end], before)
            pieces = [Piece(text, turn.weight, next(logprobs, None)) for text in texts]
        else:
            pieces = [Piece("".join(str(getattr(fragment, "text", "[image]")) for fragment in turn.fragments))]
        shown.append((turn.role, pieces))
    return shown


async def token_texts(model: InferenceModel, ids: Sequence[int], behind: Sequence[int] = ()) -> list[str]:
    """The text of each token when decoded after the tokens `behind`; joined, they give the text of all tokens.

    If several tokens make one character, the last has the character and the others are empty. A token is decoded
    after its predecessors, since some tokenizers leave out the space before the first token.
    """
    texts: list[str] = []
    before: list[int] = list(behind)
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        known = await model.detokenize(before)
        text = (await model.detokenize([*before, *pending]))[len(known) :]
        if text.endswith(_UNFINISHED) and len(pending) < 4:
            texts.append("")
            continue
        texts.append(text)
        before, pending = pending, []
    if pending:
        known = await model.detokenize(before)
        texts[-1] = (await model.detokenize([*before, *pending]))[len(known) :]
    return texts


S = TypeVar("S")
T = TypeVar("T")

Metrics = dict[str, Any]

log = logging.getLogger(__name__)

SHOWN = 4
"""Completions of one step in the run's report."""

MOST_FAILURES = 64
"""Grades that may fail one after the other before the run ends. With half of them failing, that never happens."""


class RolloutSample(Protocol):
    """The fields that samples of `GRPO` and `PPO` have in common."""

    sample: TokenizedThread
    score: float
    logprobs: list[float]
    ref_logprobs: list[float]


@dataclass
class Completion:
    """One scored completion; lists have one number for each generated token.

    `logprobs` are the old log-probs: those of the policy that sampled it, at temperature 1. `ref_logprobs` are the
    reference model's, or the old log-probs again without a reference model.
    """

    sample: TokenizedThread
    string_sample: StringThread
    score: float
    logprobs: list[float]
    ref_logprobs: list[float]

    @property
    def kl_div(self) -> list[float]:
        """logprob - ref_logprob of each token."""
        return [now - ref for now, ref in zip(self.logprobs, self.ref_logprobs, strict=True)]


class Rollout:
    """Generates completions with a policy, and scores them with a grader and a reference model, if there is one.

    `others`: further models that train on the completions.
    """

    def __init__(
        self, policy: TrainingModel, reference: InferenceModel | None, grader: BaseGrader[Any], *others: TrainingModel
    ) -> None:
        self.policy = policy
        self.reference = reference
        self.grader = grader
        self._longest, self._setting = longest_trained([policy, *others])
        self._sampler = policy.max_seqlen(self._longest, self._setting)
        self._warned = False
        self._graded, self._failures = 0, 0
        self._unscored: Counter[str] = Counter()
        self._last = ""

    async def group(self, prompt: StringThread, count: int) -> list[Completion]:
        """The scored ones of `count` completions of one prompt.

        A completion ends at the latest when its thread has as many tokens as can be trained. Raises PromptTooLong if
        the prompt leaves no room, TokenizationError, and GradeFailed or IgnoreGradeException if fewer than two
        completions (of one: none) have a score; TooManyFailures when the grader always fails, which ends the run.
        """
        with phase("rollout"):
            threads = await async_map(self._sampler.generate_tokens, list(islice(repeat_thread(prompt), count)))
        self._warn_of_cap(threads[0])
        texts = await async_map(self.policy.detokenize_thread, threads)
        with phase("grading"):
            scores = await async_map(self._score, texts)
        found = zip(threads, texts, scores, strict=True)
        scored = [(thread, text, score) for thread, text, score in found if isinstance(score, float)]
        if len(scored) < min(count, 2):
            raise next(error for error in reversed(scores) if not isinstance(error, float))
        with phase("reference"):
            logprobs = await async_map(self._logprobs, [thread for thread, _, _ in scored])
        pairs = zip(scored, logprobs, strict=True)
        return [Completion(thread, text, score, *pair) for (thread, text, score), pair in pairs]

    async def _score(self, text: StringThread) -> float | Unscored:
        """The score, or the reason for which there is none; the latter is counted."""
        self._graded += 1
        try:
            score = await score_or_refuse(self.grader, text)
            self._failures = 0
            return score
        except (GradeFailed, IgnoreGradeException) as error:
            self._unscored[error.code] += 1
            self._last = error.message
            self._failures += isinstance(error, GradeFailed)
            if self._failures >= MOST_FAILURES:
                text_of_all = f"the last {self._failures} grades all failed; the last: {error.message}"
                raise TooManyFailures(text_of_all, hint=error.hint, failures=self._failures) from error
            return error

    def unscored(self) -> Metrics:
        """How many completions got no score since the last call, also by reason; they are told to the run's report."""
        counts, self._unscored = self._unscored, Counter()
        tell_dropped({f"unscored_{reason}": count for reason, count in counts.items()}, last=self._last)
        metrics = {"rewards/unscored": counts.total(), "rewards/unscored_rate": counts.total() / max(self._graded, 1)}
        self._graded = 0
        return metrics | {f"rewards/unscored/{reason}": count for reason, count in counts.items()}

    async def _logprobs(self, thread: TokenizedThread) -> tuple[list[float], list[float]]:
        """The log-probs of the policy that drew the thread's completion, and those of the reference."""
        logprobs = await old_logprobs(self.policy, thread)
        return logprobs, logprobs if self.reference is None else await self.reference.logprobs_per_token(thread)

    def _warn_of_cap(self, thread: TokenizedThread) -> None:
        """Warn once that completions may be shorter than requested."""
        prompt, asked = len(thread.token_ids) - thread.len_last_turn(), self.policy.longest_completion
        if not self._warned and prompt + asked > self._longest:
            self._warned = True
            log.warning(
                "completions are capped at %s=%d tokens less their prompt's, here %d, where %d are asked for; "
                "those that are cut count as truncated",
                *(self._setting, self._longest, prompt, asked),
            )

    async def show(self, completions: Sequence[RolloutSample], advantages: Sequence[float], step: int) -> None:
        """Add some completions to the run's report."""
        for completion, advantage in list(zip(completions, advantages, strict=True))[:SHOWN]:
            await show_sample(self.policy, completion.sample, step, reward=completion.score, advantage=advantage)


class RolloutTraining(Training):
    """Base of the classes that train a policy on its own scored completions."""

    grader: BaseGrader[Any]
    rollout: Rollout
    samples_per_mini_batch: int
    mini_epochs_per_batch: int
    clip_range: float

    def get_train_batch_logs(self, data: list[Any]) -> dict[str, Any]:
        """The metrics of a batch, in addition to the grader's logs and the optimizer's metrics."""
        raise NotImplementedError

    async def _batch_metrics(
        self, data: list[Any], samples: Sequence[RolloutSample], advantages: Sequence[float]
    ) -> Metrics:
        """Metrics of a batch and of its grades. Adds samples to the run's report when they are due."""
        logs = await result_of(self.get_train_batch_logs(data)) or {}
        rewards = {f"rewards/{key}": value for key, value in self.grader.get_logs(clear=True).items()}
        if self.loop.shows():
            await self.rollout.show(samples, advantages, self.loop.step)
        return {**logs, **rewards}

    async def _train_mini_batches(
        self, samples: Sequence[S], model: str, train: Callable[[S], Any], step: Callable[[], Awaitable[Metrics]]
    ) -> Metrics:
        """Train all mini-batches of one model. Returns the last step's metrics and logs the earlier ones."""
        # The seed depends on the place in the data, so that a resumed run shuffles as the uninterrupted one.
        order = self.data_seed + self.loader.dataset.idx
        sizes = self.samples_per_mini_batch, self.mini_epochs_per_batch
        metrics: Metrics = {}
        for mini_batch in get_minibatches(samples, *sizes, order, join_last_one=True):
            if metrics:
                self.logger({**metrics, "completion_percentage": self.loader.completion})
            with phase("training"):
                measured = await async_map(lambda sample: result_of(train(sample)), mini_batch)
            metrics = means(model, measured) | await step()
        return metrics


def prompts_of(dataset: Sequence[StringThread]) -> list[StringThread]:
    """The threads without a last assistant turn, which the policy will generate."""
    ending = sum(thread.completion() is not None for thread in dataset)
    if ending:
        log.warning("%d of %d prompts end with an assistant turn, which is left out", ending, len(dataset))
    return [prompt_of(thread) for thread in dataset]


def completion_metrics(completions: Sequence[RolloutSample], with_reference: bool) -> dict[str, float]:
    """Means of log-probs and divergence over tokens, and of scores, lengths and truncation over completions."""
    scores = [c.score for c in completions]
    mean = fmean(scores)
    metrics = {
        "score_mean": mean,
        "score_std": fmean((score - mean) ** 2 for score in scores) ** 0.5,
        "generation_length": fmean(len(c.logprobs) for c in completions),
        "percentage_truncated": fmean(float(_truncated(c.sample)) for c in completions),
        "logprobs": _mean(c.logprobs for c in completions),
    }
    if with_reference:
        metrics["ref_logprobs"] = _mean(c.ref_logprobs for c in completions)
        metrics["kl_div"] = metrics["logprobs"] - metrics["ref_logprobs"]
    return metrics


def _truncated(sample: TokenizedThread) -> bool:
    """Whether the completion was ended by the length limit."""
    return sample.generation is not None and sample.generation.finish_reason == "length"


def _mean(lists: Iterable[Sequence[float]]) -> float:
    """The mean of all numbers in the lists."""
    return fmean([*chain.from_iterable(lists)])


def longest_trained(models: Iterable[TrainingModel]) -> tuple[int, str]:
    """The longest sequence, in tokens, that all of the models can train, and the setting that limits it."""
    settings = [model.get_builder_args() for model in models]
    return min((args[name], name) for args in settings for name in ("max_batch_size", "max_seqlen") if name in args)


def get_minibatches(
    dataset: Sequence[T],
    mini_batch_size: int,
    number_of_epochs: int,
    seed: int | None = None,
    *,
    join_last_one: bool = False,
) -> list[list[T]]:
    """Mini-batches of several passes, each in its own random order; the last of a pass may be short.

    With `join_last_one` a last mini-batch of a single item is merged into the previous one. Without `seed` the order
    differs from call to call.
    """
    at_least(1, mini_batch_size=mini_batch_size)
    order = random.Random(seed)
    batches: list[list[T]] = []
    for _ in range(number_of_epochs):
        items = list(dataset)
        order.shuffle(items)
        starts = [*range(0, len(items), mini_batch_size)]
        if join_last_one and mini_batch_size > 1 and len(starts) > 1 and starts[-1] == len(items) - 1:
            starts.pop()
        batches.extend(items[start:end] for start, end in zip(starts, [*starts[1:], len(items)], strict=True))
    return batches


def sample_data(data: Sequence[T], epochs: float, seed: int | None = None) -> list[T]:
    """`epochs` passes over the data, each in its own random order; a fractional pass takes that share of the items."""
    order = random.Random(seed)
    wanted = round(len(data) * epochs)
    sampled: list[T] = []
    while len(sampled) < wanted and data:
        items = list(data)
        order.shuffle(items)
        sampled.extend(items)
    return sampled[:wanted]


def weighted_mean(values: Sequence[Sequence[float]], weights: Sequence[Sequence[float]]) -> float:
    """Mean over all entries of ragged lists, each entry counted by its weight. Raises UsageError for weights of 0."""
    pairs = [pair for row in zip(values, weights, strict=True) for pair in zip(*row, strict=True)]
    total = sum(weight for _, weight in pairs)
    if total == 0:
        raise UsageError("a weighted mean needs weights that do not sum to 0")
    return sum(value * weight for value, weight in pairs) / total
