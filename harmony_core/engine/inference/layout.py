"""Where the tokens of a step that is not a device's decode step are: positions, and slots of the pages."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from harmony_core.engine.inference.step import StepPlan, int32


class Layout:
    """Where a plan's tokens are: positions and write slots `[T]`, and the last token of each sequence in the row."""

    def __init__(self, plan: StepPlan, table: NDArray[np.int32], page_size: int) -> None:
        self.page_size = page_size
        self.slots = int32(plan.slots).astype(np.int64)
        self.lengths = int32(plan.lengths).astype(np.int64)
        self.contexts = int32(plan.contexts).astype(np.int64)
        most = -(-int(self.contexts.max()) // page_size)
        self.table = table[self.slots, :most].astype(np.int64)
        self.ends = np.cumsum(self.lengths) - 1
        row = np.arange(len(self.lengths))
        self.positions = self.contexts - 1
        if self.lengths.max() > 1:
            row = np.repeat(row, self.lengths)
            # The last token of each sequence has this position and this place in the row; the others go up to it.
            self.positions = np.arange(len(row)) + (self.contexts - self.ends - 1)[row]
        self.write_slots = self.table[row, self.positions // page_size] * page_size + self.positions % page_size

    def read_slots(self) -> NDArray[np.int64] | None:
        """`[B, longest context]`, or None for whole prompts, which have no past. Padding names a slot of the pool."""
        if (self.lengths == self.contexts).all():
            return None
        slots = self.table[:, :, None] * self.page_size + np.arange(self.page_size)
        return slots.reshape(len(slots), -1)[:, : self.contexts.max()]
