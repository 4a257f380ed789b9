"""Finds the command, loads its module, and reports every error at the edge of the process."""

from __future__ import annotations

import contextlib
import errno
import importlib
import inspect
import itertools
import os
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from harmony_core.errors import (
    MACHINE,
    HarmonyError,
    InternalError,
    NotFoundError,
    ResourceError,
    UsageError,
    did_you_mean,
    nearest,
    storage_error,
)

from . import output
from .output import Signals, Streams

if TYPE_CHECKING:
    from harmony_core.recipe import Recipe
    from harmony_core.runs.records import RunRecord

COMMANDS = {
    "run": "Run a recipe.",
    "recipes": "List, show and copy the built-in recipes.",
    "config": "Show a recipe's configuration, or its schema.",
    "models": "The registry of models.",
    "graders": "The graders of this machine: add, try, serve.",
    "datasets": "What a model would be trained on.",
    "runs": "List, show and remove runs; a report of each.",
    "doctor": "Check this machine.",
}
_COMPLETION = "_ADAPTIVE_COMPLETE"
RESUME = "--resume"

EXIT_CODES = """\b
Exit codes: 0 ok, 1 the recipe raised, 2 usage, configuration or data, 3 not found,
4 environment, 5 a rank or the launcher died, 6 conflict, 7 verification failed,
8 a gate does not hold, 70 a bug here, 75 stopped with a checkpoint, 124 timeout,
129 SIGHUP, 130 Ctrl-C, 143 SIGTERM."""


@dataclass
class Reply:
    """The object that a command sets for `--json`, and its known flags for error messages."""

    data: dict[str, Any] | None = None
    known_flags: list[str] = field(default_factory=list)
    signals: Signals = field(default_factory=Signals)
    streams: Streams = field(default_factory=Streams)


def dispatch(words: Sequence[str], signals: Signals, streams: Streams) -> int:
    """Run one command line. Every error is handled here: as lines on stderr, and in the one object of `--json`."""
    options = words[: list(words).index("--")] if "--" in words else words
    as_json = "--json" in options
    word = next((w for w in words if not w.startswith("-")), "")
    reply = Reply(signals=signals, streams=streams)
    with output.diverted(as_json and word == "run", streams):
        code = _guarded(list(words), word, reply)
    if as_json and reply.data is not None:
        output.data(output.dumped(reply.data))
    if streams.failure is not None:
        output.tell(f"{'warning' if word == 'run' else 'error'}: stdout: {streams.failure.strerror}")
        return code if word == "run" else code or ResourceError.exit_code
    return code


def _guarded(words: list[str], word: str, reply: Reply) -> int:
    try:
        return _run(words, word, reply)
    except (KeyboardInterrupt, Exception) as error:  # the edge of the process
        from harmony_core.runs.run import Outcome

        outcome = Outcome(int(getattr(error, "exit_code", 130)), "stopped")
        if not isinstance(error, KeyboardInterrupt):
            outcome = Outcome()
            outcome.fail(_typed(error, words, word, reply))
    output.tell_errors(outcome.errors)
    reply.data = outcome.as_data(None)
    return outcome.exit_code


def _typed(error: BaseException, words: list[str], word: str, reply: Reply) -> HarmonyError:
    if isinstance(error, HarmonyError):
        return error
    if isinstance(error, OSError) and error.errno in MACHINE:
        return storage_error(f"adaptive {word}: a file could not be read or written", error)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return NotFoundError(f"there is no file {str(error.filename)[:60]!r}...: its name is too long")
    if hasattr(error, "format_message"):  # a usage error that Typer itself reports
        return _usage_error(error, words, word, reply)
    return _bug(error)


def _usage_error(error: BaseException, words: list[str], word: str, reply: Reply) -> UsageError:
    """All unknown flags at once, each with the nearest known ones; any other usage error in Typer's words."""
    help_hint = f"adaptive {word} --help" if word in COMMANDS else "adaptive --help"
    if hasattr(error, "option_name") and hasattr(error, "possibilities") and reply.known_flags:
        given = dict.fromkeys(w.partition("=")[0] for w in words if w.startswith("--") and w != "--")
        unknown = [flag for flag in given if flag not in reply.known_flags] or [str(error.option_name)]
        lines = [_unknown_flag(flag, reply.known_flags) for flag in unknown]
        errors = [
            {"path": flag, "type": "unknown_flag", "message": line} for flag, line in zip(unknown, lines, strict=True)
        ]
        return UsageError(lines[0], hint=help_hint, issues=lines, errors=errors)
    return UsageError(str(error.format_message()), hint=help_hint)  # type: ignore[attr-defined]


def _unknown_flag(flag: str, known: list[str]) -> str:
    close = nearest(flag, known, 1)
    return f"unknown flag {flag}" + (f" (did you mean {' or '.join(close)}?)" if close else "")


def _bug(error: BaseException) -> InternalError:
    told = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="adaptive-bug-", suffix=".log", delete=False) as file:
            file.write(told)
        told = file.name
    except OSError:
        pass  # no file can be written: the message contains the whole traceback
    return InternalError(
        f"a bug in harmony-core: {type(error).__name__}: {error}", hint=f"please report it with {told}"
    )


