"""Step plans written by hand: pages and slots of a few sequences, without a scheduler."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from harmony_core.engine.inference.runner import Pending, Runner
from harmony_core.engine.inference.scheduler import Scheduler
from harmony_core.engine.inference.step import Setting, StepPlan, StepResult, int32, pack_sampling
from harmony_core.rpc.protocol import Generated, Sampling

PAGE = 16
GREEDY = Sampling(temperature=0.0)
Requests = dict[int, tuple[list[int], Sampling]]


def packed(values: object) -> bytes:
    return np.array(values, dtype=np.int32).tobytes()


@dataclass
class Book:
    """Who has which pages. Slots and pages are handed out in an order of its own, so that neither equals the row."""

    slots: int = 64
    pages: int = 256
    seed: int = 0
    contexts: dict[int, int] = field(default_factory=dict)
    tables: dict[int, list[int]] = field(default_factory=dict)
    samplings: dict[int, Sampling] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.free_slots = self.random.permutation(self.slots).tolist()
        self.free_pages = self.random.permutation(self.pages).tolist()

    def _grow(self, slot: int, tokens: int) -> list[list[int]]:
        changes = []
        self.contexts[slot] = self.contexts.get(slot, 0) + tokens
        table = self.tables.setdefault(slot, [])
        while len(table) * PAGE < self.contexts[slot]:
            table.append(self.free_pages.pop())
            changes.append([slot, len(table) - 1, table[-1]])
        return changes

    def _draws(self, targets: list[int]) -> bytes:
        settings = [Setting.of(self.samplings[slot]) for slot in targets]
        return pack_sampling(settings, self.random.random(len(targets)))

    def prefill(
        self, prompts: list[list[int]], sampling: Sampling = GREEDY, forks: int = 0
    ) -> tuple[StepPlan, list[int]]:
        """New sequences, each followed by `forks` more that share its full pages; the slots in the order of draws."""
        slots, targets, sampled, changes, copies = [], [], [], [], []
        for row, prompt in enumerate(prompts):
            slot = self.free_slots.pop()
            changes += self._grow(slot, len(prompt))
            slots.append(slot)
            for _ in range(forks + 1):
                target = slot if target_is_first(sampled, row) else self.free_slots.pop()
                if target != slot:
                    whole = len(prompt) // PAGE
                    self.contexts[target] = len(prompt)
                    self.tables[target] = self.tables[slot][:whole]
                    if len(prompt) % PAGE:
                        page = self.free_pages.pop()
                        copies.append([self.tables[slot][whole], page])
                        self.tables[target].append(page)
                    changes += [[target, place, page] for place, page in enumerate(self.tables[target])]
                targets.append(target)
                sampled.append(row)
                self.samplings[target] = sampling
        lengths = [len(prompt) for prompt in prompts]
        plan = StepPlan(
            req_indices=packed(slots),
            tokens=packed([token for prompt in prompts for token in prompt]),
            lengths=packed(lengths),
            contexts=packed(lengths),
            new_blocks=packed(changes),
            copies=packed(copies),
            sampled=packed(sampled),
            targets=packed(targets),
            sampling=self._draws(targets),
            suppressed={},
            version=0,
        )
        return plan, targets

    def decode(self, slots: list[int], suppressed: dict[int, list[int]] | None = None) -> StepPlan:
        """One more token for each of `slots`."""
        changes = [change for slot in slots for change in self._grow(slot, 1)]
        return StepPlan(
            req_indices=packed(slots),
            tokens=b"",
            lengths=packed([1] * len(slots)),
            contexts=packed([self.contexts[slot] for slot in slots]),
            new_blocks=packed(changes),
            copies=b"",
            sampled=packed(range(len(slots))),
            targets=packed(slots),
            sampling=self._draws(slots),
            suppressed=suppressed or {},
            version=0,
        )

    def leave(self, slot: int) -> None:
        """Give everything of a sequence back; pages that others share too, so only without forks."""
        self.free_pages = self.tables.pop(slot) + self.free_pages
        self.free_slots.insert(0, slot)
        del self.contexts[slot]


def target_is_first(sampled: list[int], row: int) -> bool:
    """Whether this draw goes on in the slot that read the prompt."""
    return row not in sampled


def tokens_of(result: StepResult) -> list[int]:
    return int32(result.tokens).tolist()


def serve(scheduler: Scheduler, runner: Runner, requests: Requests) -> dict[int, Generated]:
    """Answer requests, with as many steps under way as the runner is good for; half of them come while others run."""
    under_way: deque[tuple[StepPlan, Pending]] = deque()
    waiting = deque(requests.items())
    answers: dict[int, Generated] = {}
    step = 0
    while waiting or scheduler.has_work:
        while waiting and (step > 5 or len(waiting) > len(requests) // 2):
            id, (prompt, sampling) = waiting.popleft()
            scheduler.submit(id, prompt, sampling)
        step += 1
        plan = scheduler.plan() if scheduler.has_work else None
        if plan is not None:
            under_way.append((plan, runner.launch(plan)))
        while under_way and (plan is None or len(under_way) > runner.depth):
            oldest, pending = under_way.popleft()
            for finished in scheduler.commit(oldest, runner.collect(pending)):
                assert finished.generated is not None, finished.error
                answers[finished.id] = finished.generated
    while under_way:
        oldest, pending = under_way.popleft()
        assert not scheduler.commit(oldest, runner.collect(pending))
    assert scheduler.pool.available == scheduler.pool.capacity
    return answers


def ragged_requests(count: int, vocab: int, seed: int = 0) -> Requests:
    """Prompts and limits of many lengths, groups that share a prompt, all kinds of settings."""
    random = np.random.default_rng(seed)
    requests: Requests = {}
    while len(requests) < count:
        prompt = random.integers(3, vocab, int(random.integers(1, 90))).tolist()
        for _ in range(int(random.choice([1, 1, 1, 4]))):
            settings = {"max_tokens": int(random.integers(1, 40)), "seed": len(requests), "stop_ids": (7, 8, 9)}
            settings |= [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 9, "min_tokens": 5}][
                len(requests) % 4
            ]
            requests[len(requests)] = prompt, Sampling(**settings)
    return requests
