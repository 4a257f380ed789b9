"""The recipe's context: the client, its run's files and notifier, and the gates that it may declare.

The command line makes a context with `RecipeContext.create`. A notebook or a script gets one, with an engine and a run
of its own, from `await RecipeContext.load()` or `async with RecipeContext.from_config(config) as ctx`.
"""

from __future__ import annotations

import math
import operator
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict

from harmony_core.artifacts import log_eval_result
from harmony_core.client import EngineOptions, HarmonyClient
from harmony_core.errors import UsageError
from harmony_core.graders.evaluation import EvalSample
from harmony_core.home import Home
from harmony_core.journal import begin
from harmony_core.notifiers import StdoutJobNotifier, say
from harmony_core.plain_files import expanded, plain
from harmony_core.registry import Registry
from harmony_core.runs.run import Run

Comparison = Literal["<", "<=", ">", ">=", "==", "!="]

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


@dataclass(frozen=True)
class Gate:
    """A condition that a recipe declared on one of its results."""

    name: str
    value: float
    op: Comparison
    threshold: float
    passed: bool

    def __str__(self) -> str:
        return f"{self.name}: {self.value:g} {self.op} {self.threshold:g}{'' if self.passed else ' does not hold'}"


class RecipeConfig(BaseModel):
    """How a session is set up. The fields that address a remote service are taken and have no effect here."""

    model_config = ConfigDict(extra="forbid")

    ENVIRONMENT: ClassVar[str] = "ADAPTIVE_"

    harmony_url: str = "local"
    control_plane_url: str | None = None
    control_plane_internal_url: str | None = None
    control_plane_api_token: str | None = None
    num_gpus: int = 0
    """Number of ranks; 0 takes every visible CUDA device, else one CPU rank."""
    name: str | None = None
    recipe_name: str | None = None
    job_id: str | None = None
    project: str | None = None
    api_key: str | None = None
    compute_pool: str | None = None
    working_dir: str | None = None
    """Where the recipe's files go; default: the run's directory."""
    user_input_file: str | None = None
    resume_checkpoint_artifact_id: str | None = None
    hang_timeout: float = 600.0
    silence_timeout: float = 120.0
    save_wait: float | None = None
    """These three in seconds, as in `get_client`."""


