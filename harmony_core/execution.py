"""Running a recipe: engine, context, `main`, and an end in every case."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from harmony_core.checkpoint_files import Checkpoint, CheckpointStore
from harmony_core.checkpoints import RunCheckpoints, going_on
from harmony_core.client import DryRunEnded, EngineOptions, HarmonyClient
from harmony_core.context import RecipeContext
from harmony_core.errors import HarmonyError, RunTimeout, UsageError
from harmony_core.frames import place_of
from harmony_core.interruption import Interruption
from harmony_core.journal import kept
from harmony_core.notifiers import ProgressSink, StdoutJobNotifier, say
from harmony_core.outcome import Outcome, leaves
from harmony_core.recipe import InputConfig, Recipe
from harmony_core.recipe_file import RecipeFile
from harmony_core.registry import Registry
from harmony_core.run import Run

CLOSE_SECONDS = 5.0

MAX_LAST_EVENTS = 16 * 2**20
"""Bytes of events of which a report is still made when the process is ended at once; reading these takes a second."""


@dataclass(frozen=True)
class RunOptions:
    """What the runner's own flags say. `memory` in bytes, `timeout` in seconds."""

    num_processes: int | None = None
    device: str = "auto"
    accelerate_config: Path | None = None
    memory: int | None = None
    seed: int = 0
    timeout: float | None = None
    rehearse: bool = False
    deterministic: bool = False
    compile: bool = True
    dry_run: bool = False
    assume: str | None = None
    keep_checkpoints: int = 2
    resumed: Checkpoint | None = None
    """What the run continues from."""
    allow_change: bool = False

    def as_data(self) -> dict[str, Any]:
        """What a resumed run is started with again, as JSON holds it."""
        placed = ("num_processes", "device", "memory", "compile")
        again = (*placed, "seed", "rehearse", "deterministic", "keep_checkpoints")
        data = {name: getattr(self, name) for name in again}
        return data | {"accelerate_config": str(self.accelerate_config) if self.accelerate_config else None}

    def for_engine(self, run: Run) -> EngineOptions:
        """The part that the engine is given."""
        return EngineOptions(
            log_dir=run.log_dir,
            run_id=run.id,
            num_processes=self.num_processes,
            device=self.device,
            accelerate_config=self.accelerate_config,
            memory=self.memory,
            seed=self.seed,
            rehearse=self.rehearse,
            deterministic=self.deterministic,
            compile=self.compile,
            dry_run=self.dry_run,
            assume=self.assume,
            resumed=self.resumed is not None,
        )


class RecipeExit(Exception):
    """The recipe called `sys.exit` or was interrupted by its own hand."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"the recipe called {type(cause).__name__}({cause})")
        self.code = cause.code if isinstance(cause, SystemExit) else 1


async def execute(
    recipe: Recipe,
    config: InputConfig | None,
    options: RunOptions,
    run: Run,
    registry: Registry,
    sink: ProgressSink | None = None,
    stop: Interruption | None = None,
) -> Outcome:
    """Run the recipe to its end and stop the engine. Never raises what the recipe raised: it is in the outcome.

    `sink` draws progress. `stop` is an interruption that the caller has entered around the event loop; without one,
    signals are not taken and `options.timeout` alone is kept.
    """
    if stop is None:
        with Interruption(options.timeout, say, owns_process=False) as stop:
            return await execute(recipe, config, options, run, registry, sink, stop)
    outcome = Outcome()
    run.events.listen(lambda event: outcome.models.append(event["data"]) if event["type"] == "model.saved" else None)
    run.events.listen(_tell_of_compiling)
    stop.last_words = _last_words(run, outcome)
    with _forgotten(outcome):
        try:
            engine = replace(options.for_engine(run), recipe=RecipeFile(recipe.path, recipe.sha256))
            client = HarmonyClient.start(engine, registry, run.events.write)
        except HarmonyError as error:
            outcome.fail(error)
            return outcome
        job = StdoutJobNotifier(run.id, sink=sink, events=run.events.write)
        ctx = RecipeContext.create(client, run, registry, run.directory, job)
        try:
            if not options.dry_run:
                ctx.checkpoint_restore_data = _attach_checkpoints(ctx, config, options, stop)
            with kept(run.events.write, job):  # a task keeps the context in which it is made
                task = asyncio.get_running_loop().create_task(_call(recipe, config, ctx), name="recipe")
            stop.watch(task)
            job.mark_running()
            await asyncio.wait([task])
            _record(task, ctx, outcome, run)
        except HarmonyError as error:
            outcome.fail(error)
        finally:
            outcome.plan = list(client.planned)
            job.close()
            await client.aclose(min(CLOSE_SECONDS, max(0.0, stop.seconds_left - 2)))
    if options.dry_run and outcome.exit_code == 0:
        outcome.status = "planned"
    _count_stop(stop, outcome, options)
    ctx.end(failed=outcome.exit_code not in (0, 8))
    if not options.dry_run:
        outcome.resume = going_on(CheckpointStore(run.directory / "checkpoints"), run.id, outcome.status)
    if outcome.resume is not None and outcome.exit_code not in (0, 2, 8):
        at = "{checkpoint}, {stage} at {completion:.1%}".format_map(outcome.resume)
        say(f"to go on from {at}: {outcome.resume['command']}")
    return outcome


def _attach_checkpoints(
    ctx: RecipeContext, config: InputConfig | None, options: RunOptions, stop: Interruption
) -> dict[str, Any] | None:
    """Let the job's training classes save, continue and be stopped. Raises UsageError for another machine or seed."""
    client, run = ctx.client, ctx.run
    facts = {
        "ranks": client.world_size,
        "device": client.device,
        "seed": options.seed,
        "deterministic": options.deterministic,
    }
    store = CheckpointStore(run.directory / "checkpoints", options.keep_checkpoints)
    plain = run.redactor.data(config.model_dump(mode="json")) if config is not None else {}
    checkpoints = RunCheckpoints(store, facts, options.resumed, options.allow_change, plain)
    checkpoints.saving = stop.saving
    ctx.job.checkpoints = checkpoints
    stop.patience, stop.resumable = checkpoints.stop, lambda: bool(store.names())
    run.note(options=options.as_data() | {"num_processes": client.world_size, "device": client.device})
    return checkpoints.restore_data


