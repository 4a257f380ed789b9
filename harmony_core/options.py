"""How a run is set up: one record, from the command line or a session, through one variable, to the ranks."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harmony_core.errors import UsageError

if TYPE_CHECKING:
    from harmony_core.recipe_file import RecipeFile
    from harmony_core.runs.checkpoints import Checkpoint

VARIABLE = "ADAPTIVE_RANK_OPTIONS"
"""The environment variable in which ranks find the flags."""

MAX_SECONDS = 3650 * 86400
LEAST_SECONDS = {"hang_timeout": 0.0, "silence_timeout": 2.0, "fault_grace": 0.0, "save_wait": 0.0}
"""The bounds of the times that a run's author may set."""

INIT_TIMEOUT = 300.0
"""Seconds for all ranks to be ready."""

_KEPT = (
    *("num_processes", "device", "accelerate_config", "memory", "seed"),
    *("rehearse", "deterministic", "compile", "keep_checkpoints"),
)


@dataclass(frozen=True)
class RunOptions:
    """The runner's flags, parsed. `memory` in bytes, times in seconds. A new flag is a field here and in `cli.run`."""

    num_processes: int | None = None
    device: str = "auto"
    accelerate_config: Path | None = None
    memory: int | None = None
    seed: int = 0
    timeout: float | None = None
    hang_timeout: float = 600.0
    """Maximum seconds that a rank may work without progress; 0: no limit."""
    silence_timeout: float = 120.0
    """Seconds without a heartbeat after which a rank is stuck (the hang timeout, if that is shorter)."""
    fault_grace: float = 60.0
    """Seconds in which a recipe that holds models may end by itself after the engine has failed."""
    rehearse: bool = False
    deterministic: bool = False
    """A token's log-prob has the same bits from sampler and trainer; CPU and float32 only, one thread in each rank."""
    compile: bool = True
    dry_run: bool = False
    assume: str | None = None
    keep_checkpoints: int | None = None
    """Number of checkpoints kept. None: two, or 0 once the run has succeeded and every trained model is saved."""
    save_wait: float | None = None
    """Seconds for which a save is retried if the disk is full. None: 600, or 0 if CI is set."""
    allow_change: bool = False

    def __post_init__(self) -> None:
        for name, least in LEAST_SECONDS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= MAX_SECONDS:
                raise UsageError(f"{name}: {value} (allowed: {least:g} to {MAX_SECONDS} seconds)")

    def kept(self) -> dict[str, Any]:
        """The options that a resumed run takes over, as plain data."""
        file = None if self.accelerate_config is None else str(self.accelerate_config)
        return {name: getattr(self, name) for name in _KEPT} | {"accelerate_config": file}

    def resuming(self, kept: Mapping[str, Any]) -> RunOptions:
        """These options; an option that was not given takes the value with which the run was started."""
        default = [name for name in _KEPT if getattr(self, name) == getattr(RunOptions, name)]
        again = {name: kept[name] for name in default if kept.get(name) is not None}
        if kept.get("accelerate_config"):
            again.pop("num_processes", None)  # it is in the file
        if "accelerate_config" in again:
            again["accelerate_config"] = Path(again["accelerate_config"])
        return replace(self, **again)

    def for_ranks(self, device: str, world_size: int) -> str:
        """The value of `VARIABLE`: the flags, with the resolved device and number of ranks."""
        flags = {flag.name: getattr(self, flag.name) for flag in fields(RunOptions)}
        return json.dumps(flags | {"device": device, "num_processes": world_size, "accelerate_config": None})

    @classmethod
    def of_rank(cls, environ: Mapping[str, str] = os.environ) -> RunOptions:
        """The flags on a rank; the defaults elsewhere."""
        return cls(**json.loads(environ.get(VARIABLE, "{}")))


RUNNER_FLAGS = {flag.name for flag in fields(RunOptions)} - {"compile"} | {
    *("config", "help", "json", "no_compile", "quiet", "resume", "set")
}
"""Flags of `adaptive run` itself. A recipe's field may not have one of these names, except `seed`, which both take."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions(RunOptions):
    """The flags together with the run or session that they belong to."""

    log_dir: Path
    """The directory for `rank-N.log` and `launcher.log`; made if it is missing."""
    run_id: str
    recipe: RecipeFile | None = None
    """The file whose functions the ranks may import as losses."""
    resumed: Checkpoint | None = None
    """The checkpoint that the run continues from; steps after it may save the same models again."""
    temporary_logs: bool = False
    """Whether `log_dir` is removed with the engine."""
    secrets: frozenset[str] = frozenset()
    """Values to mask in the output of the ranks, beside those of the environment."""
    cache: Path | None = None
    """The directory that keeps the code compiled by ranks across runs; None: torch's default."""
    command: Sequence[str] = (sys.executable, "-P", "-m", "harmony_core.engine.process")
    """The command of each rank."""
    launcher: Sequence[str] = ()
    """The command that starts the ranks, with `command` as its arguments; empty: `accelerate launch`."""


_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)?")
_UNITS = {None: 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(text: str, flag: str = "--timeout", least: float = 0.001) -> float:
    """`90`, `90s`, `30m`, `2h`, `1d`. Raises UsageError."""
    match = _DURATION.fullmatch(text.strip())
    found = float(match[1]) * _UNITS[match[2]] if match else -1.0
    if not least <= found <= MAX_SECONDS:
        allowed = f"{least:g} s to {MAX_SECONDS // 86400}d"
        raise UsageError(f"{flag}: not a time: {text[:40]!r} (allowed: {allowed})", hint="write 90s, 30m, 2h or 1d")
    return found
