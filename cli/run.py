"""`adaptive run`: a recipe's flags, its configuration, and the run."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from harmony_core.errors import UsageError
from harmony_core.options import LEAST_SECONDS, MAX_SECONDS, RunOptions
from harmony_core.recipe import Recipe

from . import output
from .flags import Configured, Invocation, command, names_of

if TYPE_CHECKING:
    from harmony_core.redaction import Redactor
    from harmony_core.registry import Registry
    from harmony_core.runs.run import Run

    from .app import Reply
    from .resume import Resumption

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)?")
_RANGES = {"num_processes": (1, 1024), "seed": (0, 2**63 - 1), "keep_checkpoints": (0, 10**6)}
_SECONDS = {None: 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


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


def recipe_word(words: Sequence[str], doubtful_too: bool = True) -> str | None:
    """The word of a command line that names the recipe, found before the recipe's flags are known.

    The first plain word that looks like one; a word behind a flag of the recipe, which may be that flag's value, only
    if no other plain word stands there, and never without `doubtful_too`.
    """
    flags = inspect.signature(runner, eval_str=True).parameters.values()
    with_value = {name for flag in flags if flag.annotation.__origin__ is not bool for name in names_of(flag)}
    plain: list[str] = []
    doubtful: list[str] = []
    commands = ["run", "config", "show", "schema"]
    previous = ""
    for word in words[: list(words).index("--")] if "--" in words else words:
        if previous not in with_value and word.startswith("-") and word != "-":
            previous = word
            continue
        if previous in with_value:
            pass
        elif word in commands and not plain:
            # The command, and the one below it: `config show`. A recipe called `run` would stand behind them.
            commands = commands[commands.index(word) + 1 :] if word == "config" else []
        elif previous.startswith("--") and "=" not in previous:
            doubtful.append(word)
        else:
            plain.append(word)
        previous = ""
    candidates = plain + (doubtful if doubtful_too else [])
    return next((word for word in candidates if _is_file(word)), next(iter(candidates), None))


def _is_file(word: str) -> bool:
    name = word.rpartition(":")[0] or word
    return name.endswith(".py") and Path(name).is_file()


def _start(invocation: Invocation, words: Sequence[str], reply: Reply) -> int:
    """Check everything, then run. Returns the exit code."""
    from harmony_core.home import Home
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
    """Knows the secrets of the environment and of the configuration; a model's key is none, whatever equals it."""
    from harmony_core.redaction import Redactor

    known = Redactor.from_environment(os.environ)
    if configured.config is not None:
        known = known.knowing(configured.config.model_dump())
    refs = {model["ref"] for model in configured.models.values()}
    return Redactor(known.values - refs - {ref.partition("@")[0] for ref in refs})


def _record_inputs(run: Run, recipe: Recipe, configured: Configured) -> None:
    """The configuration with its sources, the files that it came from, the recipe, and the models by digest."""
    from harmony_core.config import as_data, as_yaml, load_yaml_file, sources_of

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
    """A run that was checked and not yet begun."""

    configured: Configured
    options: RunOptions
    resumption: Resumption | None = None
    changes: list[str] = field(default_factory=list)


def _prepare(invocation: Invocation, registry: Registry) -> Prepared:
    """Everything that can be wrong before a run exists. Raises what is."""
    from harmony_core.config import as_data

    from .resume import Resumption

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


def seconds(text: str, flag: str = "--timeout", least: float = 0.001) -> float:
    """`90`, `90s`, `30m`, `2h`, `1d`. Raises UsageError."""
    match = _DURATION.fullmatch(text.strip())
    found = float(match[1]) * _SECONDS[match[2]] if match else -1.0
    if not least <= found <= MAX_SECONDS:
        allowed = f"{least:g} s to {MAX_SECONDS // 86400}d"
        raise UsageError(f"{flag}: not a time: {text[:40]!r} (allowed: {allowed})", hint="write 90s, 30m, 2h or 1d")
    return found
