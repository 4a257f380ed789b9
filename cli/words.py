"""Finding the recipe among the words of a command line, before its flags are known."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

from .flags import names_of

_COMMANDS = ("run", "config", "show", "schema")


def recipe_word(words: Sequence[str], doubtful_too: bool = True) -> str | None:
    """The word that names the recipe.

    The first plain word that looks like one; a word behind a flag of the recipe, which may be that flag's value, only
    if no other plain word stands there, and never without `doubtful_too`.
    """
    from .run import runner

    flags = inspect.signature(runner, eval_str=True).parameters.values()
    with_value = {name for flag in flags if flag.annotation.__origin__ is not bool for name in names_of(flag)}
    plain: list[str] = []
    doubtful: list[str] = []
    commands = list(_COMMANDS)
    previous = ""
    for word in words:
        if word == "--":
            break
        if previous in with_value:
            previous = ""
            continue
        if word.startswith("-") and word != "-":
            previous = word
            continue
        if word in commands and not plain:
            # The command, and the one below it: `config show`. A recipe called `run` would stand behind them.
            commands = commands[commands.index(word) + 1 :] if word == "config" else []
        elif previous.startswith("--") and "=" not in previous:
            doubtful.append(word)
        else:
            plain.append(word)
        previous = ""
    candidates = plain + (doubtful if doubtful_too else [])
    return next((word for word in candidates if _looks_like_file(word)), next(iter(candidates), None))


def _looks_like_file(word: str) -> bool:
    name = word.rpartition(":")[0] or word
    return name.endswith(".py") and Path(name).is_file()
