"""How many ranks there will be, on what, and how many bytes each may use."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from harmony_core.errors import ResourceError, UsageError
from harmony_core.launch.launcher import Launch, resolve
from harmony_core.memory.ledger import Ledger, host_capacity, parse_assume
from harmony_core.options import EngineOptions

CUDA_BASELINE_BYTES = 1 << 30
"""What a rank takes of its device before its first model: context, libraries, communication buffers."""

CUDA_USABLE = 0.95
"""Of the free memory: the rest is what torch's allocator keeps in pieces too small to use."""


@dataclass(frozen=True)
class Machine:
    """The ranks' devices. `capacity`: bytes of each CUDA device, or of the host that CPU ranks share."""

    launch: Launch
    capacity: int | list[int]

    @staticmethod
    def find(options: EngineOptions) -> Machine:
        """What the options and this machine (or the assumed one) give. Raises ResourceError, ConfigError."""
        if options.assume:
            _check_mode(options, "cuda")
            devices = parse_assume(options.assume)
            world_size = options.num_processes or len(devices)
            if world_size > len(devices):
                raise UsageError(f"--num-processes {world_size} on an assumed machine of {len(devices)} devices")
            return Machine(Launch("cuda", world_size), devices[:world_size])
        launch = resolve(options.num_processes, options.device, options.accelerate_config)
        _check_mode(options, launch.device)
        if launch.device == "cpu":
            return Machine(launch, host_capacity(options.memory, ranks=launch.world_size))
        free = cuda_free_bytes(launch.devices)
        return Machine(launch, [min(b, options.memory or b) for b in free])

    @property
    def device(self) -> str:
        """ "cpu" or "cuda"."""
        return self.launch.device

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.launch.world_size

    def ledger(self) -> Ledger:
        """An empty ledger of this machine."""
        if isinstance(self.capacity, int):
            return Ledger(self.capacity, ranks=self.world_size)
        return Ledger(self.capacity)


def _check_mode(options: EngineOptions, device: str) -> None:
    if options.deterministic and device != "cpu":
        raise ResourceError(
            "--deterministic is for ranks on CPU: on CUDA sampler and trainer use kernels whose last bits differ",
            hint="--device cpu, or leave it out: optim_step's sampler_logprob_* metrics report the difference",
        )


def cuda_free_bytes(devices: list[str]) -> list[int]:
    """Free bytes of the named CUDA devices, as the driver's own tool reports them, less what a process costs."""
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "-i", ",".join(devices)]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ResourceError("the memory of the CUDA devices cannot be read: nvidia-smi failed") from error
    return [max(0, int(int(line) * 2**20 * CUDA_USABLE) - CUDA_BASELINE_BYTES) for line in shown.split()]