class RecipeContext:
    """The context that a recipe's main function receives."""

    control_plane: None = None
    """A remote registry service; always None here."""
    checkpoint_restore_data: dict[str, Any] | None = None
    """The state from which a resumed run continues."""

    client: HarmonyClient
    """Builds models: `ctx.client.model("key")`."""
    job: StdoutJobNotifier
    """Stages and progress: `ctx.job.stage_notifier("Training")`."""
    config: RecipeConfig
    run: Run
    """The run's directory and events."""
    registry: Registry
    gates: list[Gate]
    """The gates declared so far, in order."""
    log_eval_result: Callable[[Sequence[EvalSample]], None] = staticmethod(log_eval_result)
    """Prints the mean score of each model by each grader, and writes scores and samples among the run's artifacts."""
    _working_dir: Path
    _owns_run: bool = False
    _endings: list[Callable[[bool], None]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("a recipe is given its RecipeContext; elsewhere it comes from `await RecipeContext.load()`")

    @classmethod
    def create(
        cls,
        client: HarmonyClient,
        run: Run,
        registry: Registry,
        working_dir: Path,
        job: StdoutJobNotifier,
        config: RecipeConfig | None = None,
    ) -> Self:
        """For code that runs recipes: a context over existing parts."""
        ctx = cls.__new__(cls)
        ctx.client, ctx.run, ctx.registry, ctx.job = client, run, registry, job
        ctx.config = config or RecipeConfig(job_id=job.job_id)
        ctx._working_dir, ctx.gates, ctx._endings = working_dir, [], []
        ctx.log_eval_result = partial(log_eval_result, job=job)
        job.directory, job.artifacts_dir = run.directory, working_dir / f"job_{job.job_id}" / "artifacts"
        return ctx

    @classmethod
    def from_config(cls, config: RecipeConfig) -> RecipeContextManager:
        """A context with an engine and a run of its own: await it, or use it with `async with`."""
        return RecipeContextManager(config)

    @classmethod
    async def load(cls) -> RecipeContext:
        """A context with an engine and a run of its own, configured by `ADAPTIVE_<FIELD>` variables; close it.

        Flags of the program, such as `--num-gpus 2`, win over the variables; flags of other names are the program's.
        """
        from harmony_core.recipe.runner import RecipeConfigCli  # the runner needs this module

        return await cls.from_config(RecipeConfigCli())

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.client.world_size

    @property
    def working_dir(self) -> Path:
        """The directory in which the recipe may write."""
        return _made(self._working_dir)

    @property
    def recipes_dir(self) -> Path:
        """For recipes' code: `<working_dir>/job_<id>/recipes`."""
        return _made(self._working_dir / f"job_{self.job.job_id}" / "recipes")

    @property
    def artifacts_dir(self) -> Path:
        """For files that the job leaves: `<working_dir>/job_<id>/artifacts`."""
        assert self.job.artifacts_dir is not None, "`create` sets it"
        return _made(self.job.artifacts_dir)

    @property
    def datasets_dir(self) -> Path:
        """For datasets: `<working_dir>/datasets`."""
        return _made(self._working_dir / "datasets")

    def gate(self, name: str, value: float, op: Comparison, threshold: float) -> bool:
        """Declare that `value op threshold` must hold for the run to succeed. Returns whether it holds.

        The recipe continues either way; a run with a gate that does not hold exits with 8. NaN never holds.
        """
        if op not in _COMPARE:
            raise UsageError(f"gate '{name}': {op!r} is no comparison", hint=f"one of {' '.join(_COMPARE)}")
        passed = not math.isnan(value) and _COMPARE[op](float(value), float(threshold))
        self.gates.append(Gate(name, float(value), op, float(threshold), passed))
        self.run.events.write("gate", plain(vars(self.gates[-1])))
        return passed

    def at_end(self, call: Callable[[bool], None]) -> None:
        """Register `call(failed)` to be called after the run has ended and the engine is gone, also after a failure."""
        self._endings.append(call)

    def end(self, failed: bool) -> None:
        """For code that runs recipes: make the calls registered by `at_end`, last one first."""
        while self._endings:
            self._endings.pop()(failed)

    def close(self) -> None:
        """Complete the job and begin to stop the engine; `aclose` also waits until it is gone."""
        self.job.complete()
        self.client.close()
        self._end()

    async def aclose(self) -> None:
        """Complete the job and stop the engine."""
        self.job.complete()
        await self.client.aclose()
        self._end()

    def _end(self, exit_code: int = 0) -> None:
        self.job.close()
        self.end(failed=exit_code != 0)
        # The command line ends its own runs, because it also knows the result.
        if self._owns_run:
            self.run.finish("failed" if exit_code else "succeeded", exit_code, {})


class RecipeContextManager:
    """The result of `RecipeContext.from_config`: awaitable, and an async context manager that closes."""

    def __init__(self, config: RecipeConfig) -> None:
        self._config = config
        self._ctx: RecipeContext | None = None

    async def _open(self) -> RecipeContext:
        config = self._config
        if config.resume_checkpoint_artifact_id:
            raise UsageError(
                f"resume_checkpoint_artifact_id={config.resume_checkpoint_artifact_id!r}: a session writes no"
                " checkpoints, and goes on from none",
                hint="a recipe's run can be resumed: adaptive run --resume RUN",
            )
        if "://" in config.harmony_url:
            say(f"{config.harmony_url}: there is no remote service; the engine runs on this machine")
        options = EngineOptions(
            log_dir=Path(),
            run_id="",
            num_processes=config.num_gpus or None,
            hang_timeout=config.hang_timeout,
            silence_timeout=config.silence_timeout,
            save_wait=config.save_wait,
        )
        home = Home.open()
        registry = Registry(home)
        run = Run.create(home, name=config.name or config.recipe_name or "session")
        options = replace(options, log_dir=run.directory / "logs", run_id=run.id)
        client = HarmonyClient.start(options, registry, run.events.write)
        job = StdoutJobNotifier(config.job_id or run.id, events=run.events.write)
        job.mark_running()
        begin(run.events.write, job, run.redactor)
        working_dir = expanded(config.working_dir) if config.working_dir else run.directory
        ctx = RecipeContext.create(client, run, registry, working_dir, job, config)
        ctx._owns_run = True
        return ctx

    def __await__(self) -> Generator[Any, None, RecipeContext]:
        return self._open().__await__()

    async def __aenter__(self) -> RecipeContext:
        self._ctx = await self._open()
        return self._ctx

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        assert self._ctx is not None, "the context manager was not entered"
        if exc_val is None:
            return await self._ctx.aclose()
        self._ctx.job.report_error("".join(traceback.format_exception(exc_val)))
        await self._ctx.client.aclose()
        self._ctx._end(getattr(exc_val, "exit_code", 1))


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory
