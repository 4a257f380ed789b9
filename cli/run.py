"""`adaptive run`: the runner's flags, preparing and recording a run, and resuming one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from harmony_core.config import Resolved, YamlDocument, as_data, as_yaml, load_yaml, load_yaml_file, places, sources_of
from harmony_core.errors import UsageError, VerificationError
from harmony_core.home import Home
from harmony_core.options import LEAST_SECONDS, RunOptions, seconds
from harmony_core.recipe import Recipe
from harmony_core.redaction import MASK, Redactor
from harmony_core.runs.checkpoints import Checkpoint, CheckpointStore
from harmony_core.runs.records import FILES, RunRecord
from harmony_core.runs.resuming import compare, differences, find_resumable

from . import output
from .config import Configured, Invocation, command

if TYPE_CHECKING:
    from harmony_core.registry import Registry
    from harmony_core.runs.run import Run

    from .app import Reply
_RANGES = {"num_processes": (1, 1024), "seed": (0, 2**63 - 1), "keep_checkpoints": (0, 10**6)}


class Device(StrEnum):
    """Where the ranks run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def runner(
    recipe: Annotated[
        str,
        Argument(metavar="RECIPE", help="path.py, path.py:function, or the name of a built-in.", show_default=False),
    ],
    config: Annotated[
        list[str] | None,
        Option("--config", "-c", metavar="FILE", help="YAML file, - for stdin; repeat it, later ones win."),
    ] = None,
    set: Annotated[
        list[str] | None, Option("--set", "-s", metavar="KEY=VALUE", help="Set any value: --set lora.r=8; repeatable.")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Check everything and plan every spawn; start nothing.")] = False,
    assume: Annotated[
        str | None, Option(metavar="NxSIZE", help="Dry run for another machine, such as 8x80GiB.")
    ] = None,
    num_processes: Annotated[
        int | None, Option(help="Number of ranks.  [default: every visible CUDA device, else 1]")
    ] = None,
    device: Annotated[Device, Option(help="Where the ranks run.")] = Device.auto,
    memory: Annotated[
        str | None, Option(metavar="SIZE", help="Limit for models: 8GB of the host, or per device.")
    ] = None,
    accelerate_config: Annotated[
        Path | None, Option(metavar="FILE", help="Process count, device ids and environment.")
    ] = None,
    seed: Annotated[int | None, Option(help="Seed of the run, and of the recipe's `seed`.")] = None,
    timeout: Annotated[
        str | None, Option(metavar="TIME", help="End the run after 90s, 30m, 2h; exit code 124.")
    ] = None,
    hang_timeout: Annotated[
        str, Option(metavar="TIME", help="A rank may go so long without progress; 0: for ever.")
    ] = "10m",
    silence_timeout: Annotated[
        str, Option(metavar="TIME", help="A rank may go so long without a sign of life.")
    ] = "120s",
    fault_grace: Annotated[
        str, Option(metavar="TIME", help="How long a recipe with models goes on without ranks.")
    ] = "60s",
    rehearse: Annotated[
        bool, Option("--rehearse", help="Try the worst micro-batch of every spawn on CPU too.")
    ] = False,
    deterministic: Annotated[
        bool, Option("--deterministic", help="On CPU: sampled and trained log-probs equal bit for bit, but slower.")
    ] = False,
    no_compile: Annotated[
        bool, Option("--no-compile", help="On CUDA: run the layers as they are, slower but at once.")
    ] = False,
    resume: Annotated[
        str | None, Option(metavar="[RUN]", help="Go on with a run from its last checkpoint.  [default: newest]")
    ] = None,
    allow_change: Annotated[
        bool, Option("--allow-change", help="Resume with changes that do not decide the training.")
    ] = False,
    keep_checkpoints: Annotated[
        int | None, Option(metavar="N", help="Checkpoints that stay; 0 writes none.  [default: 2, none once saved]")
    ] = None,
    save_wait: Annotated[
        str | None, Option(metavar="TIME", help="Retry a save on a full disk.  [default: 10m, in CI 0]")
    ] = None,
    json: Annotated[bool, Option("--json", help="One JSON object on stdout; prints go to stderr.")] = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="Only errors on stderr.")] = False,
) -> None:
    """Run a recipe. `adaptive run RECIPE --help` shows the recipe's own parameters."""


def application(recipe: Recipe | None, words: Sequence[str], reply: Reply) -> Callable[..., int]:
    """The command for one recipe."""
    return command(recipe, runner, lambda invocation: _start(invocation, words, reply), reply)


