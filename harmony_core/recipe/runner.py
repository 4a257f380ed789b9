"""`python -m adaptive_harmony.runtime.runner --recipe-key main.py`: the platform's runner, over `adaptive run`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from harmony_core.errors import HarmonyError, UsageError
from harmony_core.recipe.context import RecipeConfig

INSTALL_TIMEOUT_SECS = int(os.getenv("ADAPTIVE_INSTALL_TIMEOUT_SECS", "300"))
"""Has no effect: what a recipe needs is checked, not installed."""


class RecipeConfigCli(RecipeConfig):
    """A RecipeConfig from `ADAPTIVE_<FIELD>` variables and `--field` flags; arguments win over both."""

    def __init__(self, **given: Any) -> None:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        for name in type(self).model_fields:
            parser.add_argument(f"--{name.replace('_', '-')}", default=os.environ.get(self.ENVIRONMENT + name.upper()))
        found = vars(parser.parse_known_args()[0])
        super().__init__(**{name: value for name, value in found.items() if value} | given)


class RunnerArgs(RecipeConfigCli):
    """The runner's flags: a recipe, and within a directory the file to begin with."""

    recipe_key: str | None = None
    """A file, a directory or the name of a built-in recipe."""
    entrypoint: str = "main.py"


def main() -> None:
    """Run the recipe as `adaptive run` does, and leave with its exit code."""
    try:
        args = RunnerArgs()
        if args.recipe_key is None:
            raise UsageError("no recipe was given", hint="--recipe-key main.py, or adaptive run main.py")
        if args.resume_checkpoint_artifact_id:
            raise UsageError("checkpoints have no artifact id here", hint="adaptive run RECIPE --resume RUN")
    except HarmonyError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from None
    recipe = os.path.join(args.recipe_key, args.entrypoint) if os.path.isdir(args.recipe_key) else args.recipe_key
    words = ["run", recipe, *(["--config", args.user_input_file] if args.user_input_file else [])]
    words += ["--num-processes", str(args.num_gpus)] if args.num_gpus else []
    os.execv(sys.executable, [sys.executable, "-m", "harmony_core.cli", *words])
