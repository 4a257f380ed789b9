"""The promised and the free memory of a machine. Plain numbers, no torch.

All amounts are bytes per rank. On CUDA a rank owns a device. On CPU the ranks of a host share its capacity in equal
parts, since every spawn puts a shard of the same size on every rank.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from harmony_core.errors import ConflictError, MemoryRefused, UsageError

RANK_BASELINE_BYTES = 450 << 20
"""Resident memory of a CPU rank before its first model: interpreter, torch, transformers, one process group."""

MAX_SIZE = 2**50
"""Bytes; larger memory sizes are refused."""

MAX_RANKS = 1024

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}{suffix}": 1024**n for n, letter in enumerate("KMGT", 1) for suffix in ("", "IB")}
_UNITS |= {f"{letter}B": 1000**n for n, letter in enumerate("KMGT", 1)}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes of one spawn on each rank, by part.

    `weights`: the base weights, which spawns of one model share. `adapter`: weights of this spawn alone.
    `decode`: tensors of the CUDA graphs of decode steps, for any size of the pool.
    `activations` and `workspace` are transient: a rank runs one instruction at a time, so only the largest
    transient need of all models on it counts.
    """

    weights: int = 0
    adapter: int = 0
    gradients: int = 0
    optimizer: int = 0
    kv: int = 0
    decode: int = 0
    activations: int = 0
    workspace: int = 0

    @property
    def resident(self) -> int:
        """Bytes held from spawn to dealloc."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.kv + self.decode

    @property
    def transient(self) -> int:
        """Bytes held only while the model works."""
        return self.activations + self.workspace

    @property
    def total(self) -> int:
        """The most this spawn holds at once."""
        return self.resident + self.transient

    def parts(self) -> dict[str, int]:
        """The parts by name, in order."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class Ledger:
    """The memory promises of a machine. A promise that does not fit with the others is refused without any change.

    `capacity`: bytes of the host, shared by `ranks` CPU ranks, or a list with the bytes of each rank's device.
    """

    def __init__(self, capacity: int | Sequence[int], *, ranks: int = 1) -> None:
        self.shared = isinstance(capacity, int)
        self.ranks = ranks if isinstance(capacity, int) else len(capacity)
        self.capacity = capacity // ranks if isinstance(capacity, int) else min(capacity)
        self._promises: dict[str, tuple[MemoryPlan, str]] = {}
        self._shared_weights: dict[str, int] = {}

    @property
    def free(self) -> int:
        """Bytes per rank that are free between two instructions."""
        return self.capacity - sum(plan.resident for plan in self._counted().values())

    @property
    def transient(self) -> int:
        """Most transient bytes per rank of any live model."""
        return self.transient_beside()

    def transient_beside(self, *names: str) -> int:
        """`transient` without the models `names`."""
        return max((plan.transient for name, (plan, _) in self._promises.items() if name not in names), default=0)

    def holds(self, weights_key: str) -> bool:
        """Whether some spawn already holds the base weights `weights_key`."""
        return weights_key in self._shared_weights

    def fits(self, plan: MemoryPlan, weights_key: str = "") -> bool:
        """Whether `plan` fits with the present promises."""
        return self._needed(plan, weights_key) <= self.free

    def _needed(self, plan: MemoryPlan, weights_key: str) -> int:
        there = plan.weights if self.holds(weights_key) else 0
        return plan.resident - there + max(plan.transient, self.transient)

    def promise(
        self,
        name: str,
        plan: MemoryPlan,
        *,
        weights_key: str = "",
        ways_out: Callable[[int, int], list[str]] | None = None,
    ) -> None:
        """Record `plan` under `name`, or raise MemoryRefused and leave everything as it was.

        Spawns with an equal, non-empty `weights_key` share their base weights, which are counted once until the
        last of them is released. `ways_out(free, transient)` computes changes that fit instead.
        """
        if name in self._promises:
            raise ConflictError(f"memory is already promised to a model named {name!r}")
        if not self.fits(plan, weights_key):
            ways = ways_out(self.free, self.transient) if ways_out else []
            other = "free a model with dealloc(), or use a smaller model" if self._promises else "use a smaller model"
            hint = "what fits: " + "; ".join(ways) if ways else other
            raise MemoryRefused(
                f"{name!r} does not fit in memory\n{self.table(name, plan, weights_key)}",
                hint=hint,
                needed_bytes=self._needed(plan, weights_key),
                free_bytes=self.free,
            )
        self._promises[name] = plan, weights_key
        if weights_key:
            self._shared_weights.setdefault(weights_key, plan.weights)

    def release(self, name: str) -> None:
        """Remove the promise to `name`; unknown names are ignored."""
        self._promises.pop(name, None)
        live = {weights_key for _, weights_key in self._promises.values()}
        self._shared_weights = {key: size for key, size in self._shared_weights.items() if key in live}

    def without(self, name: str) -> Ledger:
        """A copy of the ledger without the promise to `name`."""
        other = copy.deepcopy(self)
        other.release(name)
        return other

    def snapshot(self) -> dict[str, Any]:
        """The ledger as plain data, bytes per rank; shared weights are counted for the first of their models."""
        return {
            "ranks": self.ranks,
            "capacity": self.capacity,
            "free": self.free,
            "transient": self.transient,
            "models": {name: plan.parts() for name, plan in self._counted().items()},
        }

    def table(self, name: str, plan: MemoryPlan, weights_key: str = "") -> str:
        """Promised, needed by `plan`, and free bytes per rank, as text."""
        shared = self.holds(weights_key)
        where = f"of {self.ranks} ranks sharing this host" if self.shared and self.ranks > 1 else "of each device"
        rows = [("capacity" if self.ranks == 1 else f"capacity ({where})", self.capacity)]
        rows += [(f"promised to {other}", -held.resident) for other, held in self._counted().items()]
        rows += [("free", self.free)]
        for part, size in plan.parts().items():
            if part == "weights" and shared:
                rows.append((f"{name}: weights (shared, already there)", 0))
            elif size:
                rows.append((f"{name}: {part}", size))
        needed = self._needed(plan, weights_key)
        if self.transient > plan.transient:
            rows.append(("working space of the other models, beyond its own", self.transient - plan.transient))
        rows += [("needed", needed), ("missing", needed - self.free)]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"  {label:<{width}}  {format_size(size):>11}" for label, size in rows)

    def _counted(self) -> dict[str, MemoryPlan]:
        """All promises, with shared weights counted in the first promise that has them."""
        found: dict[str, MemoryPlan] = {}
        counted: set[str] = set()
        for name, (plan, key) in self._promises.items():
            weights = plan.weights if not key else 0 if key in counted else self._shared_weights[key]
            counted.add(key)
            found[name] = replace(plan, weights=weights)
        return found