def _run(words: list[str], word: str, reply: Reply) -> int:
    completing = _COMPLETION in os.environ
    if completing:
        line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
        word = next((w for w in line.split()[1:] if not w.startswith("-")), "")
        words = line.split()[1:]
    elif word and word not in COMMANDS:
        raise UsageError(f"there is no command '{word}'", hint=did_you_mean(word, COMMANDS))
    elif word == "run" and any(w.startswith("--resume") for w in words):
        words = with_resume(words)
        with contextlib.suppress(HarmonyError):
            reply.signals.resumable = _resumed(words) is not None
    app = _app(words, word, reply, completing)
    code = app(args=None if completing else words, prog_name="adaptive", standalone_mode=False)
    return code if isinstance(code, int) else 0


def _app(words: list[str], word: str, reply: Reply, completing: bool) -> typer.Typer:
    """All commands, but only the named one in full: the imports of the others are not needed."""
    app = typer.Typer(
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=True,
        no_args_is_help=True,
        epilog=EXIT_CODES,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(epilog=EXIT_CODES)
    def root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
        """Post-train, evaluate and sample language models with one recipe file."""

    for name, text in COMMANDS.items():
        if name == word:
            _add(app, name, text, words, reply, completing)
        elif name in ("run", "doctor"):
            app.command(name, help=text)(lambda: None)
        else:
            app.add_typer(typer.Typer(help=text), name=name)
    return app


def _add(app: typer.Typer, name: str, text: str, words: list[str], reply: Reply, completing: bool) -> None:
    """Add the command in the module `name`: its `app`, or the result of its `application` for the recipe."""
    module = importlib.import_module(f".{name}", __package__)
    made = module.app if hasattr(module, "app") else module.application(_recipe(words, completing), words, reply)
    if isinstance(made, typer.Typer):
        app.add_typer(made, name=name, help=text)
    else:
        app.command(name, short_help=text)(made)


def _recipe(words: list[str], completing: bool) -> Recipe | None:
    """The recipe named on the command line. It is loaded before parsing, because its flags belong to the command."""
    from harmony_core.recipe import load_recipe

    spec = recipe_word(words)
    with contextlib.suppress(HarmonyError) if completing else contextlib.nullcontext():
        return None if spec is None else load_recipe(spec)
    return None


def recipe_word(words: Sequence[str], doubtful_too: bool = True) -> str | None:
    """The word of a command line that names the recipe, found before the recipe's flags are known.

    It is the first plain word that looks like a recipe. A word after a flag of the recipe may be that flag's value; it
    is used only if there is no other plain word, and never without `doubtful_too`.
    """
    from .config import names_of
    from .run import runner

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
            # The command and its sub-command, as in `config show`. A recipe called `run` would come after them.
            commands = commands[commands.index(word) + 1 :] if word == "config" else []
        elif previous.startswith("--") and "=" not in previous:
            doubtful.append(word)
        else:
            plain.append(word)
        previous = ""
    candidates = plain + (doubtful if doubtful_too else [])
    # A grader's file may be a flag's value: it is no recipe if a plain word is one.
    files = [word for word in (plain if any(map(_is_recipe, plain)) else candidates) if _is_file(word)]
    return next(iter([*files, *filter(_is_recipe, plain), *candidates]), None)


def _is_file(word: str) -> bool:
    name = word.rpartition(":")[0] or word
    return name.endswith(".py") and Path(name).is_file()


def with_resume(words: Sequence[str]) -> list[str]:
    """The words with a value after every `--resume`, and with the resumed run's recipe if they name no recipe."""
    from harmony_core.runs.resuming import NEWEST

    end = list(words).index("--") if "--" in words else len(words)
    told: list[str] = []
    pending = list(words)
    while pending:
        word = pending.pop(0)
        if word == RESUME and len(words) - len(pending) <= end:
            behind = pending[0] if pending and not pending[0].startswith("-") else None
            named = recipe_word([*told, *pending[1:]], doubtful_too=False) is not None
            given = behind is not None and (named or not _is_recipe(behind))
            word = f"{RESUME}={pending.pop(0) if given else NEWEST}"
        told.append(word)
    unnamed = recipe_word(told, doubtful_too=False) is None and not {"-h", "--help"}.intersection(told)
    if unnamed and (record := _resumed(told)):
        told.insert(told.index("run") + 1, str(record.data["recipe"]))
    return told


def _resumed(words: Sequence[str]) -> RunRecord | None:
    """The run that the value of `--resume` refers to."""
    from harmony_core.home import Home
    from harmony_core.runs.resuming import find_resumable

    before = itertools.takewhile(lambda word: word != "--", words)
    reference = next((word.partition("=")[2] for word in before if word.startswith(f"{RESUME}=")), "")
    return find_resumable(Home.open(), reference) if reference else None


def _is_recipe(word: str) -> bool:
    from harmony_core.recipe import locate

    with contextlib.suppress(HarmonyError):
        return bool(locate(word))
    return False
