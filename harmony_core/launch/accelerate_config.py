"""What a user's accelerate configuration file may say: how many processes, which devices, and environment variables.

Everything else in such a file changes how accelerate would train, which the engine does itself: it is refused by name,
unless it has the value that `accelerate config` writes for "no".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harmony_core.config.yaml_source import Issue, load_yaml_file
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


_NUMBER = r"-?\d{1,12}(\.\d{1,6})?|true|false"
_INTERFACES = r"[\^=]?[A-Za-z0-9][\w.:-]{0,31}(,[A-Za-z0-9][\w.:-]{0,31})*"
_LEVEL = r"\^?[A-Za-z0-9]{1,16}(,[A-Za-z0-9]{1,16})*"
_DEVICES = r"[A-Za-z0-9][\w-]{0,63}(,[A-Za-z0-9][\w-]{0,63})*"
_KINDS = {
    "a number": (
        _NUMBER,
        "OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS KMP_BLOCKTIME MALLOC_ARENA_MAX CUDA_LAUNCH_BLOCKING "
        "CUDA_DEVICE_MAX_CONNECTIONS TORCHINDUCTOR_COMPILE_THREADS TORCH_SHOW_CPP_STACKTRACES "
        "NCCL_ASYNC_ERROR_HANDLING TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_NCCL_BLOCKING_WAIT "
        "TORCH_NCCL_ENABLE_MONITORING TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC NCCL_BUFFSIZE NCCL_NTHREADS NCCL_MIN_NCHANNELS "
        "NCCL_MAX_NCHANNELS NCCL_MIN_CTAS NCCL_MAX_CTAS NCCL_CROSS_NIC NCCL_CUMEM_ENABLE "
        "NCCL_P2P_DISABLE NCCL_SHM_DISABLE NCCL_NET_DISABLE_INTRA NCCL_SOCKET_NTHREADS NCCL_NSOCKS_PERTHREAD "
        "NCCL_IB_DISABLE NCCL_IB_TIMEOUT NCCL_IB_RETRY_CNT NCCL_IB_GID_INDEX NCCL_IB_SL NCCL_IB_TC "
        "NCCL_IB_QPS_PER_CONNECTION NCCL_IB_PCI_RELAXED_ORDERING NCCL_NET_GDR_READ NCCL_DMABUF_ENABLE",
    ),
    "names of network interfaces": (_INTERFACES, "NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME TP_SOCKET_IFNAME NCCL_IB_HCA"),
    "a level or a list of words": (
        _LEVEL,
        "NCCL_DEBUG NCCL_DEBUG_SUBSYS TORCH_CPP_LOG_LEVEL TORCH_DISTRIBUTED_DEBUG NCCL_P2P_LEVEL NCCL_NET_GDR_LEVEL "
        "OMP_WAIT_POLICY",
    ),
    "a list of devices": (_DEVICES, "CUDA_VISIBLE_DEVICES"),
}
VARIABLES = {name: (kind, pattern) for kind, (pattern, names) in _KINDS.items() for name in names.split()}
"""What `environment` may set, with the kind and form of the value: nothing that names a file, a folder or a library."""


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
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 1024):
        refuse("num_processes", f"{str(count)[:40]} is no whole number from 1 to 1024")
    if gpu_ids is not None and (isinstance(gpu_ids, bool) or not re.fullmatch(_DEVICES, str(gpu_ids), re.ASCII)):
        refuse("gpu_ids", "must be `all` or device numbers with commas between them")
    environment = {} if environment is None else environment
    if not isinstance(environment, dict):
        refuse("environment", "must map names of variables to text or numbers")
        environment = {}
    for name, value in environment.items():
        if problem := _problem(str(name), value):
            refuse("environment", f"{str(name)[:60]!r} {problem}")
    if issues:
        texts = [str(issue) for issue in issues]
        raise ConfigError(
            "\n".join(texts),
            hint="an accelerate configuration may set num_processes, gpu_ids and environment only",
            issues=texts,
        )
    variables = {str(name): _text(value) for name, value in environment.items()}
    devices = variables.pop("CUDA_VISIBLE_DEVICES", "all")
    devices = devices if gpu_ids is None else str(gpu_ids)
    return AccelerateSettings(
        num_processes=count,
        gpu_ids="" if devices == "all" else devices,
        cpu=values.get("use_cpu") is True,
        environment=variables,
    )


def _allowed(key: str, value: Any) -> bool:
    if not value or key in _TAKEN or key == "main_process_port":  # ours is always a free one
        return True
    return any(value == ok and type(value) is type(ok) for ok in _HARMLESS.get(key, ()))


def _problem(name: str, value: Any) -> str:
    """Why a variable may not be set to a value, or ""."""
    if name not in VARIABLES:
        return "may not be set in this file, only in the environment that the run is started in"
    kind, pattern = VARIABLES[name]
    if not isinstance(value, str | int | float) or not re.fullmatch(pattern, _text(value), re.ASCII):
        return f"must be {kind}, not {str(value)[:60]!r}"
    return ""


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
