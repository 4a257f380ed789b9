"""The models that live on one rank: weights shared between spawns, adapters, trainers and page pools."""

from __future__ import annotations

import errno
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from msgspec import structs
from safetensors import SafetensorError
from torch import nn

from harmony_core.engine.inference.runner import Runner
from harmony_core.engine.models import adapters, weights
from harmony_core.engine.models.heads import SCORE, head_of
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.model import COMPILE_ERRORS, CausalLM
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.engine.training import optimizer
from harmony_core.engine.training.trainer import Trainer
from harmony_core.errors import ConflictError, EngineError, MemoryRefused, ModelRefused, ResourceError, storage_error
from harmony_core.rpc.platform import missing_tool
from harmony_core.rpc.protocol import Clone, Load, MakePool, Save, Spawn
from harmony_core.rpc.wire import Failure
from harmony_core.text import tokenizer_files

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Announce = Callable[[str, dict[str, Any]], None]

SHORT_REHEARSAL_TOKENS = 64
"""Enough to run every operation of a micro-batch once, so that one that cannot run fails early."""


@dataclass
class BaseWeights:
    """Base weights and the number of spawns that use them. `key` None: private, may be changed in place."""

    model: CausalLM
    key: tuple[str, int, torch.dtype] | None
    users: int = 1
    checkpointed_layers: int = 0
    """The highest count that one of their trainers asked for."""


@dataclass
class SpawnedModel:
    """One spawn on this rank. `poison` is the first failure of a sample that was accepted since the last step."""

    spawn: Spawn
    base: BaseWeights
    adapter: str | None = None
    score: nn.Parameter | None = None
    """The scalar head, `[1, d]`; None for a model with a vocabulary head."""
    trainer: Trainer | None = None
    runner: Runner | None = None
    """None with a scalar head, and in a copy until it gets a pool."""
    frozen_version: int = 0
    poison: Failure | None = None

    @property
    def name(self) -> str:
        """Name of the spawn."""
        return self.spawn.name

    @property
    def model(self) -> CausalLM:
        """The module and its place in the tensor-parallel group."""
        return self.base.model

    def version(self) -> int:
        """Policy version: optimizer steps of the weights."""
        return self.trainer.step if self.trainer else self.frozen_version

    def statistics(self) -> dict[str, float]:
        """Totals of the runner, and this rank's device memory in bytes, with peaks since the last call."""
        values = dict(self.runner.statistics) if self.runner else {}
        device = self.model.device
        if device.type == "cuda":
            values["memory_allocated"] = torch.cuda.memory_allocated(device)
            values["memory_reserved"] = torch.cuda.memory_reserved(device)
            values["memory_peak_allocated"] = torch.cuda.max_memory_allocated(device)
            values["memory_peak_reserved"] = torch.cuda.max_memory_reserved(device)
            torch.cuda.reset_peak_memory_stats(device)
        return values

    def held(self) -> dict[str, int]:
        """Bytes that this rank holds for the spawn, the part shared with other spawns, and its number of parameters."""
        trainer = self.trainer
        return {
            "parameter_bytes": self.model.parameter_bytes(self.adapter),
            "shared_bytes": self.model.parameter_bytes() if self.base.users > 1 else 0,
            "gradient_bytes": trainer.gradient_bytes if trainer else 0,
            "optimizer_bytes": trainer.state_bytes if trainer else 0,
            "kv_bytes": self.runner.cache.bytes if self.runner else 0,
            "num_parameters": self.model.num_parameters(),
            "trainable_parameters": trainer.num_trainable if trainer else 0,
        }