def _tell_of_compiling(event: dict[str, Any]) -> None:
    """Say why a spawn takes longer than usual, or will be slower: once, for the first rank."""
    if event["type"] == "compiling" and event["rank"] == 0:
        say(f"compiling the layers of {event['data']['model']!r}: about 20 s the first time, then from the cache")
    elif event["type"] == "not_compiled" and event["rank"] == 0:
        say(f"warning: {event['data']['reason']}: layers run uncompiled, and slower")


async def _call(recipe: Recipe, config: InputConfig | None, ctx: RecipeContext) -> Any:
    # These two would leave the event loop at once, with the engine still running.
    try:
        result = recipe.call(config, ctx)
        return await result if inspect.isawaitable(result) else result
    except (SystemExit, KeyboardInterrupt) as error:
        raise RecipeExit(error) from error


def _record(task: asyncio.Task[Any], ctx: RecipeContext, outcome: Outcome, run: Run) -> None:
    """Put the end of the recipe's task into the outcome."""
    error: BaseException | None = asyncio.CancelledError() if task.cancelled() else task.exception()
    outcome.gates = [vars(gate) for gate in ctx.gates]
    if error is not None and all(isinstance(leaf, DryRunEnded) for leaf in leaves(error)):
        ended = next(leaf for leaf in leaves(error) if isinstance(leaf, DryRunEnded))
        # A verb in a task of its own has no recipe on its stack, but its exception has passed through the recipe.
        outcome.planned_until = Path(place_of(ended) or ended.where).name
        error = None
    elif isinstance(error, RecipeExit) and error.code in (None, 0):
        error = None
    elif error is None:
        outcome.result = task.result()
    if error is None and ctx.job.checkpoints is not None and ctx.job.checkpoints.unused:
        error = UsageError(
            "the run was resumed from a checkpoint, and no training class took it",
            hint="give the class ctx.job.stage_notifier(...); a recipe that trains by itself cannot be resumed",
        )
    if error is None:
        ctx.job.complete()
        if any(not gate.passed for gate in ctx.gates):
            outcome.exit_code = 8
        return
    outcome.fail(error)
    text = "".join(traceback.format_exception(error))
    run.write_text("logs/driver.log", text)
    ctx.job.report_error(outcome.errors[-1]["message"])


def _count_stop(stop: Interruption, outcome: Outcome, options: RunOptions) -> None:
    """A run that was asked to stop ends with the code of the reason; `Preempted` keeps its own."""
    if stop.reason is None or outcome.exit_code == 75:
        return
    outcome.errors = [error for error in outcome.errors if error["code"] != "recipe_cancelled"]
    if stop.reason == "timeout":
        outcome.fail(RunTimeout(f"--timeout {options.timeout:g} s passed"))
    outcome.status = "stopped"
    outcome.exit_code = stop.exit_code


def _last_words(run: Run, outcome: Outcome) -> Callable[[int], None]:
    def write(exit_code: int) -> None:
        ended = replace(outcome, exit_code=exit_code, status="stopped")
        quick = run.events.path.stat().st_size < MAX_LAST_EVENTS
        run.finish("stopped", exit_code, ended.as_data(run.id), report=quick)

    return write


@contextlib.contextmanager
def _forgotten(outcome: Outcome) -> Iterator[None]:
    """Coroutines that were never awaited, and tasks whose failure nobody saw, fail the run: work was lost.

    Only where the run would have been good: a recipe that failed, was stopped, or was planned up to a line, leaves
    such things behind.
    """
    loop = asyncio.get_running_loop()
    old_handler, old_depth = loop.get_exception_handler(), sys.get_coroutine_origin_tracking_depth()
    found: list[BaseException] = []

    def on_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Exception) and place_of(error) is not None:
            found.append(error)

    def on_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category is RuntimeWarning and "was never awaited" in str(message):
            found.append(_never_awaited(str(message)))
        else:
            show(message, category, filename, lineno, file, line)

    loop.set_exception_handler(on_exception)
    sys.set_coroutine_origin_tracking_depth(1)
    try:
        with warnings.catch_warnings():
            show = warnings.showwarning
            warnings.filterwarnings("always", message="coroutine .* was never awaited", category=RuntimeWarning)
            warnings.showwarning = on_warning
            yield
            gc.collect()  # both are noticed when the forgotten object is freed
    finally:
        loop.set_exception_handler(old_handler)
        sys.set_coroutine_origin_tracking_depth(old_depth)
    for error in found if outcome.exit_code == 0 and not outcome.planned_until else ():
        outcome.fail(error)


def _never_awaited(text: str) -> HarmonyError:
    name = text.split("'")[1] if "'" in text else "?"
    places = re.findall(r'File "(.+)", line (\d+)', text)
    where = f", created at {places[-1][0]}:{places[-1][1]}" if places else ""
    return HarmonyError(f"coroutine '{name}' was never awaited{where}", hint="write `await` before the call")
