"""Which requests run in the next step. Bookkeeping of one replica; it knows no tensors and no torch.

First come, first served: requests are admitted in the order they came, the head of the queue waits for its pages and
nobody passes it, so a large request is not starved by small ones. Prompts go before decoding, under a token budget.
A request is admitted with pages reserved for its prompt and every new token it may have, so it always runs to its end.
"""

from __future__ import annotations

import math
from array import array
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Items

import numpy as np

from harmony_core.engine.inference.blocks import MAX_RUNNING, PAGE_SIZE, PagePool, pages_for
from harmony_core.engine.inference.draws import Draws, uniforms
from harmony_core.engine.inference.sequence import Sequence, check_sampling
from harmony_core.engine.inference.step import Finished, StepPlan, StepResult, float64, int32
from harmony_core.errors import DataError, EngineError, HarmonyError, PromptTooLong
from harmony_core.rpc.protocol import Sampling


class Scheduler:
    """Requests of one replica: submit and cancel at any time; plan, then commit, once per step.

    `kv_tokens` is the pool, `max_positions` the model's context, `prefill_tokens` the most tokens in one step, prompt
    or decoding, `max_running` the most sequences that hold pages; `version` says which policy version the weights have
    now.
    """

    def __init__(
        self,
        *,
        kv_tokens: int,
        max_positions: int,
        vocab_size: int,
        version: Callable[[], int],
        prefill_tokens: int,
        max_running: int = MAX_RUNNING,
        page_size: int = PAGE_SIZE,
    ) -> None:
        assert kv_tokens > 0 and prefill_tokens > 0 and max_running > 0
        self.pool = PagePool(pages_for(kv_tokens, page_size), page_size)
        self.kv_tokens = kv_tokens
        self.max_positions = max_positions
        self.vocab_size = vocab_size
        self.prefill_tokens = prefill_tokens
        self.max_running = min(max_running, prefill_tokens)
        self._version = version
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()
        self._running: dict[int, Sequence] = {}
        self._slots = list(range(self.max_running))
        self._in_flight: tuple[StepPlan, list[Sequence]] | None = None

    # --- requests -------------------------------------------------------------------------------------------------

    def submit(self, id: int, tokens: Items[int], sampling: Sampling) -> None:
        """Queue a request under an id of the caller's. Raises PromptTooLong or DataError; nothing is queued then."""
        assert id not in self._waiting and id not in self._running, f"request {id} was submitted twice"
        check_sampling(sampling)
        self._check_prompt(tokens)
        room = min(self.max_positions, self.kv_tokens) - len(tokens)
        self._waiting[id] = Sequence(id, array("i", tokens), sampling, limit=min(sampling.max_tokens, room))

    def cancel(self, id: int) -> None:
        """Forget a request; its pages are free at once. Ids that are not here, or not any more, are fine."""
        sequence = self._waiting.pop(id, None) or self._running.get(id)
        if sequence is not None:
            self._leave(sequence)

    @property
    def has_work(self) -> bool:
        """Whether a step can be planned."""
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that have no pages yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold pages."""
        return len(self._running)

    def running_slots(self) -> dict[int, int]:
        """Slot -> request of every sequence that has one."""
        return {sequence.slot: sequence.id for sequence in self._running.values()}

    # --- steps ----------------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """Decide the next step. Only while `has_work`, and only after the last plan was committed or dropped."""
        self._admit()
        batch = self._prefill_batch() or [(sequence, 1) for sequence in self._running.values()]
        assert batch, "a request that can never be admitted"
        plan = self._describe(batch)
        self._in_flight = plan, [sequence for sequence, _ in batch]
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[Finished]:
        """Take a step's tokens; return the requests that it ended. A request cancelled meanwhile is left out."""
        assert self._in_flight is not None and self._in_flight[0] is plan, "committed a step that is not in flight"
        batch = self._in_flight[1]
        self._in_flight = None
        for sequence, context in zip(batch, int32(plan.contexts).tolist(), strict=True):
            sequence.cached = context
        finished: list[Finished] = []
        draws = zip(
            int32(plan.sampled).tolist(),
            int32(result.tokens).tolist(),
            float64(result.logprobs).tolist(),
            float64(result.sampled_logprobs).tolist(),
            strict=True,
        )
        for row, token, logprob, sampled_logprob in draws:
            sequence = batch[row]
            if not sequence.alive:
                continue
            if not (math.isfinite(logprob) and math.isfinite(sampled_logprob)):
                finished.append(Finished(sequence.id, None, _not_a_number(sequence)))
                self._leave(sequence)
                continue
            sequence.append(token, logprob, sampled_logprob, plan.version)
            if sequence.finish_reason:
                finished.append(Finished(sequence.id, sequence.generated()))
                self._leave(sequence)
        return finished

    def abort(self, plan: StepPlan, error: HarmonyError) -> list[Finished]:
        """A step could not be executed: its requests end with `error`. A request cancelled meanwhile is left out."""
        assert self._in_flight is not None and self._in_flight[0] is plan, "aborted a step that is not in flight"
        batch = self._in_flight[1]
        self._in_flight = None
        finished = [Finished(sequence.id, None, error) for sequence in batch if sequence.alive]
        for sequence in batch:
            if sequence.alive:
                self._leave(sequence)
        return finished

    # --- inside ---------------------------------------------------------------------------------------------------

    def _check_prompt(self, tokens: Items[int]) -> None:
        count = len(tokens)
        if not count:
            raise DataError("an empty prompt cannot be continued", hint="give at least one token")
        if min(tokens) < 0 or max(tokens) >= self.vocab_size:
            wrong = next(token for token in tokens if not 0 <= token < self.vocab_size)
            raise DataError(f"the prompt holds token {wrong}, the vocabulary is 0 to {self.vocab_size - 1}")
        if count >= self.max_positions:
            raise PromptTooLong(
                f"a prompt of {count} tokens leaves no room in the model's context of {self.max_positions}",
                hint=f"shorten the prompt to at most {self.max_positions - 1} tokens",
                tokens=count,
                limit=self.max_positions,
            )
        if count >= self.kv_tokens:
            raise PromptTooLong(
                f"a prompt of {count} tokens leaves no room in the KV cache of {self.kv_tokens} tokens",
                hint=f"shorten the prompt to at most {self.kv_tokens - 1} tokens, or raise kv_cache_len",
                tokens=count,
                limit=self.kv_tokens,
            )

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_running:
            head = next(iter(self._waiting.values()))
            need = pages_for(len(head.prompt) + head.limit, self.pool.page_size)
            if not self.pool.can_reserve(need):
                return
            self.pool.reserve(need)
            head.reserved_pages = need
            head.slot = self._slots.pop()
            del self._waiting[head.id]
            self._running[head.id] = head

    def _prefill_batch(self) -> list[tuple[Sequence, int]]:
        """Prompts to read next: whole ones while they fit the budget; one that never fits goes alone, in parts."""
        batch: list[tuple[Sequence, int]] = []
        budget = self.prefill_tokens
        for sequence in self._running.values():
            missing = len(sequence.prompt) - sequence.cached
            if missing <= 0:
                continue
            if missing > budget:
                if not batch:
                    batch.append((sequence, budget))
                break
            batch.append((sequence, missing))
            budget -= missing
        return batch

    def _describe(self, batch: list[tuple[Sequence, int]]) -> StepPlan:
        tokens: list[array[int]] = []
        contexts: list[int] = []
        new_pages: list[tuple[int, int, int]] = []
        sampled: list[int] = []
        drawing: list[Sequence] = []
        for row, (sequence, count) in enumerate(batch):
            context = sequence.cached + count
            contexts.append(context)
            new_pages += self._grow(sequence, context)
            if not sequence.tokens:
                tokens.append(sequence.prompt[sequence.cached : context])
            if context == sequence.length:
                sampled.append(row)
                drawing.append(sequence)
        slots = [sequence.slot for sequence, _ in batch]
        numbers = uniforms([sequence.stream for sequence in drawing], [contexts[row] for row in sampled])
        return StepPlan(
            slots=_pack(slots),
            tokens=b"".join(tokens),
            lengths=_pack([count for _, count in batch]),
            contexts=_pack(contexts),
            new_pages=_pack(new_pages),
            copies=b"",
            sampled=_pack(sampled),
            targets=_pack([slots[row] for row in sampled]),
            draws=Draws.pack([sequence.setting for sequence in drawing], numbers),
            suppressed={
                place: [token for token in sequence.stop_ids if 0 <= token < self.vocab_size]
                for place, sequence in enumerate(drawing)
                if sequence.must_go_on
            },
            version=self._version(),
        )

    def _grow(self, sequence: Sequence, tokens: int) -> list[tuple[int, int, int]]:
        added = []
        while len(sequence.pages) * self.pool.page_size < tokens:
            page = self.pool.take()
            added.append((sequence.slot, len(sequence.pages), page))
            sequence.pages.append(page)
            sequence.reserved_pages -= 1
        return added

    def _leave(self, sequence: Sequence) -> None:
        if self._running.pop(sequence.id, None) is not None:
            self._slots.append(sequence.slot)
        self.pool.give_back(sequence.pages, sequence.reserved_pages)
        sequence.alive = False
        sequence.reserved_pages = 0
        del sequence.pages[:]


def _pack(numbers: Items[int] | Items[tuple[int, int, int]]) -> bytes:
    return np.array(numbers, dtype=np.int32).tobytes()


def _not_a_number(sequence: Sequence) -> EngineError:
    return EngineError(
        f"request {sequence.id}: the model's output for position {sequence.length} is not a number",
        hint="the weights hold NaN or infinite values, or the activations overflow: look at the last training steps",
        request=sequence.id,
        position=sequence.length,
    )