class ModelTable:
    """Every spawn on this rank by name."""

    def __init__(
        self, device: torch.device, deterministic: bool = False, announce: Announce = lambda _what, _fields: None
    ) -> None:
        """`announce` gets events, as type and fields: the start of long work, and degraded operation."""
        self.device = device
        self._announce = announce
        self._deterministic = deterministic
        self._models: dict[str, SpawnedModel] = {}
        self._shared: dict[tuple[str, int, torch.dtype], BaseWeights] = {}
        self._adapters = 0

    def get(self, name: str) -> SpawnedModel:
        """A live model. Raises ConflictError if no model has this name."""
        model = self._models.get(name)
        if model is None:
            raise ConflictError(f"no model named {name!r} is live on this rank")
        return model

    def live(self) -> list[SpawnedModel]:
        """Every model, in the order of their spawns."""
        return list(self._models.values())

    def spawn(self, request: Spawn, tp: TensorParallel, replicas: ProcessGroup | None) -> SpawnedModel:
        """Build a spawn and rehearse it. On an error all its memory is freed.

        Raises MemoryRefused if the device has less free memory than was promised.
        """
        with _refused(f"{request.name!r} was promised {request.promised_bytes} bytes", request.name):
            return self._spawn(request, tp, replicas)

    def _spawn(self, request: Spawn, tp: TensorParallel, replicas: ProcessGroup | None) -> SpawnedModel:
        made = SpawnedModel(request, self._take_weights(request, tp))
        with self._building(made):
            model = made.model
            made.adapter = self._make_adapter(model, request)
            made.score = head_of(model, made.adapter) if request.scalar else None
            if request.compile:
                self._compile(model, request.name)
            if request.train:
                made.base.checkpointed_layers = max(made.base.checkpointed_layers, request.checkpointed_layers)
                model.set_checkpointed_layers(made.base.checkpointed_layers)
                made.trainer = Trainer(model, made.adapter, dp_group=replicas, seed=request.seed, score=made.score)
            self._make_runner(made)
            if made.trainer is not None:
                short = min(SHORT_REHEARSAL_TOKENS, request.max_batch_tokens)
                made.trainer.rehearse(request.max_batch_tokens if request.rehearse else short)
            if made.runner is not None:
                made.runner.prepare()
        return made

    @contextmanager
    def _building(self, made: SpawnedModel) -> Iterator[None]:
        """Enter the model into the table when it is complete; on an error free all its memory."""
        built = False
        try:
            yield
            self._models[made.name] = made
            built = True
        finally:
            if not built:
                if made.trainer is not None:
                    made.trainer.close()
                self._give_back(made.base, made.adapter)

    def _take_weights(self, request: Spawn, tp: TensorParallel) -> BaseWeights:
        dtype = _dtype(request.dtype, self.device)
        key = (request.source.digest, tp.size, dtype)
        if not request.private and key in self._shared:
            self._shared[key].users += 1
            return self._shared[key]
        directory = Path(request.source.weights)
        # Shared weights keep their vocabulary head, because other spawns need it.
        model = load_model(
            directory, tp, self.device, dtype, deterministic=self._deterministic, scalar=request.headless
        )
        base = BaseWeights(model, None if request.private else key)
        if not request.private:
            self._shared[key] = base
        return base

    def _compile(self, model: CausalLM, name: str) -> None:
        """Compile the layers of a model. A pass that first needs the code generates it, for instance the rehearsal."""
        if model.compiled or self._deterministic:
            return
        missing = missing_tool()
        if missing:
            self._announce("not_compiled", {"model": name, "reason": f"this machine has {missing}"})
            return
        self._announce("compiling", {"model": name})
        model.compile()

    def _make_adapter(self, model: CausalLM, request: Spawn) -> str | None:
        if request.lora is None:
            return None
        name = self._new_adapter_name()
        if request.source.adapter:
            adapters.load_adapter(model, name, Path(request.source.adapter))
        else:
            adapters.add_lora(model, name, request.lora)
        if request.scalar and SCORE not in model.adapters[name].parameters:
            adapters.add_score(model, name)
        return name

    def _make_runner(self, made: SpawnedModel) -> None:
        spawn = made.spawn
        if not spawn.scalar:
            made.runner = Runner(
                *(made.model, spawn.kv_tokens),
                adapter=made.adapter,
                notify=self._announce,
                tokenless=spawn.tokenless,
                tokenizer=lambda: tokenizer_files.read(Path(spawn.tokenizer)).tokenizer.to_str(),
            )

    def _new_adapter_name(self) -> str:
        """A generated name: the name of a spawn may have characters that a module name may not."""
        self._adapters += 1
        return f"adapter_{self._adapters}"

    def _give_back(self, base: BaseWeights, adapter: str | None) -> None:
        base.users -= 1
        if base.users == 0 and base.key is not None:
            del self._shared[base.key]
        elif base.users and adapter is not None and adapter in base.model.adapters:
            adapters.remove_adapter(base.model, adapter)

    def clone(self, request: Clone) -> SpawnedModel:
        """Make a frozen copy of a model's trained state: A and B of an adapter, else the weights. It has no pool.

        On an error all its memory is freed. Raises MemoryRefused as `spawn` does.
        """
        source = self.get(request.source)
        with _refused(f"{request.name!r} was promised a copy of {request.source!r}", request.name):
            base = source.base
            if base.key is None:
                base = BaseWeights(source.model.copy_weights(), None)
            else:
                base.users += 1
            made = SpawnedModel(source.spawn.copied(request.name), base, frozen_version=source.version())
            with self._building(made):
                if source.adapter is not None:
                    made.adapter = self._new_adapter_name()
                    adapters.copy_adapter(source.model, source.adapter, made.adapter)
                made.score = None if source.score is None else head_of(base.model, made.adapter)
        return made

    def make_pool(self, request: MakePool) -> SpawnedModel:
        """Allocate a model's pool, so that it can generate. Raises MemoryRefused as `spawn` does."""
        live = self.get(request.model)
        with _refused(f"the pool of {request.model!r} was promised its memory", request.model):
            live.spawn = structs.replace(live.spawn, kv_tokens=request.kv_tokens)
            self._make_runner(live)
            assert live.runner is not None, "no model with a scalar head asks for pages"
            live.runner.prepare()
        return live

    def drop_pool(self, name: str) -> None:
        """Free a model's pool."""
        live = self.get(name)
        if live.runner is not None:
            live.runner.close()
        live.runner, live.spawn = None, structs.replace(live.spawn, kv_tokens=0)

    def dealloc(self, name: str) -> None:
        """Free a model. Unknown names are ignored."""
        live = self._models.pop(name, None)
        if live is not None:
            if live.trainer is not None:
                live.trainer.close()
            if live.runner is not None:
                live.runner.close()
            base, adapter = live.base, live.adapter
            del live
            self._give_back(base, adapter)
            # Adapters and some layers have reference cycles: only a garbage collection frees their weights.
            del base
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def save(self, request: Save, write: bool) -> None:
        """Gather over the tensor-parallel ranks and, with `write`, store.

        Raises EngineError for weights with a NaN or an infinity, which are useless, and ResourceError.
        """
        live = self.get(request.model)
        bad: str | None = None
        failures: list[Exception] = []
        for part in (self._save_weights, self._save_optimizer):
            try:
                bad = part(live, request, write and not failures) or bad
            except (OSError, SafetensorError) as error:  # raised after the other ranks have finished gathering
                failures.append(error)
        if failures:
            raise storage_error(f"cannot save {request.model!r} to {request.directory}", _as_os_error(failures[0]))
        if bad is not None:
            raise EngineError(
                f"{request.model!r} is not saved: {bad} holds NaN or infinite values",
                hint="look at the last steps; an earlier checkpoint may be good",
                tensor=bad,
            )

    def _save_weights(self, live: SpawnedModel, request: Save, write: bool) -> str | None:
        directory = Path(request.directory)
        if live.adapter is None:
            return weights.save_model(live.model, directory, write=write)
        base, revision = request.base, request.base_revision
        return weights.save_adapter(live.model, live.adapter, directory, base, write=write, revision=revision)

    def _save_optimizer(self, live: SpawnedModel, request: Save, write: bool) -> None:
        if not request.inference_only and live.trainer is not None:
            live.trainer.save_optimizer(Path(request.directory), write=write)

    def load(self, request: Load) -> None:
        """Replace weights in place, and the optimizer state if the source has one.

        Shared base weights are immutable: a model that uses them gets a private copy first.
        """
        live = self.get(request.model)
        if live.adapter is None and live.base.key is not None:
            self._make_private(live)
        directory = Path(request.source.adapter or request.source.weights)
        weights.load_into(live.model, directory, adapter=live.adapter)
        if live.runner is not None:
            live.runner.weights_changed()
        if live.trainer is not None:
            live.trainer.weights_changed()
            if (directory / optimizer.FILE).is_file():
                live.trainer.load_optimizer(directory)

    def _make_private(self, live: SpawnedModel) -> None:
        copy = BaseWeights(live.model.copy_weights(), None)
        self._give_back(live.base, None)
        live.base = copy
        # The pool stays: running sequences keep their keys and values.
        if live.runner is not None:
            live.runner.rebind(copy.model)
        if live.score is not None:
            live.score = head_of(copy.model, live.adapter)


@contextmanager
def _refused(promised: str, name: str) -> Iterator[None]:
    """Convert out-of-memory errors of the device and errors of the compiler to HarmonyErrors."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise MemoryRefused(
            f"{promised}, and the device ran out: {error}",
            hint="another process uses this device, or the plan is too low: try --memory with less, or a smaller "
            "max_batch_size",
        ) from error
    except COMPILE_ERRORS as error:
        reason = str(error).strip().partition("\n")[0]
        raise ResourceError(
            f"the layers of {name!r} could not be compiled: {reason}",
            hint="run with --no-compile; this rank's log has the whole error",
        ) from error


def _dtype(name: str, device: torch.device) -> torch.dtype:
    known = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
    if not name:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in known:
        raise ModelRefused(f"dtype {name!r} is not one of {', '.join(known)}")
    return known[name]


def _as_os_error(error: Exception) -> OSError:
    """The system's error, which safetensors only quotes in its message."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]) if number else errno.EIO, str(error))
