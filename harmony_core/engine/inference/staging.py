"""The host's side of a step on a device: what is sent, what comes back, and when.

One `Staging` serves one step at a time: it is free again once its step was collected, so nothing overwrites memory
that a copy still reads. n rows of a bucket.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROW_BYTES = 72
"""Of the packed input: six numbers of its draw, slot, place in the table, context, page."""


@dataclass(frozen=True)
class Rows:
    """The packed input of n rows on the device.

    `draws` `[6, n]` float64; `slots`, `places` `[n]` int64; `contexts`, `pages` `[n]` int32. Before the step `pages`
    go to the flat `places` of the page table.
    """

    draws: Tensor
    slots: Tensor
    places: Tensor
    contexts: Tensor
    pages: Tensor

    @staticmethod
    def of(buffer: Tensor, n: int) -> Rows:
        """The parts of a buffer of bytes."""
        wide = buffer[: 64 * n].view(torch.int64)
        narrow = buffer[64 * n : ROW_BYTES * n].view(torch.int32)
        draws = buffer[: 48 * n].view(torch.float64).view(6, n)
        return Rows(draws, wide[6 * n : 7 * n], wide[7 * n :], narrow[:n], narrow[n:])


@dataclass(frozen=True)
class Padding:
    """What a row of padding says: nothing is drawn, and only the spare page is touched."""

    slot: int
    place: int
    page: int


class Staging:
    """Buffers of the host for one step of at most `rows` rows, and its first and last moment on the device."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._timed = device.type == "cuda"
        self.inputs = torch.empty(ROW_BYTES * rows, dtype=torch.uint8, pin_memory=self._timed)
        self.outputs = torch.empty(3 * rows, dtype=torch.float64, pin_memory=self._timed)
        self._bytes = self.inputs.numpy()
        self._seconds = 0.0
        if self._timed:
            # Waiting sleeps: a step takes milliseconds, and the cores belong to the other threads.
            self._first = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._last = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]

    def start(self) -> None:
        """The step begins, behind whatever the device has to do before."""
        if self._timed:
            self._first.record()
        else:
            self._seconds = -time.perf_counter()

    def stop(self) -> None:
        """Everything of the step has been enqueued."""
        if self._timed:
            self._last.record()
        else:
            self._seconds += time.perf_counter()

    def wait(self) -> float:
        """Wait for the end of the step; the seconds it took on the device."""
        if self._timed:
            self._last.synchronize()
            return float(self._first.elapsed_time(self._last)) / 1e3
        return self._seconds

    def pack(
        self,
        n: int,
        padding: Padding,
        slots: NDArray[np.int32],
        contexts: NDArray[np.int32],
        draws: NDArray[np.float64],
        places: NDArray[np.int64],
        pages: NDArray[np.int32],
    ) -> Tensor:
        """`inputs` filled for n rows, the part of it that is used. `draws` `[6, N]`; all may be shorter than n."""
        numbers = self._bytes[: 48 * n].view(np.float64).reshape(6, n)
        wide = self._bytes[48 * n : 64 * n].view(np.int64).reshape(2, n)
        narrow = self._bytes[64 * n : ROW_BYTES * n].view(np.int32).reshape(2, n)
        numbers[:, : draws.shape[1]] = draws
        numbers[:, draws.shape[1] :] = 0
        for row, values, rest in (
            (wide[0], slots, padding.slot),
            (wide[1], places, padding.place),
            (narrow[0], contexts, 1),
            (narrow[1], pages, padding.page),
        ):
            row[: len(values)] = values
            row[len(values) :] = rest
        return self.inputs[: ROW_BYTES * n]
