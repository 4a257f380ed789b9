"""What is started, and with which environment: the command line, the configuration file and the variables."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from harmony_core.errors import ConfigError, ResourceError
from harmony_core.launch.accelerate_config import AccelerateSettings, read_accelerate_config
from harmony_core.options import VARIABLE, EngineOptions
from harmony_core.rpc.platform import loopback_interface

_ACCELERATE = "accelerate.commands.launch"

_INHERITED_NO_MORE = ("ACCELERATE_", "FSDP_", "PET_", "TORCHELASTIC_", "ADAPTIVE_RANK_")
_TORCHRUN = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
}


@dataclass(frozen=True)
class Launch:
    """A resolved launch: device "cpu" or "cuda", how many ranks, and what the user's file adds."""

    device: str
    world_size: int
    settings: AccelerateSettings = field(default_factory=AccelerateSettings)
    devices: list[str] = field(default_factory=list)
    """Identifiers of the CUDA devices, one for each rank."""


def resolve(num_processes: int | None, device: str, accelerate_config: Path | None) -> Launch:
    """The devices and the number of ranks that these options mean here. Flags win over the accelerate file.

    Raises ConfigError, ResourceError when there are fewer devices, NotFoundError for the file.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device {device!r}", hint="auto, cpu or cuda")
    settings = read_accelerate_config(accelerate_config) if accelerate_config else AccelerateSettings()
    count = num_processes if num_processes is not None else settings.num_processes
    if count is not None and count < 1:
        raise ConfigError(f"{count} ranks asked for", hint="--num-processes must be at least 1")
    if device == "auto" and settings.cpu:
        device = "cpu"
    if device == "cpu":
        return Launch("cpu", count or 1, settings)
    devices = visible_devices({"CUDA_VISIBLE_DEVICES": settings.gpu_ids} if settings.gpu_ids else os.environ)
    found = len(devices)
    if device == "auto" and not found:
        return Launch("cpu", count or 1, settings)
    if found < (count or 1):
        raise ResourceError(
            f"{count or 1} ranks asked for, {found} CUDA devices visible",
            hint=f"--num-processes {found}, or --device cpu" if found else "--device cpu",
        )
    return Launch("cuda", count or found, settings, devices[: count or found])


def launch_command(options: EngineOptions, launch: Launch, directory: Path) -> list[str]:
    """The command line of the launcher; writes its configuration file into `directory`."""
    if options.launcher:
        return [*options.launcher, *options.command]
    config = directory / "accelerate.yaml"
    config.write_text(_config_file(launch), encoding="utf-8")
    return [
        *(sys.executable, "-P", "-m", "harmony_core.launch.rendezvous" if launch.world_size > 1 else _ACCELERATE),
        *("--config_file", str(config)),
        *("--num_processes", str(launch.world_size), "--num_machines", "1", "--machine_rank", "0"),
        *("--main_process_port", "0", "--max_restarts", "0", "--rdzv_backend", "in_process"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--log_dir", str(directory / "elastic")),
        *("--no_python", *options.command),
    ]


def _config_file(launch: Launch) -> str:
    """One rank is started without torchrun. More are started with it, on CPU too: `use_cpu` would start only one."""
    kind = "MULTI_GPU" if launch.world_size > 1 else "NO"
    return (
        "compute_environment: LOCAL_MACHINE\n"
        f"distributed_type: '{kind}'\n"
        f"num_processes: {launch.world_size}\n"
        "num_machines: 1\nmachine_rank: 0\nmain_process_port: 0\nrdzv_backend: in_process\n"
        "mixed_precision: 'no'\nuse_cpu: false\ndebug: false\n"
    )


def launch_environment(options: EngineOptions, launch: Launch, environ: Mapping[str, str]) -> dict[str, str]:
    """The launcher's and the ranks' environment, made from the caller's."""
    env = {
        name: value
        for name, value in environ.items()
        if name not in _TORCHRUN and not name.startswith(_INHERITED_NO_MORE)
    }
    env |= launch.settings.environment
    env["CUDA_VISIBLE_DEVICES"] = ",".join(launch.devices)
    for name, value in (_preferred(launch) | _compiling(options, launch)).items():
        env.setdefault(name, value)
    return env | _fixed(options, launch)


def _preferred(launch: Launch) -> dict[str, str]:
    """Defaults that the user's environment may override."""
    preferred = {
        "OMP_NUM_THREADS": str(max(1, available_cores() // launch.world_size)),
        # Threads that spin while they wait cost a busy machine several times the work itself.
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the order in which the driver's own tool counts them
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "MALLOC_ARENA_MAX": "1",
        # Larger tensors go back to the system when they are freed: pieces of them in the heap would make memory outgrow
        # its plan by half. Smaller ones stay, and cost no page faults.
        "MALLOC_MMAP_THRESHOLD_": "1048576",
    }
    if loopback := loopback_interface():
        preferred |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    return preferred


def _compiling(options: EngineOptions, launch: Launch) -> dict[str, str]:
    """How compiled layers and kernels are made, and kept for the next run."""
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, min(8, available_cores() // launch.world_size)))}
    if options.cache is None:
        return threads
    return threads | {
        "TORCHINDUCTOR_CACHE_DIR": str(options.cache.absolute() / "inductor"),
        "TRITON_CACHE_DIR": str(options.cache.absolute() / "triton"),
    }


def _fixed(options: EngineOptions, launch: Launch) -> dict[str, str]:
    return {
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        "NCCL_NVLS_ENABLE": "0",  # no NVLink multicast
        "NCCL_RAS_ENABLE": "0",  # it listens, and answers anyone
        "TORCH_GLOO_LAZY_INIT": "0",  # ranks connect while a group is made: afterwards its port takes nothing
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "ADAPTIVE_RUN_ID": options.run_id,
        VARIABLE: options.for_ranks(launch.device, launch.world_size),
        **({"OMP_NUM_THREADS": "1"} if options.deterministic else {}),
    }


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def installed_devices() -> int:
    """CUDA devices of this machine, as the driver's own tool lists them; 0 without one."""
    try:
        shown = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in shown.splitlines())


def visible_devices(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Identifiers of the CUDA devices that a process with this environment sees, in its order."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(index) for index in range(installed_devices())]
    seen: list[str] = []
    installed = installed_devices()
    for name in (part.strip() for part in chosen.split(",")):
        # The CUDA driver stops at the first name that is none.
        if not name or name.startswith("-") or (name.isdigit() and int(name) >= installed):
            break
        seen.append(name)
    return seen if installed else []
