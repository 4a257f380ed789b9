"""Run a recipe: start the engine, make the context, call `main`, and always end the run."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from harmony_core.client import DryRunEnded, HarmonyClient
from harmony_core.client.engine import FAILED
from harmony_core.errors import HarmonyError, RunTimeout, UsageError
from harmony_core.journal import kept
from harmony_core.launch.processes import private_directory
from harmony_core.memory.ledger import format_size
from harmony_core.notifiers import ProgressSink, StdoutJobNotifier, say
from harmony_core.options import EngineOptions, RunOptions
from harmony_core.recipe import InputConfig, Recipe
from harmony_core.recipe.context import RecipeConfig, RecipeContext
from harmony_core.recipe_file import RecipeFile
from harmony_core.registry import Registry
from harmony_core.rpc.tracebacks import place_of
from harmony_core.runs.checkpoints import Checkpoint, CheckpointStore
from harmony_core.runs.interruption import Interruption
from harmony_core.runs.resuming import RunCheckpoints, going_on
from harmony_core.runs.run import Outcome, Run, leaves
from harmony_core.text.row_lengths import PlannedRows

CLOSE_SECONDS = 5.0

MAX_LAST_EVENTS = 16 * 2**20
"""Maximum bytes of events for a report when the process ends at once; reading this many takes a second."""


class RecipeExit(Exception):
    """The recipe called `sys.exit` or raised KeyboardInterrupt itself."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"the recipe called {type(cause).__name__}({cause})")
        self.code = cause.code if isinstance(cause, SystemExit) else 1


async def execute(
    recipe: Recipe,
    config: InputConfig | None,
    options: RunOptions,
    run: Run,
    registry: Registry,
    stop: Interruption,
    sink: ProgressSink | None = None,
    resumed: Checkpoint | None = None,
) -> Outcome:
    """Run the recipe to its end and stop the engine. An exception of the recipe is kept in the outcome, not raised.

    `sink` draws progress. `stop` was entered around the event loop. The run continues from the checkpoint `resumed`.
    """
    outcome = Outcome()
    run.events.listen(lambda event: outcome.models.append(event["data"]) if event["type"] == "model.saved" else None)
    run.events.listen(outcome.count_request)
    run.events.listen(_tell_of_compiling)
    run.events.listen(partial(_note_fault, run))
    stop.last_words = partial(_last_words, run, outcome, stop)
    with _forgotten(outcome):
        try:
            client = HarmonyClient.start(_for_engine(options, run, recipe, resumed), registry, run.events.write)
        except HarmonyError as error:
            outcome.fail(error)
            return outcome
        rows = PlannedRows() if options.dry_run else None
        job = StdoutJobNotifier(run.id, sink=sink, events=run.events.write)
        settings = RecipeConfig(job_id=run.id, num_gpus=client.world_size, recipe_name=recipe.name)
        ctx = RecipeContext.create(client, run, registry, run.directory, job, settings)
        try:
            if not options.dry_run:
                ctx.checkpoint_restore_data = _attach_checkpoints(ctx, config, options, stop, resumed)
            with kept(run.events.write, job, rows, run.redactor):  # a task keeps the context in which it was made
                task = asyncio.get_running_loop().create_task(_call(recipe, config, ctx), name="recipe")
            stop.watch(task)
            job.mark_running()
            guard = asyncio.get_running_loop().create_task(_end_after_fault(client, options.fault_grace, stop))
            await asyncio.wait([task])
            guard.cancel()
            _record(task, ctx, outcome, run)
            for dataset in rows.all() if rows is not None else ():
                outcome.rows.append(await asyncio.to_thread(dataset.count, lambda: stop.reason is not None))
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
        _settle_checkpoints(run, outcome, client.unsaved or options.keep_checkpoints is not None)
    return outcome


def _for_engine(options: RunOptions, run: Run, recipe: Recipe, resumed: Checkpoint | None) -> EngineOptions:
    return EngineOptions(
        **vars(options),
        log_dir=run.log_dir,
        run_id=run.id,
        recipe=RecipeFile(recipe.path, recipe.sha256),
        resumed=resumed,
        secrets=run.redactor.values,
    )


def _note_fault(run: Run, event: dict[str, Any]) -> None:
    """Write a failure of the engine into the run's record as soon as it happens."""
    if event["type"] == FAILED:
        error, message = event["data"]["error"], event["data"]["message"]
        with contextlib.suppress(OSError):  # a full disk must not hide the failure
            run.note(fault={"at": event["ts"], "rank": event["rank"], "error": error, "message": message})


async def _end_after_fault(client: HarmonyClient, grace: float, stop: Interruption) -> None:
    """Cancel a recipe that still holds models of a failed engine after `grace` seconds: it waits for something else."""
    error = await client.wait_failed()
    await asyncio.sleep(grace)
    if client.in_use:
        stop.end_for(error)