def _start(invocation: Invocation, words: Sequence[str], reply: Reply) -> int:
    """Check everything, then run. Returns the exit code."""
    from harmony_core.notifiers import silenced
    from harmony_core.recipe.execution import execute
    from harmony_core.registry import Registry
    from harmony_core.runs.interruption import Interruption
    from harmony_core.runs.run import Run

    streams = reply.streams
    recipe, quiet, as_json = invocation.recipe, bool(invocation.values["quiet"]), bool(invocation.values["json"])
    home = Home.open()
    registry = Registry(home)
    prepared = _prepare(invocation, registry)
    configured, options, resumption = prepared.configured, prepared.options, prepared.resumption
    record, checkpoint = (resumption.record, resumption.checkpoint) if resumption else (None, None)
    redactor = _knowing(configured)
    opened = Run.temporary("dry-run") if options.dry_run else Run.opened(home, recipe.name, words, record, redactor)
    tell = (lambda text: None) if quiet else output.tell
    with opened as run:
        if not options.dry_run:
            if checkpoint is None:
                _record_inputs(run, recipe, configured)
            else:
                run.events.write("resumed", {"checkpoint": checkpoint.name, "changes": prepared.changes})
            tell(f"run {run.id}{f', from {checkpoint.name}' if checkpoint else ''}")
            streams.keep_in(run)
        with silenced(quiet), output.progress(quiet, streams) as sink, Interruption(options.timeout, tell) as stop:
            doing = execute(recipe, configured.config, options, run, registry, stop, sink, checkpoint)
            outcome = asyncio.run(doing)
            reply.signals.finishing = True
        data = run.masked(outcome.as_data(None if options.dry_run else run.id))
        run.finish(outcome.status, outcome.exit_code, data)
        reply.signals.finishing = False
        for name, kept in streams.kept.items():
            if kept.lost:
                output.tell(f"warning: {run.log_dir / name}.log lacks {kept.lost} bytes that the disk did not take")
        if (page := run.directory / "report.html").is_file():
            tell(f"report {page}")
    output.tell_errors(data["errors"])
    if not options.dry_run:
        output.tell_result(data, quiet, as_json)
    elif not as_json:
        output.tell_plan(data, recipe.path, configured.models)
    reply.data = data
    return outcome.exit_code


def _knowing(configured: Configured) -> Redactor:
    """A redactor for the secrets of the environment and the configuration. Keys of models are never masked."""
    known = Redactor.from_environment(os.environ)
    if configured.config is not None:
        known = known.knowing(configured.config.model_dump())
    refs = {model["ref"] for model in configured.models.values()}
    return Redactor(known.values - refs - {ref.partition("@")[0] for ref in refs})


def _record_inputs(run: Run, recipe: Recipe, configured: Configured) -> None:
    """Record the configuration with its sources and files, the recipe, and the models by digest."""
    data, mask, models = as_data(configured.config), run.redactor, configured.models
    run.write_text("config.yaml", as_yaml(mask.data(data)))
    run.write_json("sources.json", mask.data(sources_of(data, configured.resolved)))
    run.write_json("models.json", models)
    run.write_text(f"inputs/0-{recipe.path.name}", mask.code(recipe.path.read_text("utf-8", errors="replace")))
    for number, file in enumerate(configured.files, 1):
        given = mask.data(load_yaml_file(file).data)
        write = run.write_json if file.suffix == ".json" else lambda name, data: run.write_text(name, as_yaml(data))
        write(f"inputs/{number}-{file.name}", given)
    run.note(recipe=recipe.spec, recipe_sha256=recipe.sha256)
    details: dict[str, Any] = {"recipe": str(recipe.path), "sha256": recipe.sha256, "models": models}
    run.events.write("config.resolved", details | {"config": data})


@dataclass(frozen=True)
class Prepared:
    """The inputs of a run, checked before it begins."""

    configured: Configured
    options: RunOptions
    resumption: Resumption | None = None
    changes: list[str] = field(default_factory=list)


def _prepare(invocation: Invocation, registry: Registry) -> Prepared:
    """Check everything that can be checked before the run exists. Raises the errors of all checks."""
    values, recipe = invocation.values, invocation.recipe
    if values["resume"] is None:
        if values["allow_change"]:
            raise UsageError("--allow-change is about a run that is resumed", hint="add --resume")
        options = _options(values)
        configured = invocation.configured().settled(recipe, registry)
        seed = getattr(configured.config, "seed", None)
        if values["seed"] is None and isinstance(seed, int):
            options = _options(values | {"seed": seed})
        return Prepared(configured, options)
    resumption = Resumption.find(values["resume"], recipe, values["allow_change"])
    resumption.check_machine(values)
    options = _options(values).resuming(resumption.record.data.get("options", {}))
    configured = invocation.configured(resumption.base(), check=resumption.ask_for_masked).settled(recipe, registry)
    now = as_data(configured.config)
    old = Invocation(recipe, {}).configured(resumption.base(masked_from=now), environment={})
    changes = resumption.check(recipe, as_data(old.settled(recipe, registry).config), now)
    return Prepared(configured, options, resumption, changes)


