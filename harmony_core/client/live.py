"""One live model on the driver, shared by its handles, and the limits of its sequences."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import structs

from harmony_core.client.allowed_tokens import allowed_tokens
from harmony_core.client.batching import (
    Accepted,
    Loss,
    PendingStep,
    SampleQueue,
    TrainSample,
    micro_batch,
    require_weight,
)
from harmony_core.client.engine import Engine, Request, part_of
from harmony_core.client.losses import AnyThread, check_head
from harmony_core.errors import (
    ConflictError,
    DataError,
    HarmonyError,
    ModelRefused,
    SampleTooLong,
    TooLong,
    UsageError,
)
from harmony_core.grammar import GrammarTokenizer
from harmony_core.memory.ledger import MemoryPlan
from harmony_core.memory.plan import could_fit, weight_elements
from harmony_core.request_seeds import request_seed
from harmony_core.rpc.protocol import Dealloc, Message, Spawn, StepMetrics
from harmony_core.rpc.tracebacks import callers_line
from harmony_core.text.row_lengths import Lengths, Rows
from harmony_core.text.threads import StringThread, TokenizedThread

if TYPE_CHECKING:
    from harmony_core.registry import ModelVersion
    from harmony_core.text.tokenization import ChatTokenizer


class Limit(NamedTuple):
    """A sequence has at most `tokens` because of `name`; raising `setting` raises the limit, "" if no setting does.

    Of equal limits, one that no setting raises sorts first.
    """

    tokens: int
    setting: str
    name: str


def of_context(spawn: Spawn) -> list[Limit]:
    """The model's context, and the part of it that its builder allows."""
    context = Limit(spawn.spec.max_positions, "", "the model's context")
    allowed = spawn.max_seqlen
    return [context] if allowed in (None, context.tokens) else [context, Limit(allowed, "max_seqlen", "max_seqlen")]


def of_batch(spawn: Spawn) -> Limit:
    """Tokens in one pass: the recipe's `max_batch_size`, or the constant of all inference models."""
    setting = "max_batch_size" if spawn.train else ""
    return Limit(spawn.max_batch_tokens, setting, setting or "what an inference model scores at once")


def of_pool(spawn: Spawn) -> Limit:
    """Tokens in the page pool of one replica."""
    return Limit(spawn.kv_tokens, "kv_cache_len", "kv_cache_len")


def check_length(
    live: LiveModel, error: type[TooLong], tokens: int, what: str, limits: Sequence[Limit], beyond: int = 0
) -> None:
    """Raise `error` if `tokens + beyond` is above a limit, naming that limit and the settings that help."""
    needed = tokens + beyond
    short = [limit for limit in limits if limit.tokens < needed]
    if not short:
        return
    binding, settings = min(short), sorted({limit.setting for limit in short})
    ways = [" and ".join(f"{setting}={needed}" for setting in settings)] if live.would_fit(settings, needed) else []
    raise error(
        f"{what.format(tokens)}; {live.name!r} takes at most {binding.tokens} ({binding.name})",
        hint="; or ".join([*ways, f"shorten it to at most {binding.tokens - beyond} tokens"]),
        tokens=tokens,
        limit=binding.tokens,
        needed=needed,
        setting=binding.setting,
        context=live.version.spec.max_positions,
    )


