"""How the ranks are started: the accelerate configuration, the command line, and the environment.

An accelerate configuration file may set the number of processes, the devices, and environment variables. All other
settings change how accelerate trains, which the engine does itself. They are refused by name, unless they have the
value that `accelerate config` writes for "no".
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harmony_core.config.yaml_source import Issue, load_yaml_file
from harmony_core.errors import ConfigError, ResourceError
from harmony_core.options import VARIABLE, EngineOptions
from harmony_core.rpc.platform import loopback_interface

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
"""Accepted values in addition to those that are empty, 0 or false."""
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
"""The variables that `environment` may set, with the kind and form of the value. They never name files or libraries."""


@dataclass(frozen=True)
class AccelerateSettings:
    """The settings taken from the file. `gpu_ids` is "" for all devices."""

    num_processes: int | None = None
    gpu_ids: str = ""
    cpu: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def read_accelerate_config(path: Path) -> AccelerateSettings:
    """Read and check a file. Raises ConfigError listing every problem with its place, NotFoundError, ResourceError."""
    document = load_yaml_file(path)
    values = document.data
    count, gpu_ids, environment = (values.get(key) for key in _TAKEN)
    wrong = [
        (key, f"{value!r} is not supported: the engine decides it itself")
        for key, value in values.items()
        if not _allowed(key, value)
    ]
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 1024):
        wrong.append(("num_processes", f"{str(count)[:40]} is no whole number from 1 to 1024"))
    if gpu_ids is not None and (isinstance(gpu_ids, bool) or not re.fullmatch(_DEVICES, str(gpu_ids), re.ASCII)):
        wrong.append(("gpu_ids", "must be `all` or device numbers with commas between them"))
    if not isinstance(environment, dict | None):
        wrong.append(("environment", "must map names of variables to text or numbers"))
    environment = environment if isinstance(environment, dict) else {}
    wrong += [
        ("environment", f"{str(name)[:60]!r} {problem}")
        for name, value in environment.items()
        if (problem := _problem(str(name), value))
    ]
    places = {key: place.at_key() for key, _ in wrong if (place := document.sources.get((key,)))}
    if issues := [*document.issues, *(Issue(message, places.get(key), key) for key, message in wrong)]:
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
    if not value or key in _TAKEN or key == "main_process_port":  # the port is always a free one
        return True
    return any(value == ok and type(value) is type(ok) for ok in _HARMLESS.get(key, ()))


def _problem(name: str, value: Any) -> str:
    """The reason why a variable may not be set to a value, or ""."""
    if name not in VARIABLES:
        return "may not be set in this file, only in the environment that the run is started in"
    kind, pattern = VARIABLES[name]
    if not isinstance(value, str | int | float) or not re.fullmatch(pattern, _text(value), re.ASCII):
        return f"must be {kind}, not {str(value)[:60]!r}"
    return ""


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


_INHERITED_NO_MORE = ("ACCELERATE_", "FSDP_", "PET_", "TORCHELASTIC_", "ADAPTIVE_RANK_")
_TORCHRUN = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
}


@dataclass(frozen=True)
class Launch:
    """A resolved launch: device "cpu" or "cuda", the number of ranks, and the settings of the user's file."""

    device: str
    world_size: int
    settings: AccelerateSettings = field(default_factory=AccelerateSettings)
    devices: list[str] = field(default_factory=list)
    """Identifiers of the CUDA devices, one for each rank."""


