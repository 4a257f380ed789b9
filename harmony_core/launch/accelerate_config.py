"""What a user's accelerate configuration file may say: how many processes, which devices, and environment variables.

Everything else in such a file changes how accelerate would train, which the engine does itself: it is refused by name,
unless it has the value that `accelerate config` writes for "no".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from harmony_core.errors import ConfigError, NotFoundError

_HARMLESS: dict[str, tuple[Any, ...]] = {
    "compute_environment": ("LOCAL_MACHINE",),
    "distributed_type": ("NO", "MULTI_GPU", "MULTI_CPU"),
    "debug": (False,),
    "downcast_bf16": (False, "no", "No"),
    "dynamo_backend": ("no", "NO", "No"),
    "enable_cpu_affinity": (False,),
    "fp16": (False,),
    "machine_rank": (0,),
    "main_process_ip": (None, "127.0.0.1", "localhost"),
    "main_training_function": ("main",),
    "mixed_precision": ("no", None),
    "num_machines": (1,),
    "rdzv_backend": ("static",),
    "same_network": (True, False),
    "tpu_env": ([], None),
    "tpu_use_cluster": (False,),
    "tpu_use_sudo": (False,),
    "use_cpu": (False, True),
}
_EMPTY = frozenset(
    (
        *("deepspeed_config", "fsdp_config", "megatron_lm_config", "mpirun_config", "fp8_config"),
        *("parallelism_config", "dynamo_config", "commands", "command_file", "tpu_name", "tpu_vm", "tpu_zone"),
    )
)
_MAX_BYTES = 1 << 16


@dataclass(frozen=True)
class AccelerateSettings:
    """What is taken from the file. `gpu_ids` is "" for all devices."""

    num_processes: int | None = None
    gpu_ids: str = ""
    cpu: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def read_accelerate_config(path: Path) -> AccelerateSettings:
    """Read and check a file. Raises ConfigError listing every key that may not be set, NotFoundError."""
    values = _load(path)
    issues = [f"{path}: {key}: {values[key]!r} is not supported" for key in values if not _allowed(key, values[key])]
    count, gpu_ids = values.get("num_processes"), values.get("gpu_ids")
    environment = values.get("environment") or {}
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        issues.append(f"{path}: num_processes: {count!r} is not a whole number of at least 1")
    if not isinstance(environment, dict) or not all(_is_variable(*item) for item in environment.items()):
        issues.append(f"{path}: environment: must map names of variables to text or numbers")
    if issues:
        raise ConfigError(
            f"{path} sets what the engine decides itself:\n  " + "\n  ".join(issues),
            hint="an accelerate configuration may set num_processes, gpu_ids and environment only",
            issues=issues,
        )
    return AccelerateSettings(
        num_processes=count,
        gpu_ids="" if gpu_ids in (None, "all") else str(gpu_ids),
        cpu=values.get("use_cpu") is True,
        environment={str(name): str(value) for name, value in environment.items()},
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: more than {_MAX_BYTES} bytes; not an accelerate configuration")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"there is no accelerate configuration {path}") from None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: must map names to values")
    return values


def _allowed(key: str, value: Any) -> bool:
    if key in ("num_processes", "gpu_ids", "environment", "main_process_port"):  # our port is always a free one
        return True
    if key in _EMPTY:
        return not value
    return key in _HARMLESS and any(value == ok and type(value) is type(ok) for ok in _HARMLESS[key])


def _is_variable(name: Any, value: Any) -> bool:
    return isinstance(name, str) and bool(name) and "=" not in name and isinstance(value, str | int | float)
