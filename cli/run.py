"""`adaptive run`: a recipe's flags, its configuration, and the run."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harmony_core.errors import UsageError
from harmony_core.recipe import Recipe

from . import output
from .configuration import Configured, configure
from .flags import Flag, as_parameter, assignments, flags_of, names_of

if TYPE_CHECKING:
    from harmony_core.config import YamlDocument
    from harmony_core.execution import RunOptions
    from harmony_core.recipe import InputConfig
    from harmony_core.registry import Registry

    from .app import Reply
    from .resume import Resumption

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)?")
_SECONDS = {None: 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


class Device(StrEnum):
    """Where the ranks run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def runner(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="path.py, path.py:function, or the name of a built-in.", show_default=False
        ),
    ],
    config: Annotated[
        list[str] | None,
        typer.Option("--config", "-c", metavar="FILE", help="YAML file, - for stdin; repeat it, later ones win."),
    ] = None,
    set: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Set any value: --set lora.r=8; repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and plan every spawn; start nothing.")
    ] = False,
    assume: Annotated[
        str | None, typer.Option("--assume", metavar="NxSIZE", help="Dry run for another machine, such as 8x80GiB.")
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option("--num-processes", min=1, help="Number of ranks.  [default: every visible CUDA device, else 1]"),
    ] = None,
    device: Annotated[Device, typer.Option("--device", help="Where the ranks run.")] = Device.auto,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Limit for models: 8GB of the host, or per device.")
    ] = None,
    accelerate_config: Annotated[
        Path | None,
        typer.Option("--accelerate-config", metavar="FILE", help="Process count, device ids and environment."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the run, and of the recipe's `seed`.")] = None,
    timeout: Annotated[
        str | None, typer.Option("--timeout", metavar="TIME", help="End the run after 90s, 30m, 2h; exit code 124.")
    ] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Try the worst micro-batch of every spawn on CPU too.")
    ] = False,
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="On CPU: sampled and trained log-probs equal bit for bit, but slower."),
    ] = False,
    no_compile: Annotated[
        bool, typer.Option("--no-compile", help="On CUDA: run the layers as they are, slower but at once.")
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="[RUN]", help="Go on with a run from its last checkpoint.  [default: newest]"),
    ] = None,
    allow_change: Annotated[
        bool, typer.Option("--allow-change", help="Resume with changes that do not decide the training.")
    ] = False,
    keep_checkpoints: Annotated[
        int | None,
        typer.Option(
            "--keep-checkpoints", metavar="N", min=0, help="Checkpoints that stay; 0 writes none.  [default: 2]"
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout; prints go to stderr.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")] = False,
) -> None:
    """Run a recipe. `adaptive run RECIPE --help` shows the recipe's own parameters."""


@dataclass(frozen=True)
class Invocation:
    """A parsed command line: the runner's values by name, and what was given for the recipe."""

    recipe: Recipe
    values: dict[str, Any]
    flags: list[Flag]

    def configured(self, base: YamlDocument | None = None) -> Configured:
        """The recipe's configuration, over that of a resumed run. Raises ConfigError, NotFoundError."""
        given = assignments(self.flags, self.values)
        seed = self.values.get("seed")
        if seed is not None and self.takes_seed:
            from harmony_core.config import Assignment, Source

            given.append(Assignment(("seed",), seed, Source("flag", "--seed")))
        return configure(self.recipe, self.values["config"] or [], self.values["set"] or [], given, base)

    @property
    def takes_seed(self) -> bool:
        """Whether the recipe has a field `seed`."""
        return self.recipe.config_type is not None and "seed" in self.recipe.config_type.model_fields


def command(
    recipe: Recipe | None,
    fixed: Callable[..., None],
    act: Callable[[Invocation], int],
    reply: Reply,
    with_flags: bool = True,
) -> Callable[..., int]:
    """A function for Typer: the parameters of `fixed` and, behind the recipe's name, its own flags."""
    flags = flags_of(recipe) if recipe is not None and with_flags else []

    def invoke(**values: Any) -> int:
        if recipe is None:
            raise UsageError("no recipe was given", hint="adaptive recipes list")
        return act(Invocation(recipe, values, flags))

    parameters = list(inspect.signature(fixed, eval_str=True).parameters.values())
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    parameters[1:1] = [as_parameter(flag) for flag in flags]
    reply.known_flags += [name for p in parameters for name in names_of(p)]
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {p.name: p.annotation for p in parameters}
    invoke.__name__ = fixed.__name__
    invoke.__doc__ = _document(recipe) or fixed.__doc__
    return invoke


def _document(recipe: Recipe | None) -> str:
    if recipe is None:
        return ""
    # \b keeps a paragraph's lines as the author wrote them.
    paragraphs = [f"\b\n{paragraph}" for paragraph in recipe.doc.replace("\f", "").split("\n\n") if paragraph.strip()]
    return "\n\n".join([f"Run {recipe.name}.", *paragraphs, "The recipe's own parameters come first."])


def start(invocation: Invocation, words: Sequence[str], reply: Reply) -> int:
    """Check everything, then run. Returns the exit code."""
    from harmony_core.execution import execute
    from harmony_core.home import Home
    from harmony_core.interruption import Interruption
    from harmony_core.notifiers import silenced
    from harmony_core.registry import Registry
    from harmony_core.run import Run

    from .progress import progress
    from .record import record_inputs, record_resumption
    from .report import print_plan, print_result

    recipe, quiet, as_json = invocation.recipe, bool(invocation.values["quiet"]), bool(invocation.values["json"])
    home = Home.open()
    registry = Registry(home)
    prepared = _prepare(invocation, registry)
    options, models, resumption = prepared.options, prepared.models, prepared.resumption
    record = resumption.record if resumption else None
    opened = Run.temporary("dry-run") if options.dry_run else Run.opened(home, recipe.name, words, record)
    tell = (lambda text: None) if quiet else output.tell
    with opened as run:
        if resumption is not None and not options.dry_run:
            record_resumption(run, resumption, prepared)
            tell(f"run {run.id}, from {resumption.checkpoint.name}")
        elif not options.dry_run:
            record_inputs(run, recipe, prepared)
            tell(f"run {run.id}")
        with silenced(quiet), progress(quiet) as sink, Interruption(options.timeout, tell) as stop:
            outcome = asyncio.run(execute(recipe, prepared.config, options, run, registry, sink, stop))
        data = run.redactor.data(outcome.as_data(None if options.dry_run else run.id))
        run.finish(outcome.status, outcome.exit_code, data)
        if (page := run.directory / "report.html").is_file():
            tell(f"report {page}")
    (print_plan if options.dry_run else print_result)(data, recipe, models, quiet, as_json)
    reply.data = data
    return outcome.exit_code


@dataclass(frozen=True)
class Prepared:
    """A run that was checked and not yet begun."""

    configured: Configured
    config: InputConfig | None
    models: dict[str, dict[str, str]]
    options: RunOptions
    resumption: Resumption | None
    changes: list[str]


def _prepare(invocation: Invocation, registry: Registry) -> Prepared:
    """Everything that can be wrong before a run exists. Raises what is."""
    from harmony_core.config.snapshot import as_data
    from harmony_core.execution import RunOptions
    from harmony_core.redaction import Redactor

    from .resume import Resumption

    values, recipe = invocation.values, invocation.recipe
    if values["allow_change"] and values["resume"] is None:
        raise UsageError("--allow-change is about a run that is resumed", hint="add --resume")
    if values["resume"] is None:
        options = _options(RunOptions, values)
        configured = invocation.configured()
        config, models = _settled(configured, recipe, registry)
        if values["seed"] is None and isinstance(getattr(config, "seed", None), int):
            options = _options(RunOptions, values | {"seed": config.seed})  # type: ignore[union-attr]
        return Prepared(configured, config, models, options, None, [])
    resumption = Resumption.find(values["resume"], recipe, values["allow_change"])
    resumption.check_machine(values)
    options = replace(_options(RunOptions, resumption.values(values)), resumed=resumption.checkpoint)
    base = resumption.base()
    configured = invocation.configured(base)
    config, models = _settled(configured, recipe, registry)
    before, _ = _settled(configure(recipe, [], [], [], base, environment={}), recipe, registry)
    redactor = Redactor({}).knowing(as_data(config)).knowing(as_data(before))
    changes = resumption.check(recipe, redactor.data(as_data(before)), redactor.data(as_data(config)))
    return Prepared(configured, config, models, options, resumption, changes)


def _settled(
    configured: Configured, recipe: Recipe, registry: Registry
) -> tuple[InputConfig | None, dict[str, dict[str, str]]]:
    from harmony_core.config.names import settle_names

    if configured.config is None:
        return None, {}
    return settle_names(configured.config, configured.resolved, registry, recipe.path.parent)


def _options(kind: Any, values: dict[str, Any]) -> Any:
    from harmony_core.ledger import parse_assume, parse_size

    assume = values["assume"]
    if assume is not None:
        if not values["dry_run"]:
            raise UsageError("--assume plans for a machine that is not here", hint="add --dry-run")
        parse_assume(assume)
    return kind(
        num_processes=values["num_processes"],
        device=Device(values["device"]).value,
        accelerate_config=values["accelerate_config"],
        memory=None if values["memory"] is None else parse_size(values["memory"]),
        seed=values["seed"] or 0,
        timeout=None if values["timeout"] is None else seconds(values["timeout"]),
        rehearse=values["rehearse"],
        deterministic=values["deterministic"],
        compile=not values["no_compile"],
        dry_run=values["dry_run"],
        assume=assume,
        keep_checkpoints=2 if values["keep_checkpoints"] is None else values["keep_checkpoints"],
        allow_change=values["allow_change"],
    )


def seconds(text: str) -> float:
    """`90`, `90s`, `30m`, `2h`, `1d`. Raises UsageError."""
    match = _DURATION.fullmatch(text.strip())
    found = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if found <= 0:
        raise UsageError(f"--timeout: not a time: {text!r}", hint="write 90s, 30m or 2h")
    return found
