"""`CheckpointManager` for training loops of a recipe's own (documented path), over the run's checkpoints.

manager = CheckpointManager("mine", data, threads, callbacks, hyperparams_hash, stage_notifier, MyData,
                            checkpoint_restore_data=ctx.checkpoint_restore_data)
manager.register_model(model, "model_checkpoint_name")
if not manager.should_skip():
    await manager.restore_checkpoint_data(load)          # load(MyData(...)), in a resumed run
    while ...:
        ...                                              # one whole step
        if await manager.maybe_checkpoint(completion, save):    # await save() -> {"optim_step": ...}
            break
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Generic

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypeVar

from harmony_core.algorithms.callbacks import RecipeCallback
from harmony_core.algorithms.checkpointing import Checkpointing
from harmony_core.data.datasets import DataSet
from harmony_core.loggers import Logger
from harmony_core.notifiers import StageNotifier
from harmony_core.runs.checkpoints import Checkpoint

if TYPE_CHECKING:
    from harmony_core.client import TrainingModel


class BaseCheckpointData(BaseModel):
    """What a loop is given to go on from. The data, the callbacks and the logger are restored already."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    recipe_type: str
    dataset_hash: str
    hyperparams_hash: str
    dataset_idx: int = 0
    dataset_access_indices: list[int] = []
    dataset_rng_state: Any = None
    callback_last_calls: list[float] = []
    completion_percentage: float = 0.0
    logger_state: dict[str, Any] = {}


class SFTCheckpointData(BaseCheckpointData):
    """With the model's key and its steps."""

    model_checkpoint_name: str
    optim_step: int


class GRPOCheckpointData(SFTCheckpointData):
    """The same of a policy."""


class PPOCheckpointData(SFTCheckpointData):
    """Of a policy and of its value model."""

    value_model_checkpoint_name: str
    value_optim_step: int


class ENVGRPOCheckpointData(SFTCheckpointData):
    """Of a policy, with the number of samples begun."""

    sample_index_counter: int = 0


class StageCheckpoint(BaseModel):
    """The stages of a run: the running one with its data, and those that have ended."""

    active_stage: str
    completed_stages: list[str] = []
    data: dict[str, Any] = {}


DataT = TypeVar("DataT", bound=BaseCheckpointData, default=BaseCheckpointData)


class CheckpointManager(Checkpointing, Generic[DataT]):
    """Saves and restores a loop that a recipe writes itself; training classes do this without being asked.

    A registered model is saved with its optimizer, as a version of `checkpoints/<job>/<stage>-<recipe_key>` in the
    registry, and loaded before `load` is called; its exact reference stands under `recipe_key` in the data. Nothing is
    saved outside of a run. Raises UsageError on resume if the data or `hyperparams_hash` differ.
    """

    def __init__(
        self,
        recipe_name: str,
        dataset: DataSet[Any],
        threads_dataset: Sequence[Any],
        callbacks: Sequence[RecipeCallback],
        hyperparams_hash: str,
        stage_notifier: StageNotifier,
        checkpoint_data_cls: type[DataT] = BaseCheckpointData,  # type: ignore[assignment]
        checkpoint_frequency: float = 0.2,
        checkpoint_restore_data: dict[str, Any] | None = None,
        logger: Logger | None = None,
    ) -> None:
        self._dataset, self._data_cls, self._logger = dataset, checkpoint_data_cls, logger
        self._registered: dict[str, TrainingModel] = {}
        self._data: dict[str, Any] = {}
        self._inside = ExitStack()
        self._number: int | None = None
        super().__init__(
            recipe_name,
            stage_notifier,
            models={},
            parts={"data": dataset, "loop": self, **({} if logger is None else {"logger": logger})},
            samples=threads_dataset,
            settings={"hyperparams_hash": hyperparams_hash},
            callbacks=callbacks,
            frequency=checkpoint_frequency,
            restore_data=checkpoint_restore_data,
        )

    def get_state(self) -> dict[str, Any]:
        """What the loop's function and the registered models gave for the last checkpoint."""
        return self._data

    def set_state(self, state: dict[str, Any], /) -> None:
        """Continue from `get_state`."""
        self._data = state

    def register_model(self, model: TrainingModel, recipe_key: str) -> None:
        """Save this model with every checkpoint, its reference under `recipe_key`."""
        self._registered[recipe_key] = model

    @classmethod
    def reset_stage_counter(cls) -> None:
        """Has no effect: the run counts its stages."""

    @property
    def stage_suffix(self) -> str:
        """`-stage<n>` from the second stage of a run on, else empty."""
        return f"-stage{self._number}" if self._number else ""

    def is_enabled(self) -> bool:
        """Whether checkpoints are written."""
        return self._run is not None and self._run.enabled

    def _found(self) -> tuple[Checkpoint, dict[str, Any]] | None:
        """The checkpoint of this stage in a resumed run. The first call begins the stage."""
        if self._run is None:
            return None
        if self._number is None:
            self._number = self._inside.enter_context(self._run.stage(self.stage.stage_name))
            self._note_facts()
        return self._run.found(self._number, self.stage.stage_name, self.algorithm)

    def should_skip(self) -> bool:
        """Whether a resumed run has finished this stage; it is then reported as done."""
        found = self._found()
        if found is None or self._run is None or "checkpoint" not in found[1]:
            return False
        self._run.finished.append(found[1])
        self.stage.report_progress(1, 1)
        self._inside.close()
        return True

    async def restore_checkpoint_data(
        self, recipe_specific_checkpoint_loading: Callable[[DataT], Awaitable[None]]
    ) -> None:
        """In a resumed run: restore data, callbacks, logger and registered models, then call the loop's function."""
        if (found := self._found()) is None:
            return
        await self._restore(*found)
        for key, model in self._registered.items():
            await model.load(self._data[key])
        data = {
            "recipe_type": self.algorithm,
            "dataset_hash": self._facts["data"]["sha256"],
            "hyperparams_hash": self._settings["hyperparams_hash"],
            "dataset_idx": self._dataset.idx,
            "dataset_access_indices": self._dataset.access_indices,
            "callback_last_calls": [callback.last_call for callback in self._callbacks],
            "completion_percentage": found[1]["completion_percentage"],
            "logger_state": self._logger.get_state() if self._logger else {},
        }
        await recipe_specific_checkpoint_loading(self._data_cls(**(data | self._data)))

    async def maybe_checkpoint(
        self,
        completion_percentage: float,
        recipe_specific_checkpoint_saving: Callable[[], Awaitable[dict[str, Any]]],
    ) -> bool:
        """Call this after each step; it saves when a checkpoint is due. True: the loop must end, as requested.

        The call at 1 ends the stage. When the run is being stopped it saves and raises CancelledError.
        """
        self._found()
        ended = completion_percentage >= 1
        if self.is_enabled() and (ended or self.is_due(completion_percentage)):
            self._data = await recipe_specific_checkpoint_saving()
            name = f"checkpoints/{self.stage.job_notifier.job_id}/{self.stage.stage_name}{self.stage_suffix}"
            for key, model in self._registered.items():
                self._data[key] = await model.save(f"{name}-{key}", inference_only=False)
        left = await self.step_done(completion_percentage)
        if ended and self._run is not None:
            await self._save(1.0, {"completion_percentage": 1.0})
            self._inside.close()
        return left
