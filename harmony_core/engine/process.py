"""One rank, from its first instruction: log file, death signal, connection, torch, process group, host.

Order matters. The output goes to its file and the driver hears of us before anything slow or fallible happens; torch
and the engine are imported before the rendezvous, so that a broken import on one rank keeps no other waiting.

Imports run without garbage collection: the collector would walk everything that torch and transformers define over and
over, a quarter of the time, and find nothing. What they defined is set aside for good, so that no later collection, in
the middle of a decode step, walks it either.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import importlib.metadata
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from harmony_core import __version__
from harmony_core.engine.topology import COLLECTIVE_TIMEOUT, Topology
from harmony_core.rpc.platform import die_with_parent
from harmony_core.rpc.protocol import PROTOCOL_VERSION, Hello
from harmony_core.rpc.rank_channel import DRIVER_GONE, IDLE, RankChannel

__all__ = ["Topology", "begin", "live", "run_rank"]

Serve = Callable[[RankChannel, Topology], None]

READY = "rank_ready"
"""The event by which a rank says that it takes requests, and how many seconds each part of its start took."""

LIBRARIES = ("torch", "torch.distributed", "transformers.modeling_utils", "transformers.models.auto")
"""What the engine imports of others, so that it can be timed apart."""


def begin() -> RankChannel:
    """A process becomes a rank: everything that needs no torch. Its environment comes from the launcher."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    _redirect_output(Path(os.environ["ADAPTIVE_RANK_LOG_DIR"]) / f"rank-{rank}.log")
    sys.stderr.write(f"rank {rank} of {world_size}, pid {os.getpid()}\n")
    if not die_with_parent(int(os.environ["ADAPTIVE_LAUNCHER_PID"])):
        os._exit(DRIVER_GONE)
    faulthandler.enable(all_threads=True)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is the driver's business
    socket_path = os.environ["ADAPTIVE_RANK_SOCKET"]
    device = os.environ["ADAPTIVE_RANK_DEVICE"]
    hello = Hello(
        token=os.environ.pop("ADAPTIVE_RANK_TOKEN"),
        protocol=PROTOCOL_VERSION,
        version=__version__,
        rank=rank,
        world_size=world_size,
        pid=os.getpid(),
        device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device,
        torch=_torch_version(),
    )
    try:
        return RankChannel.connect(socket_path, hello, lambda: _sweep(socket_path))
    except OSError as error:
        sys.stderr.write(f"rank {rank}: cannot reach the driver: {error}\n")
        _sweep(socket_path)
        os._exit(DRIVER_GONE)


def _redirect_output(path: Path) -> None:
    """Send this process's output, that of native code included, to a file that only the user can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)


def _sweep(socket_path: str) -> None:
    """Remove what the driver, which is gone, can no longer remove."""
    shutil.rmtree(Path(socket_path).parent, ignore_errors=True)


def _torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def run_rank(load: Callable[[], Serve], libraries: Sequence[str] = ()) -> None:
    """A rank's whole life. `load` imports the engine and returns what serves the channel. Does not return.

    `libraries` are modules to import before that.
    """
    watch = _Stopwatch()
    channel = begin()
    watch.lap("connect")
    live(channel, lambda: _serve(channel, load, libraries, watch))


def live(channel: RankChannel, work: Callable[[], None]) -> None:
    """Do `work` at the edge of the process: whatever it raises, the driver is told. Does not return."""
    try:
        work()
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        channel.fatal(error)
        _leave(1)
    channel.flush()
    _leave(0)


class _Stopwatch:
    """Seconds by name; `lap` gives a name the time since the last one."""

    def __init__(self) -> None:
        # The interpreter and our first modules are up: what they cost is the processor time so far.
        self.seconds = {"python": time.process_time()}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def _serve(channel: RankChannel, load: Callable[[], Serve], libraries: Sequence[str], watch: _Stopwatch) -> None:
    channel.phase = "importing"
    gc.disable()
    for name in libraries:
        importlib.import_module(name)
        watch.lap(name.partition(".")[0])
    serve = load()
    gc.freeze()
    gc.enable()
    topology = _topology(channel.rank)
    watch.lap("engine")
    channel.phase = "rendezvous"
    _init_distributed(topology)
    watch.lap("rendezvous")
    channel.phase = IDLE
    seconds = {name: round(value, 4) for name, value in watch.seconds.items()}
    channel.event(READY, {"device": str(topology.device), "seconds": seconds})
    serve(channel, topology)


def _leave(status: int) -> None:
    """End without the interpreter's teardown, which can wait for other ranks' collectives."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _topology(rank: int) -> Topology:
    import torch

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    world_size, promised = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ["ADAPTIVE_RANK_WORLD_SIZE"])
    if world_size != promised:
        raise RuntimeError(f"{promised} ranks were promised, the launcher started {world_size}")
    if os.environ["ADAPTIVE_RANK_DEVICE"] == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    deterministic = os.environ.get("ADAPTIVE_RANK_DETERMINISTIC") == "1"
    return Topology(rank=rank, world_size=world_size, device=device, deterministic=deterministic)


def _init_distributed(topology: Topology) -> None:
    """The default group: gloo for CPU tensors and, on CUDA devices, nccl for theirs."""
    import torch.distributed as dist

    # Documented names that torch.distributed re-exports without saying so to type checkers.
    from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

    store: Store
    if topology.world_size == 1:
        store = HashStore()
    else:
        # The launcher holds the store. Its time limit is the rendezvous's; groups made on it have their own.
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            topology.world_size,
            is_master=False,
            timeout=timedelta(seconds=float(os.environ["ADAPTIVE_RANK_INIT_TIMEOUT"])),
        )
    cuda = topology.device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=PrefixStore("harmony", store),
        rank=topology.rank,
        world_size=topology.world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=topology.device if cuda else None,
    )


def _load_engine() -> Serve:
    from harmony_core.engine.host import Host

    return lambda channel, topology: Host(channel, topology).serve()


if __name__ == "__main__":
    run_rank(_load_engine, LIBRARIES)
