"""What a user's accelerate configuration file may say: how many processes, which devices, and environment variables.

Everything else in such a file changes how accelerate would train, which the engine does itself: it is refused by name,
unless it has the value that `accelerate config` writes for "no".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harmony_core.config.problems import Issue
from harmony_core.config.yaml_source import load_yaml_file
from harmony_core.errors import ConfigError

_HARMLESS: dict[str, tuple[Any, ...]] = {
    "compute_environment": ("LOCAL_MACHINE",),
    "distributed_type": ("NO", "MULTI_GPU", "MULTI_CPU"),
    "downcast_bf16": ("no", "No"),
    "dynamo_backend": ("no", "NO", "No"),
    "main_process_ip": ("127.0.0.1", "localhost"),
    "main_training_function": ("main",),
    "mixed_precision": ("no",),
    "num_machines": (1,),
    "rdzv_backend": ("static",),
    "same_network": (True,),
    "use_cpu": (True,),
}
"""Values beside those that are empty, 0 or false."""
_TAKEN = ("num_processes", "gpu_ids", "environment")


@dataclass(frozen=True)
class AccelerateSettings:
    """What is taken from the file. `gpu_ids` is "" for all devices."""

    num_processes: int | None = None
    gpu_ids: str = ""
    cpu: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def read_accelerate_config(path: Path) -> AccelerateSettings:
    """Read and check a file. Raises ConfigError with every problem and its place, NotFoundError, ResourceError."""
    document = load_yaml_file(path)
    issues, values = list(document.issues), document.data

    def refuse(key: str, message: str) -> None:
        place = document.sources.get((key,))
        issues.append(Issue(message, place.at_key() if place else None, key))

    for key, value in values.items():
        if not _allowed(key, value):
            refuse(key, f"{value!r} is not supported: the engine decides it itself")
    count, gpu_ids, environment = (values.get(key) for key in _TAKEN)
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        refuse("num_processes", f"{count!r} is not a whole number of at least 1")
    if gpu_ids is not None and (not isinstance(gpu_ids, str | int) or isinstance(gpu_ids, bool)):
        refuse("gpu_ids", "must be `all` or device numbers with commas between them")
    environment = {} if environment is None else environment
    if not isinstance(environment, dict) or not all(_is_variable(*item) for item in environment.items()):
        refuse("environment", "must map names of variables to text or numbers")
    if issues:
        texts = [str(issue) for issue in issues]
        raise ConfigError(
            "\n".join(texts),
            hint="an accelerate configuration may set num_processes, gpu_ids and environment only",
            issues=texts,
        )
    return AccelerateSettings(
        num_processes=count,
        gpu_ids="" if gpu_ids in (None, "all") else str(gpu_ids),
        cpu=values.get("use_cpu") is True,
        environment={str(name): str(value) for name, value in environment.items()},
    )


def _allowed(key: str, value: Any) -> bool:
    if not value or key in _TAKEN or key == "main_process_port":  # ours is always a free one
        return True
    return any(value == ok and type(value) is type(ok) for ok in _HARMLESS.get(key, ()))


def _is_variable(name: Any, value: Any) -> bool:
    return isinstance(name, str) and bool(name) and "=" not in name and isinstance(value, str | int | float)