def _settle_checkpoints(run: Run, outcome: Outcome, keep: bool) -> None:
    """Print how to resume the run; delete checkpoints that are no longer needed, unless `keep`."""
    store = CheckpointStore(run.directory / "checkpoints")
    outcome.resume = going_on(store, run.id, outcome.status)
    if outcome.resume is not None and outcome.exit_code not in (0, 2, 8):
        at = "{checkpoint}, {stage} at {completion:.1%}".format_map(outcome.resume)
        say(f"to go on from {at}: {outcome.resume['command']}")
    if (names := store.names()) and outcome.exit_code == 0 and outcome.resume is None and not keep:
        freed = store.clear()
        run.events.write("checkpoints.deleted", {"checkpoints": names, "bytes": freed})
        told = "every trained model is saved (--keep-checkpoints 2 keeps them)"
        say(f"checkpoints deleted, {format_size(freed)} freed: {told}")


def _attach_checkpoints(
    ctx: RecipeContext,
    config: InputConfig | None,
    options: RunOptions,
    stop: Interruption,
    resumed: Checkpoint | None,
) -> dict[str, Any] | None:
    """Let the job's training classes save, continue and be stopped. Raises UsageError for another machine or seed."""
    client, run = ctx.client, ctx.run
    facts = {"ranks": client.world_size, "device": client.device}
    facts |= {"seed": options.seed, "deterministic": options.deterministic}
    keep = 2 if options.keep_checkpoints is None else options.keep_checkpoints
    store = CheckpointStore(run.directory / "checkpoints", keep)
    plain = run.redactor.data(config.model_dump(mode="json")) if config is not None else {}
    checkpoints = RunCheckpoints(store, facts, resumed, options.allow_change, plain)
    checkpoints.saving = stop.saving
    ctx.job.checkpoints = checkpoints
    stop.patience, stop.resumable = checkpoints.stop, lambda: bool(store.names())
    run.note(options=options.kept() | {"num_processes": client.world_size, "device": client.device})
    return checkpoints.restore_data


def _tell_of_compiling(event: dict[str, Any]) -> None:
    """Print why a spawn takes longer than usual or will be slower; once, for the first rank."""
    told = {
        "compiling": "compiling the layers of {model!r}: about 20 s the first time, then from the cache",
        "not_compiled": "warning: {reason}: layers run uncompiled, and slower",
    }
    if event["type"] in told and event["rank"] == 0:
        say(told[event["type"]].format_map(event["data"]))


async def _call(recipe: Recipe, config: InputConfig | None, ctx: RecipeContext) -> Any:
    # These two exceptions would leave the event loop at once, with the engine still running.
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
    run.write_text("logs/driver.log", run.redactor.text(text))
    ctx.job.report_error(outcome.errors[-1]["message"])


def _count_stop(stop: Interruption, outcome: Outcome, options: RunOptions) -> None:
    """Give a run that was stopped the exit code of the reason; `Preempted` keeps its own."""
    if stop.reason is None or outcome.exit_code == 75:
        return
    outcome.errors = [error for error in outcome.errors if error["code"] != "recipe_cancelled"]
    if stop.reason == "timeout":
        outcome.fail(RunTimeout(f"--timeout {options.timeout:g} s passed"))
    if stop.reason == "fault" and stop.fault is not None and not outcome.errors:
        outcome.fail(stop.fault)
    outcome.status = "failed" if stop.reason == "fault" else "stopped"
    outcome.exit_code = stop.exit_code


def _last_words(run: Run, outcome: Outcome, stop: Interruption, exit_code: int) -> None:
    try:
        if stop.fault is not None:
            outcome.fail(stop.fault)
        ended = replace(outcome, exit_code=exit_code, status="stopped")
        quick = run.events.path.stat().st_size < MAX_LAST_EVENTS
        run.finish("stopped", exit_code, ended.as_data(run.id), report=quick)
    finally:
        private_directory.remove_own()


@contextlib.contextmanager
def _forgotten(outcome: Outcome) -> Iterator[None]:
    """Fail a run that would succeed if it left coroutines unawaited or failures of tasks unseen: work was lost.

    A recipe that failed, was stopped, or was planned up to a line usually leaves some behind; there they are ignored.
    """
    loop = asyncio.get_running_loop()
    old_handler, old_depth = loop.get_exception_handler(), sys.get_coroutine_origin_tracking_depth()
    found: list[BaseException] = []

    def on_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Exception) and place_of(error) is not None:
            found.append(error)

    def on_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category is RuntimeWarning and "was never awaited" in str(message):
            found.append(_never_awaited(str(message)))
        else:
            show(message, category, *where, **more)

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