@dataclass(frozen=True)
class RowGauge:
    """Measures rows for a training model. Needs no rank, and outlives the model."""

    tokenizer: ChatTokenizer
    spawn: Spawn

    def rows(self, name: str, rows: Sequence[Any], prompts: bool, others: Sequence[RowGauge] = ()) -> Rows:
        """A dataset of samples (threads, or tuples of them) or of prompts; the `others` train on it as well."""
        spawns = [each.spawn for each in (self, *others)]
        limits = [limit for each in spawns for limit in (of_context(each)[0], of_batch(each))]
        limits += [*of_context(self.spawn), of_pool(self.spawn)] if prompts else []
        limit, context = min(limits), of_context(self.spawn)[0]
        # A prompt leaves room for at least one token.
        lengths = Lengths(limit.tokens - prompts, limit.setting, int(prompts), context.tokens)
        return Rows(name, rows, partial(self._parts, prompts), lengths)

    def _parts(self, prompts: bool, row: Any) -> list[int]:
        """Tokens of each part of a row; for a tuple, whose threads are not split, those of the longest thread."""
        if prompts:
            return [len(self.tokenizer.prompt_ids(row))]
        if not isinstance(row, StringThread):
            return [max(len(self._whole([self.tokenizer.tokenize(thread)])[0].token_ids) for thread in row)]
        return [len(part.token_ids) for part in self._whole(self.tokenizer.parts(row))]

    def _whole(self, parts: list[TokenizedThread]) -> list[TokenizedThread]:
        if not self.spawn.scalar:
            require_weight(weight for part in parts for weight in part.token_weights[1:])
        return parts


log = logging.getLogger(__name__)

MAX_UNANSWERED = 8
"""Micro-batches per replica that may wait on the ranks; with more, `train_*` makes its caller wait."""

MAX_GENERATING = 4096
"""Generations per replica that are sent to the ranks; further ones wait in the driver, in the order of their calls."""


