"""Spawns with progress (documented path): futures beside the builder's coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from harmony_core.client.inference_model import InferenceModel
    from harmony_core.client.training_model import TrainingModel

T = TypeVar("T")
LOOK_SECONDS = 0.5


class SpawnFuture(Generic[T]):
    """A model that is being made. Await it, or `get()`."""

    def __init__(self, making: Coroutine[Any, Any, T]) -> None:
        self._task = asyncio.ensure_future(making)

    async def _await_progress(self) -> float:
        """Wait for progress, at most `LOOK_SECONDS`: 0 while the model is being made, then 1, also after a failure."""
        await asyncio.wait([self._task], timeout=LOOK_SECONDS)
        return float(self._task.done())

    async def get(self) -> T:
        """The model. Raises the error of its spawn."""
        return await self._task

    def __await__(self) -> Generator[Any, None, T]:
        return self._task.__await__()


class SpawnsWithProgress:
    """What a builder has beside its spawns. Needs a running event loop."""

    async def spawn_inference(self, name: str) -> InferenceModel:
        """Make the model live for generation and scoring."""
        raise NotImplementedError

    async def spawn_train(self, name: str, max_batch_size: int) -> TrainingModel:
        """Make the model live for training, too."""
        raise NotImplementedError

    def spawn_inference_with_progress(self, name: str) -> SpawnFuture[InferenceModel]:
        """Begin to `spawn_inference`."""
        return SpawnFuture(self.spawn_inference(name))

    def spawn_train_with_progress(self, name: str, max_batch_size: int) -> SpawnFuture[TrainingModel]:
        """Begin to `spawn_train`."""
        return SpawnFuture(self.spawn_train(name, max_batch_size))