def _options(values: dict[str, Any]) -> RunOptions:
    from harmony_core.memory.ledger import parse_assume, parse_size

    for name, (least, most) in _RANGES.items():
        if values[name] is not None and not least <= values[name] <= most:
            raise UsageError(f"{_flag(name)}: {str(values[name])[:40]} (allowed: {least} to {most})")
    given = {option.name: values[option.name] for option in fields(RunOptions) if option.name in values}
    given |= {"device": values["device"].value, "seed": values["seed"] or 0, "compile": not values["no_compile"]}
    if values["assume"] is not None:
        if not values["dry_run"]:
            raise UsageError("--assume plans for a machine that is not here", hint="add --dry-run")
        parse_assume(values["assume"])
    if values["memory"] is not None:
        given["memory"] = parse_size(values["memory"], "--memory")
    for name, seconds_least in {"timeout": 0.001, **LEAST_SECONDS}.items():
        if given[name] is not None:
            given[name] = seconds(given[name], _flag(name), seconds_least)
    return RunOptions(**given)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Resumption:
    """A run to continue, and the checkpoint that it continues from."""

    record: RunRecord
    checkpoint: Checkpoint
    allow_change: bool

    @classmethod
    def find(cls, reference: str, recipe: Recipe, allow_change: bool) -> Resumption:
        """Find the run. Raises NotFoundError, UsageError, ConflictError; VerificationError with no whole checkpoint."""
        record = find_resumable(Home.open(), reference, recipe.spec)
        record.require(*FILES)
        checkpoint = CheckpointStore(record.directory / "checkpoints").newest_whole(output.tell)
        return cls(record, checkpoint, allow_change)

    def base(self, masked_from: Mapping[str, Any] | None = None) -> YamlDocument:
        """The configuration saved with the checkpoint, with models as the versions that they referred to then.

        Values that were masked as secrets are taken from `masked_from`, or left out.
        """
        data = deepcopy(self.checkpoint.state.get("config", {}))
        for place in masked(data):
            _fill(data, place, masked_from)
        try:
            for name, model in self.record.read("models.json").items():
                _pin(data, name.split("."), model["ref"])
        except (LookupError, TypeError, ValueError):
            where = f"run {self.record.id}: models.json"
            raise VerificationError(f"{where}: names {name!r}, which {self.checkpoint.name} lacks") from None
        return load_yaml(as_yaml(data), f"run {self.record.id}")

    def ask_for_masked(self, resolved: Resolved) -> None:
        """Raise UsageError naming the values that were masked as secrets and are not given again."""
        given = {path for path, value in places(resolved.data) if value is not None}
        missing = [place for place in masked(self.checkpoint.state.get("config", {})) if place not in given]
        if missing:
            names = ", ".join(map(".".join, missing))
            variables = " ".join(f"ADAPTIVE_CFG__{'__'.join(place).upper()}=..." for place in missing)
            raise UsageError(
                f"run {self.record.id} does not keep secrets: it needs its {names} again",
                hint=f"set {variables}, or give a file with --config",
                missing=[".".join(place) for place in missing],
            )

    def check_machine(self, given: dict[str, Any]) -> None:
        """Raise UsageError if flags ask for another number of ranks, seed or device than the run has."""
        saved = self.checkpoint.state.get("run", {})
        asked = {"ranks": given["num_processes"], "seed": given["seed"], "device": given["device"]}
        asked = {name: value for name, value in asked.items() if value not in (None, "auto")}
        hint = "leave the flag out: a resumed run has what it was started with"
        compare(f"run {self.record.id}", {name: saved.get(name) for name in asked}, asked, hint)

    def check(self, recipe: Recipe, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
        """The changes since the checkpoint, one line each. Raises UsageError for changes that are not allowed."""
        mask = Redactor().knowing(before).knowing(now)
        changes = [mask.text(change) for change in differences(before, now)]
        if self.record.data.get("recipe_sha256") not in (None, recipe.sha256):
            changes.append(f"the recipe's file {recipe.path.name} has changed since")
        if changes and not self.allow_change:
            raise UsageError(
                f"run {self.record.id} was started with another configuration: {'; '.join(changes)}",
                hint="resume without these changes; --allow-change accepts those that do not decide the training",
                changes=changes,
            )
        for change in changes:
            output.tell(f"changed: {change}")
        return changes


def masked(data: Any) -> list[tuple[str, ...]]:
    """The places whose values were masked as secrets; for a list, the place of the whole list."""
    return [
        tuple(map(str, path))
        for path, value in places(data)
        if not isinstance(value, dict)
        and not any(isinstance(key, int) for key in path)
        and any(isinstance(text, str) and MASK in text for _, text in places(value))
    ]


def _fill(data: dict[str, Any], place: tuple[str, ...], given: Mapping[str, Any] | None) -> None:
    """Put the given value in a place, or remove the place if there is no value."""
    for key in place[:-1]:
        data, given = data[key], None if given is None else given.get(key)
    if given is None:
        del data[place[-1]]
    else:
        data[place[-1]] = given.get(place[-1])


def _pin(data: Any, path: list[str], reference: str) -> None:
    """Replace a model's key by an exact version."""
    for key in path[:-1]:
        data = data[int(key)] if isinstance(data, list) else data[key]
    last: Any = int(path[-1]) if isinstance(data, list) else path[-1]
    if isinstance(data[last], dict):
        data[last]["model_key"] = reference
    else:
        data[last] = reference