class DryRunEnded(Exception):
    """A dry run reached the first call that needs a rank. `where` is the caller's file:line."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where


class LiveModel:
    """A spawned model: its record, its pending step, its requests in flight. Frees itself when no handle is left."""

    def __init__(self, engine: Engine, version: ModelVersion, tokenizer: ChatTokenizer | None, spawn: Spawn) -> None:
        self.engine = engine
        self.name = spawn.name
        self.version = version
        self.spawn = spawn
        self.replicas = engine.world_size // spawn.tp
        self.step = 0
        self._told_dropout = False
        self.changes = 0
        """How often the weights were trained or loaded from a checkpoint, steps under way included."""
        self._mark = object()
        self._steps_under_way = 0
        self.generating = asyncio.Semaphore(MAX_GENERATING * self.replicas)
        """Held by each generation that is under way on the ranks."""
        self.pending = self._begin_step()
        self._tokenizer = tokenizer
        self._outstanding = [0] * self.replicas
        engine.request_numbers[spawn.name] = 0
        self._owns_weights = False
        self._freed = False
        self._loop = asyncio.get_running_loop()

    def copied(self, spawn: Spawn) -> LiveModel:
        """A frozen copy of this model."""
        return LiveModel(self.engine, self.version, self._tokenizer, spawn)

    @property
    def tokenizer(self) -> ChatTokenizer:
        """The model's tokenizer. Raises ModelRefused for a model without one."""
        if self._tokenizer is None:
            raise ModelRefused(
                f"model {self.version.ref} has no tokenizer: only raw_logprobs and train_tangents can be used",
                hint="add tokenizer.json and a chat template to the directory and import it again",
            )
        return self._tokenizer

    @cached_property
    def grammar(self) -> GrammarTokenizer:
        """The tokenizer as grammars see it."""
        return GrammarTokenizer(self.tokenizer.to_json(), self.version.spec.vocab_size, sorted(self.stop_ids))

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens at which a completion ends; empty without a tokenizer."""
        return frozenset() if self._tokenizer is None else self._tokenizer.stop_ids

    def would_fit(self, settings: Sequence[str], tokens: int) -> bool:
        """Whether the model would fit, in its place, with these settings at `tokens`; False if "" is among them."""
        fields = {"max_batch_size": "max_batch_tokens", "kv_cache_len": "kv_tokens"}
        changed = structs.replace(self.spawn, **{fields[name]: tokens for name in settings if name in fields})
        ledger = self.engine.ledger.without(self.name)
        return "" not in settings and could_fit(changed, ledger.free, ledger.transient)

    def require_live(self) -> None:
        """Raises ConflictError when the model was deallocated."""
        if self._freed:
            raise ConflictError(f"model {self.name!r} was deallocated", hint="spawn it again")

    def require_ranks(self) -> None:
        """Check before any request that the model is live, not only planned. Raises DryRunEnded, ConflictError."""
        self.require_live()
        if self.engine.options.dry_run:
            raise DryRunEnded(callers_line("the recipe"))

    def next_request_seed(self) -> int:
        """The seed of the model's next request."""
        return request_seed(self.engine.options.seed, self.name, self.engine.request_numbers)

    def least_busy(self) -> int:
        """The replica with the fewest outstanding tokens."""
        return min(range(self.replicas), key=lambda r: (self._outstanding[r], r))

    def post(self, replica: int, message: Message, cost: int) -> Request:
        """Send a request that costs `cost` tokens to a replica."""
        self._outstanding[replica] += cost
        request = self.engine.post_replica(self.spawn.tp, replica, message)

        def answered(_: asyncio.Future[Message]) -> None:
            self._outstanding[replica] -= cost

        request.future.add_done_callback(answered)
        return request

    def check_ids(self, tokens: Sequence[int]) -> None:
        """Raise DataError for a token id that the model does not have. The ranks do not check again."""
        size = self.version.spec.vocab_size
        if tokens and not (min(tokens) >= 0 and max(tokens) < size):
            position = next(i for i, token in enumerate(tokens) if not 0 <= token < size)
            raise DataError(f"token {tokens[position]} at position {position} is outside the vocabulary of {size}")

    def tokenized(self, thread: AnyThread) -> TokenizedThread:
        """The thread as tokens of this model's vocabulary."""
        tokens = thread if isinstance(thread, TokenizedThread) else self.tokenizer.tokenize(thread)
        self.check_ids(tokens.token_ids)
        return tokens

    def whole(self, thread: AnyThread) -> TokenizedThread:
        """The thread's tokens, including those that the template adds after the last turn."""
        if isinstance(thread, StringThread):
            return self.tokenizer.tokenize(thread)
        return thread if self.version.tokenizer_dir is None else self.tokenizer.completed(thread)

    def sample(
        self, thread: TokenizedThread, coefficients: list[float], loss: Loss, fields: dict[str, list[float]]
    ) -> TrainSample:
        """A thread as inputs and targets of a loss, with the targets' recorded log-probs and allowed tokens."""
        tokens, recorded = thread.token_ids, self._recorded(thread)
        allowed = allowed_tokens(self, thread, f"train_{loss.name.replace('linear', 'language_modelling')}")
        return TrainSample(tokens[:-1], tokens[1:], coefficients, recorded, loss, fields, allowed=allowed)

    def _recorded(self, thread: TokenizedThread) -> list[float] | None:
        """The sampler's log-prob of each target; NaN where another model or older weights drew it."""
        record = thread.generation
        if record is None or record.model != self.name:
            return None
        last, present = thread.token_turns[-1], self.present_version
        if len(record.policy_logprobs) != last.end - last.start:
            return None
        found = [math.nan] * (len(thread.token_ids) - 1)
        found[last.start - 1 : last.end - 1] = [
            logprob if version == present else math.nan
            for logprob, version in zip(record.policy_logprobs, record.versions, strict=True)
        ]
        return found

    def take(self, build: Callable[[], list[Accepted]]) -> Coroutine[Any, Any, None]:
        """Validate and queue now, so that the order of calls is the order of samples; report when awaited."""
        refused: HarmonyError | None = None
        if not self.spawn.train:
            raise UsageError(f"model {self.name!r} was spawned for inference", hint="use spawn_train")
        try:
            self.require_ranks()
            found = build()
            for accepted in found:
                check_head(self.name, self.spawn.scalar, accepted.samples[0].loss.name)
                for group in accepted.groups:
                    self._check_length(group)
            self._tell_dropout(found[0].samples[0].loss)
            for accepted in found:
                for batches in self.pending.add(accepted):
                    self._send(batches)
        except HarmonyError as error:
            refused = error
        return self._taken(refused)

    async def _taken(self, refused: HarmonyError | None) -> None:
        if refused is not None:
            raise refused
        await self.pending.room(MAX_UNANSWERED * self.replicas)

    def _check_length(self, samples: Sequence[TrainSample]) -> None:
        """Check that each sequence fits a micro-batch and the context; a group as a whole need not fit."""
        what = "the sample has" if len(samples) == 1 else f"the longest of {len(samples)} sequences has"
        limits = [of_context(self.spawn)[0], of_batch(self.spawn)]
        check_length(self, SampleTooLong, max(sample.thread_tokens for sample in samples), what + " {} tokens", limits)

    def _tell_dropout(self, loss: Loss) -> None:
        """Warn once per model that the adapter's dropout is off, or distorts ratios, in a loss on sampled tokens."""
        lora = self.spawn.lora
        if lora is None or not lora.dropout or self._told_dropout or (loss.dropout and loss.custom is None):
            return
        self._told_dropout = True
        what = f"the dropout of {lora.dropout:g} of {self.name!r}"
        if loss.custom is None:
            log.warning("train_grpo, train_ppo and train_gspo leave out %s: samples are drawn without it", what)
        else:
            log.warning("train_custom gives log-probs under %s: their ratio to sampled ones is not 1", what)

    def cut(self) -> None:
        """Cut and send the pending samples, without a step."""
        self._send(self.pending.queue.cut())

    def _send(self, batches: list[list[TrainSample]]) -> None:
        for batch in batches:
            replica = len(self.pending.sent) % self.replicas
            message = micro_batch(self.name, replica, batch, self.spawn.max_batch_tokens)
            self.pending.sent.append(self.post(replica, message, sum(map(len, batch))).future)

    def _begin_step(self) -> PendingStep:
        return PendingStep(self.name, SampleQueue(self.spawn.max_batch_tokens, self.replicas))

    def close_step(self, normalise: str) -> float:
        """Cut and send the pending samples, and begin the next step. Returns the denominator.

        Raises NothingToTrain when nothing was accepted, UsageError for mixed units.
        """
        self.cut()
        closed, self.pending = self.pending, self._begin_step()
        return closed.denominator(normalise)

    def follow_step(self, posted: asyncio.Future[list[Message]]) -> None:
        """Count an optimizer step that was sent to the ranks, even if its answer is not awaited."""
        self._steps_under_way += 1
        self.changed()

        def answered(future: asyncio.Future[list[Message]]) -> None:
            self._steps_under_way -= 1
            if not future.cancelled() and future.exception() is None:
                answer = future.result()[0]
                assert isinstance(answer, StepMetrics)
                self.step = int(answer.values["step"])

        posted.add_done_callback(answered)

    def changed(self) -> None:
        """Note that the weights now differ from those in the registry."""
        self.changes += 1
        self.engine.unsaved.add(self._mark)

    def saved(self, changes: int) -> None:
        """Note that the weights after `changes` changes were saved as a version of the registry."""
        if changes == self.changes:
            self.engine.unsaved.discard(self._mark)

    @property
    def present_version(self) -> int | None:
        """How many optimizer steps the weights have seen; None while a step is under way."""
        return None if self._steps_under_way else self.step

    def promise_own_weights(self) -> None:
        """Promise memory for weights that this model no longer shares with other spawns. Raises MemoryRefused."""
        spawn = self.spawn
        if not spawn.private and not self._owns_weights:
            weights = weight_elements(spawn.spec, spawn.tp, spawn.headless) * spawn.element
            self.engine.ledger.promise(part_of(self.name, "loaded weights"), MemoryPlan(weights=weights))
            self._owns_weights = True

    def free(self) -> asyncio.Future[list[Message]] | None:
        """Give the memory back; the model cannot be used afterwards. Returns None if there is nothing to wait for."""
        if self._freed:
            return None
        self._freed = True
        self.engine.forget(self.name)
        if self.engine.options.dry_run:
            return None
        return self.engine.post_global(Dealloc(model=self.name))

    def __del__(self) -> None:
        if not self._freed and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_free_quietly, self.engine, self.name)


def _free_quietly(engine: Engine, name: str) -> None:
    """Free a model without handles."""
    engine.forget(name)
    if not engine.options.dry_run and not engine.closed:
        engine.post_global(Dealloc(model=name))
