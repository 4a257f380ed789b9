"""Lengths of dataset rows in tokens, and which rows are trained whole, trained in parts or refused, with the reason.

This module is independent of models: its callers pass functions that measure a row, and the limits.
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
from harmony_core.text.threads import StringThread, TokenizedThread

log = logging.getLogger(__name__)

PARTS = {"50 %": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
KEPT = 0.99
SAMPLE = 10_000  # rows counted if counting the whole dataset takes longer than `SECONDS`
SECONDS = 30.0
FIRST = 200  # rows that a dry run checks
BINS, REASONS = 10, 10  # the approximate maximum that is shown


@dataclass
class Lengths:
    """Lengths of rows in tokens. Rows of unknown length are within the limit and count as the shortest.

    `limit` is the maximum length of a row and `setting` the name of the setting for it, if there is one. A row needs a
    setting of its tokens plus `beyond`, up to the model's `context` (0 if unknown).
    """

    limit: int = 0
    setting: str = ""
    beyond: int = 0
    context: int = 0
    rows: int = 0
    known: Counter[int] = field(default_factory=Counter)

    @property
    def too_long(self) -> int:
        """The number of rows that exceed the limit."""
        return sum(count for tokens, count in self.known.items() if tokens > self.limit)

    def quantile(self, part: float) -> int | None:
        """The length that `part` of the rows do not exceed; None if it is unknown, and therefore within the limit."""
        rank = max(math.ceil(part * self.rows), 1) - (self.rows - self.known.total())
        for tokens in sorted(self.known) if rank > 0 else ():
            rank -= self.known[tokens]
            if rank <= 0:
                return tokens
        return None

    def enough(self) -> int | None:
        """The setting that would keep 99 % of the rows; None if the current one does, or if no setting would."""
        tokens = self.quantile(KEPT)
        if not self.setting or tokens is None or tokens <= self.limit:
            return None
        return tokens + self.beyond if tokens + self.beyond <= (self.context or math.inf) else None

    def describe(self, of: str = "") -> str:
        """The share of rows that are too long, the quantiles and a better setting; `of` names the rows."""
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
    """Counts rows as they are tokenized, with the lengths of the rows that were too long and the hint of the last."""

    warned = False
    hint = ""

    def note(self, outcome: object) -> None:
        """Count a row; `outcome` is its error or its result."""
        self.rows += 1
        if isinstance(outcome, TooLong):
            self.hint, details = outcome.hint, outcome.details
            tokens = details.get("tokens", details.get("limit", 0) + 1)
            beyond = details.get("needed", tokens + isinstance(outcome, PromptTooLong)) - tokens
            # The smallest of several limits: all of these rows exceed it.
            if (limit := details.get("limit", 0) - beyond) < self.limit or not self.known:
                self.limit, self.beyond, self.context = limit, beyond, details.get("context", 0)
                self.setting = details.get("setting", "max_batch_size")
            self.known[tokens] += 1

    def tell(self) -> None:
        """Warn, once, if more than half of the rows were too long."""
        if not self.warned and 2 * self.too_long > self.rows:
            self.warned = True
            log.warning("more than half of the rows are dropped: %s", self.describe())


@dataclass
class Checked:
    """The result of checking `rows` rows.

    `lengths` are the tokens of the longest part of each accepted row. `split` is the number of rows trained in parts
    and `tokens` the sum over all parts. `errors` are the numbers (from 1) and the errors of refused rows.
    """

    rows: int = 0
    lengths: list[int] = field(default_factory=list)
    split: int = 0
    tokens: int = 0
    errors: list[tuple[int, DataError | TokenizationError]] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Iterable[Any], parts: Callable[[Any], Sequence[int]]) -> Checked:
        """Check rows; `parts` returns the tokens of each part of a row or raises its error."""
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
        """The tokens of all parts, divided by those of the longest parts."""
        return self.tokens / max(sum(self.lengths), 1)

    @property
    def refused(self) -> dict[str, list[int]]:
        """The refused rows by reason."""
        found: dict[str, list[int]] = {}
        for row, error in self.errors:
            found.setdefault(str(error).replace("\n", "; "), []).append(row)
        return found

    def describe(self) -> list[str]:
        """A line about rows trained in parts and one for each of the most frequent reasons for refusals."""
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
    """Bins (first length, last length, rows) of equal width; one bin ends at `limit` if there are longer rows."""
    if not lengths:
        return []
    width = max(-(-min(limit, max(lengths)) // BINS), -(-max(lengths) // (4 * BINS)))
    edges = sorted({*range(0, max(lengths) + width, width), *([limit] if max(lengths) > limit else [])})
    return [(low + 1, high, sum(low < n <= high for n in lengths)) for low, high in pairwise(edges)]


@dataclass(frozen=True)
class Rows:
    """A dataset as it will be trained.

    `parts` returns the tokens of each part in which a row is trained (usually one) or raises its error. `limits` are
    the limits of rows, without lengths.
    """

    name: str
    rows: Sequence[Any]
    parts: Callable[[Any], Sequence[int]]
    limits: Lengths

    def checked(self, places: Iterable[int], stopped: Callable[[], bool] = lambda: False) -> Checked:
        """Check the rows at these indices until `stopped` returns true."""
        return Checked.of((self.rows[place] for place in takewhile(lambda _: not stopped(), places)), self.parts)

    def count(self, stopped: Callable[[], bool] = lambda: False, seconds: float = SECONDS) -> dict[str, Any]:
        """Count the rows that are too long: all rows if that takes at most 30 s, otherwise 10,000 random ones."""
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
    """The datasets that a dry run counts: those of training classes and others that were loaded.

    `models` has a function for each training model: from a name, rows, and whether they are prompts it makes Rows.
    """

    trained: list[Rows] = field(default_factory=list)
    loaded: list[tuple[str, Sequence[StringThread]]] = field(default_factory=list)
    models: list[Callable[[str, Sequence[Any], bool], Rows]] = field(default_factory=list)

    def all(self) -> list[Rows]:
        """Each dataset once, even if a class trains rows that were loaded."""
        known = {id(row) for rows in self.trained for row in rows.rows}
        found = list(self.trained)
        for name, threads in self.loaded if self.models else ():
            if id(threads[0]) not in known:
                rows = [sequences(thread) for thread in threads]
                prompts = not isinstance(rows[0], tuple) and rows[0].completion() is None
                found.append(self.models[0](name, rows, prompts))
        return found


def sequences(thread: StringThread) -> StringThread | tuple[StringThread, ...]:
    """The sequences of a loaded row: a preference has two threads."""
    metadata = thread.metadata if isinstance(thread.metadata, dict) else {}
    sides = [metadata.get(name) for name in ("preferred_completion", "other_completion")]
    return tuple(thread.assistant(side) for side in sides if side) if all(sides) else thread


def growth(parts: Sequence[TokenizedThread]) -> float:
    """The tokens of all parts of a thread, divided by those of its longest part; 1 if the thread is not split."""
    lengths = [len(part.token_ids) for part in parts]
    return sum(lengths) / max(lengths)