def format_size(size: int) -> str:
    """Format bytes for people: `1.5 GiB`."""
    value, sign = float(abs(size)), "-" if size < 0 else ""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{sign}{value:.0f} {unit}" if unit == "B" else f"{sign}{value:.1f} {unit}"
        value /= 1024
    return f"{sign}{value:.2f} GiB"


def parse_size(text: str | int, name: str = "memory") -> int:
    """Parse bytes from `512MiB`, `8GB`, `8G` (1024-based), or a plain number. Raises UsageError naming `name`."""
    match = _SIZE.fullmatch(str(text))
    unit = _UNITS.get(match[2].upper()) if match else None
    size = float(match[1]) * unit if match and unit else 0.0
    if not 1 <= size <= MAX_SIZE:
        raise UsageError(
            f"{name}: not a memory size: {str(text)[:40]!r} (allowed: 1 B to 1024 TiB)",
            hint="write a number and a unit, such as 512MiB or 8GB",
        )
    return int(size)


def parse_assume(text: str) -> list[int]:
    """Bytes of each device of an assumed machine: `8x80GiB`. Raises UsageError."""
    count, cross, size = text.lower().partition("x")
    if not cross:
        count, size = "1", text
    if not re.fullmatch(r"\s*[0-9]{1,4}\s*", count) or not 1 <= int(count) <= MAX_RANKS:
        raise UsageError(
            f"--assume: not a machine: {text[:40]!r} (allowed: 1 to {MAX_RANKS} devices)",
            hint="write devices x memory, such as 8x80GiB",
        )
    return [parse_size(size, "--assume")] * int(count)


def host_capacity(limit: int | None = None, *, ranks: int = 0) -> int:
    """Bytes for models on this host: the least of available memory, the rest of the cgroup's limit, and `limit`.

    Interpreters and libraries of `ranks` ranks that are still to be started are subtracted from the machine's memory;
    `limit` (the user's `--memory`) is for models alone.
    """
    available = _meminfo_available()
    rest = _cgroup_rest()
    machine = min(x for x in (available, rest) if x is not None) if available or rest else 0
    machine = max(0, machine - ranks * RANK_BASELINE_BYTES)
    return machine if limit is None else min(machine, limit)


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_rest(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Limit minus use, the least over this process's cgroup and its parents (v2 and v1); None without a limit."""
    rests: list[int] = []
    try:
        entries = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return None
    for _, controllers, path in entries:
        v1 = "memory" in controllers.split(",")
        if controllers and not v1:
            continue
        base = root / "memory" if v1 else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
        here = base / path.lstrip("/")
        while True:
            rest = _rest_at(here, *names)
            if rest is not None:
                rests.append(rest)
            if here == base or base not in here.parents:
                break
            here = here.parent
    return min(rests, default=None)


def _rest_at(directory: Path, limit_name: str, usage_name: str) -> int | None:
    try:
        limit = (directory / limit_name).read_text().strip()
        used = int((directory / usage_name).read_text())
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not limit.isdecimal() or int(limit) >= 1 << 60:
        return None
    # Clean page cache counts as used but is freed under pressure.
    return max(0, int(limit) - used + int(stat.get("total_inactive_file", stat.get("inactive_file", 0))))
