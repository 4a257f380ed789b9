"""What becomes of rows in training: taken whole, in parts, or refused and why; and how long they are, in tokens.

Knows nothing of models: whoever brings rows says how one is measured and what limits it.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, takewhile
from typing import Any

from harmony_core.errors import DataError, PromptTooLong, TokenizationError, TooLong
from harmony_core.text.threads import StringThread

log = logging.getLogger(__name__)

PARTS = {"50 %": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
KEPT = 0.99
SAMPLE = 10_000
"""Rows that are counted of a dataset that takes longer than `SECONDS`."""
SECONDS = 30.0
FIRST = 200
"""Rows that a dry run looks at."""
BINS, REASONS = 10, 10
"""How many are shown, about."""


@dataclass
class Lengths:
    """The tokens of rows. Those whose length is not known are within the limit, so they are the shortest.

    `limit` is the most tokens of a row and `setting` what sets it, "" if nothing does. With the setting at its tokens
    and `beyond` more a row is taken, up to the model's `context` (0: not known).
    """

    limit: int = 0
    setting: str = ""
    beyond: int = 0
    context: int = 0
    rows: int = 0
    known: Counter[int] = field(default_factory=Counter)

    @property
    def too_long(self) -> int:
        """How many rows exceed the limit."""
        return sum(count for tokens, count in self.known.items() if tokens > self.limit)

    def quantile(self, part: float) -> int | None:
        """The fewest tokens that `part` of the rows do not exceed; None if they are within the limit."""
        rank = max(math.ceil(part * self.rows), 1) - (self.rows - self.known.total())
        for tokens in sorted(self.known) if rank > 0 else ():
            rank -= self.known[tokens]
            if rank <= 0:
                return tokens
        return None

    def enough(self) -> int | None:
        """What the setting would have to be to keep 99 % of the rows; None if no setting does that, or it does."""
        tokens = self.quantile(KEPT)
        if not self.setting or tokens is None or tokens <= self.limit:
            return None
        return tokens + self.beyond if tokens + self.beyond <= (self.context or math.inf) else None

    def describe(self, of: str = "") -> str:
        """Share, quantiles and the way out; `of` says which rows they are."""
        found = {name: self.quantile(part) for name, part in PARTS.items()}
        tokens = ", ".join(f"{name} {f'at most {self.limit}' if x is None else x}" for name, x in found.items())
        bound = f"{self.setting}={self.limit + self.beyond}" if self.setting else f"a limit of {self.limit} tokens"
        share = f"{100 * self.too_long / max(self.rows, 1):.0f} %"
        enough = self.enough()
        keeps = f"; {self.setting}={enough} would keep 99 %" if enough else ""
        return (
            f"{self.too_long} of {self.rows} {of or 'rows'} ({share}) are too long for {bound}; tokens: {tokens}{keeps}"
        )


class Drops(Lengths):
    """What became of the rows taken so far: how many there were, and how long those were that were too long."""

    told = False
    hint = ""
    """The way out of the last one."""

    def note(self, outcome: object) -> None:
        """A row was taken; `outcome` is its error, or anything else."""
        self.rows += 1
        if isinstance(outcome, TooLong):
            self.hint, details = outcome.hint, outcome.details
            tokens = details.get("tokens", details.get("limit", 0) + 1)
            beyond = details.get("needed", tokens + isinstance(outcome, PromptTooLong)) - tokens
            # Of several limits the least: all of these rows exceed it.
            if (limit := details.get("limit", 0) - beyond) < self.limit or not self.known:
                self.limit, self.beyond, self.context = limit, beyond, details.get("context", 0)
                self.setting = details.get("setting", "max_batch_size")
            self.known[tokens] += 1

    def tell(self) -> None:
        """Warn, once, if more than half of the rows were too long."""
        if not self.told and 2 * self.too_long > self.rows:
            self.told = True
            log.warning("more than half of the rows are dropped: %s", self.describe())


@dataclass
class Checked:
    """Of `rows` rows: `lengths` of those that are taken (tokens of the longest part), how many of them are trained in
    parts, the tokens of all parts together, and the rows (counted from 1) that are refused, with the reason.
    """

    rows: int = 0
    lengths: list[int] = field(default_factory=list)
    split: int = 0
    tokens: int = 0
    errors: list[tuple[int, DataError | TokenizationError]] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Iterable[Any], parts: Callable[[Any], Sequence[int]]) -> Checked:
        """`parts` gives the tokens of each part of a row, or raises what will refuse it."""
        found = cls()
        for found.rows, row in enumerate(rows, 1):
            try:
                lengths = parts(row)
            except (DataError, TokenizationError) as error:
                found.errors.append((found.rows, error))
                continue
            found.lengths.append(max(lengths))
            found.split += len(lengths) > 1
            found.tokens += sum(lengths)
        return found

    @property
    def growth(self) -> float:
        """How many times their tokens the rows take when they are trained in parts."""
        return self.tokens / max(sum(self.lengths), 1)

    @property
    def refused(self) -> dict[str, list[int]]:
        """The rows that are refused, by reason."""
        found: dict[str, list[int]] = {}
        for row, error in self.errors:
            found.setdefault(str(error).replace("\n", "; "), []).append(row)
        return found

    def describe(self) -> list[str]:
        """A line for what is trained in parts, and one for each reason of a refusal, of many the commonest."""
        lines = [f"{self.split} trained in parts: {self.growth:.2f} times the tokens"] if self.split else []
        reasons = sorted(self.refused.items(), key=lambda item: -len(item[1]))
        for reason, rows in reasons[:REASONS]:
            named = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            lines.append(f"{len(rows)} refused (row {named}): {reason}")
        if other := sum(len(rows) for _, rows in reasons[REASONS:]):
            lines.append(f"{other} refused for {len(reasons) - REASONS} other reasons")
        return lines

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return {"rows": self.rows, "split": self.split, "growth": round(self.growth, 4), "refused": self.refused}


def histogram(lengths: Sequence[int], limit: int) -> list[tuple[int, int, int]]:
    """Bins (first length, last length, rows) of equal width; one of them ends at `limit`, if there are longer rows."""
    if not lengths:
        return []
    width = max(-(-min(limit, max(lengths)) // BINS), -(-max(lengths) // (4 * BINS)))
    edges = sorted({*range(0, max(lengths) + width, width), *([limit] if max(lengths) > limit else [])})
    return [(low + 1, high, sum(low < n <= high for n in lengths)) for low, high in pairwise(edges)]


@dataclass(frozen=True)
class Rows:
    """A dataset as training will take it: `parts` gives the tokens of each part in which a row is trained (one, unless
    its template makes it more), or raises what will refuse it.
    """

    name: str
    rows: Sequence[Any]
    parts: Callable[[Any], Sequence[int]]
    limits: Lengths
    """Without rows: what limits them."""

    def checked(self, places: Iterable[int], stopped: Callable[[], bool] = lambda: False) -> Checked:
        """What will become of the rows in these places; until `stopped` says so."""
        return Checked.of((self.rows[place] for place in takewhile(lambda _: not stopped(), places)), self.parts)

    def count(self, stopped: Callable[[], bool] = lambda: False, seconds: float = SECONDS) -> dict[str, Any]:
        """How many rows are too long, as plain data: of all, if that takes 30 s at most, else of 10,000 random ones."""
        total, began = len(self.rows), time.monotonic()
        chosen: Sequence[int] = range(total) if total <= SAMPLE else random.Random(0).sample(range(total), SAMPLE)
        found = self.checked(chosen, stopped)
        if total > SAMPLE and (time.monotonic() - began) * total / SAMPLE < seconds:
            whole = self.checked(range(total), lambda: stopped() or time.monotonic() - began > seconds)
            found = whole if whole.rows == total else found
        first = self.checked(range(min(FIRST, total)), stopped)
        lengths = replace(self.limits, rows=len(found.lengths), known=Counter(found.lengths))
        refused = Counter(error.code for _, error in found.errors)
        text = lengths.describe("" if found.rows == total else f"random rows (an estimate for all {total})")
        text += "".join(f"; {n} refused: {reason}" for reason, n in refused.items())
        return {
            "name": self.name,
            "rows": total,
            "counted": found.rows,
            "estimate": found.rows < total,
            "too_long": lengths.too_long,
            "limit": lengths.limit,
            "setting": lengths.setting,
            "tokens": {name: lengths.quantile(part) for name, part in PARTS.items()},
            "keeps_99_percent": lengths.enough(),
            "refused": dict(refused),
            "first": first.data(),
            "text": "\n         ".join([text, *(f"of the first {first.rows}, {line}" for line in first.describe())]),
        }


@dataclass
class PlannedRows:
    """What a dry run counts: datasets of training classes, and others that were loaded, for the first trained model."""

    trained: list[Rows] = field(default_factory=list)
    loaded: list[tuple[str, Sequence[StringThread]]] = field(default_factory=list)
    models: list[Callable[[str, Sequence[Any], bool], Rows]] = field(default_factory=list)
    """Of each training model: the Rows of a name, rows, and whether they are prompts."""

    def all(self) -> list[Rows]:
        """Each dataset once, where a class trains the very rows that were loaded."""
        known = {id(row) for rows in self.trained for row in rows.rows}
        found = list(self.trained)
        for name, threads in self.loaded if self.models else ():
            if id(threads[0]) not in known:
                rows = [sequences(thread) for thread in threads]
                prompts = not isinstance(rows[0], tuple) and rows[0].completion() is None
                found.append(self.models[0](name, rows, prompts))
        return found


def sequences(thread: StringThread) -> StringThread | tuple[StringThread, ...]:
    """A loaded row as it is trained: a preference as its two threads."""
    metadata = thread.metadata if isinstance(thread.metadata, dict) else {}
    sides = [metadata.get(name) for name in ("preferred_completion", "other_completion")]
    return tuple(thread.assistant(side) for side in sides if side) if all(sides) else thread