def resolve(num_processes: int | None, device: str, accelerate_config: Path | None) -> Launch:
    """The devices and the number of ranks for these options on this machine. Flags override the accelerate file.

    Raises ConfigError, ResourceError if there are fewer devices, NotFoundError for the file.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device {device!r}", hint="auto, cpu or cuda")
    settings = read_accelerate_config(accelerate_config) if accelerate_config else AccelerateSettings()
    count = num_processes if num_processes is not None else settings.num_processes
    if count is not None and count < 1:
        raise ConfigError(f"{count} ranks asked for", hint="--num-processes must be at least 1")
    on_cpu = device == "cpu" or (device == "auto" and settings.cpu)
    chosen = {"CUDA_VISIBLE_DEVICES": settings.gpu_ids} if settings.gpu_ids else os.environ
    devices = [] if on_cpu else visible_devices(chosen)
    if on_cpu or (device == "auto" and not devices):
        return Launch("cpu", count or 1, settings)
    found = len(devices)
    if found < (count or 1):
        raise ResourceError(
            f"{count or 1} ranks asked for, {found} CUDA devices visible",
            hint=f"--num-processes {found}, or --device cpu" if found else "--device cpu",
        )
    return Launch("cuda", count or found, settings, devices[: count or found])


def launch_command(options: EngineOptions, launch: Launch, directory: Path) -> list[str]:
    """The command line of the launcher, for a child of this process; writes its configuration into `directory`."""
    start = [sys.executable, "-P", "-m", "harmony_core.launch.start", str(os.getpid())]
    if options.launcher:
        return [*start, "0", *options.launcher, *options.command]
    config = directory / "accelerate.yaml"
    config.write_text(_config_file(launch), encoding="utf-8")
    ranks = str(launch.world_size)
    return [
        *(*start, ranks, "--config_file", str(config)),
        *("--num_processes", ranks, "--num_machines", "1", "--machine_rank", "0"),
        *("--main_process_port", "0", "--max_restarts", "0", "--rdzv_backend", "in_process"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--log_dir", str(directory / "elastic")),
        *("--no_python", *options.command),
    ]


def _config_file(launch: Launch) -> str:
    """One rank is started without torchrun, several with it. `use_cpu` stays false on CPU: it starts only one rank."""
    kind = "MULTI_GPU" if launch.world_size > 1 else "NO"
    return (
        "compute_environment: LOCAL_MACHINE\n"
        f"distributed_type: '{kind}'\n"
        f"num_processes: {launch.world_size}\n"
        "num_machines: 1\nmachine_rank: 0\nmain_process_port: 0\nrdzv_backend: in_process\n"
        "mixed_precision: 'no'\nuse_cpu: false\ndebug: false\n"
    )


def launch_environment(options: EngineOptions, launch: Launch, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the launcher and the ranks: our defaults, the caller's environment, and our fixed values."""
    env = {
        name: value
        for name, value in environ.items()
        if name not in _TORCHRUN and not name.startswith(_INHERITED_NO_MORE)
    }
    env |= launch.settings.environment
    cores = max(1, available_cores() // launch.world_size)
    preferred = {
        "OMP_NUM_THREADS": str(cores),
        # Threads that spin while they wait cost several times the work itself on a busy machine.
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the order in which the driver's own tool counts them
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "MALLOC_ARENA_MAX": "1",
        # Tensors above this size are returned to the system when they are freed: kept in the heap as fragments, they
        # would raise memory to one and a half times its plan. Smaller ones stay, and cost no page faults.
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        "TORCHINDUCTOR_COMPILE_THREADS": str(min(8, cores)),
    }
    if options.cache is not None:
        preferred["TORCHINDUCTOR_CACHE_DIR"] = str(options.cache.absolute() / "inductor")
        preferred["TRITON_CACHE_DIR"] = str(options.cache.absolute() / "triton")
    if loopback := loopback_interface():
        preferred |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    fixed = {
        "CUDA_VISIBLE_DEVICES": ",".join(launch.devices),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        "NCCL_NVLS_ENABLE": "0",  # no NVLink multicast
        "NCCL_RAS_ENABLE": "0",  # it listens, and answers any client
        "TORCH_GLOO_LAZY_INIT": "0",  # ranks connect while a group is made; afterwards its port is closed
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "ADAPTIVE_RUN_ID": options.run_id,
        VARIABLE: options.for_ranks(launch.device, launch.world_size),
        **({"OMP_NUM_THREADS": "1"} if options.deterministic else {}),
    }
    return preferred | env | fixed


def available_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed_devices() -> int:
    """Number of CUDA devices of this machine, as listed by the driver's own tool; 0 without the tool."""
    try:
        shown = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in shown.splitlines())


def visible_devices(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Identifiers of the CUDA devices that a process with this environment sees, in its order."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    installed = installed_devices()
    if chosen is None or not installed:
        return [str(index) for index in range(installed)]

    def is_device(name: str) -> bool:
        return bool(name) and not name.startswith("-") and not (name.isdigit() and int(name) >= installed)

    # The CUDA driver stops at the first name that does not match a device.
    return list(itertools.takewhile(is_device, map(str.strip, chosen.split(","))))
