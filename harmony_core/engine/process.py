"""One rank, from its first instruction: log file, death signal, connection, torch, process group, worker.

Order matters. The output is redirected and the driver is notified before any slow or fallible work; torch and the
engine are imported before the rendezvous, so that a broken import on one rank does not block the others.

Imports run without garbage collection, which would scan all objects of torch and transformers repeatedly, take a
quarter of the time and free no memory. These objects are then frozen, so that later collections, such as one during a
decode step, do not scan them.
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
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from harmony_core import __version__
from harmony_core.engine.topology import COLLECTIVE_TIMEOUT, OPTIONS, Topology
from harmony_core.options import INIT_TIMEOUT
from harmony_core.rpc.platform import die_with_parent
from harmony_core.rpc.protocol import PROTOCOL_VERSION, Hello
from harmony_core.rpc.rank_channel import DRIVER_GONE, IDLE, READER, WRITER, RankChannel, progress

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

__all__ = ["Topology", "begin", "live", "run_rank"]

Serve = Callable[[RankChannel, Topology], None]

READY = "rank_ready"
"""The event of a rank that is ready for requests, with the seconds that each part of its start took."""

LIBRARIES = ("torch", "torch.distributed", "transformers.modeling_utils", "transformers.models.auto")
"""Libraries that the engine imports; they are imported first, to time each of them."""


def begin() -> RankChannel:
    """Make this process a rank, as far as that needs no torch. The launcher sets the environment."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    socket_path = os.environ["ADAPTIVE_RANK_SOCKET"]
    told = f"rank {rank} of {world_size}, pid {os.getpid()}\n"
    _redirect_output(Path(socket_path).with_name(f"rank-{rank}.out"), told)
    if not die_with_parent(int(os.environ["ADAPTIVE_LAUNCHER_PID"])):
        os._exit(DRIVER_GONE)
    threading.excepthook = _thread_failed
    faulthandler.enable(all_threads=True)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is the driver's business
    hello = Hello(
        token=os.environ.pop("ADAPTIVE_RANK_TOKEN"),
        protocol=PROTOCOL_VERSION,
        version=__version__,
        rank=rank,
        world_size=world_size,
        pid=os.getpid(),
        device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if OPTIONS.device == "cuda" else OPTIONS.device,
        torch=_torch_version(),
    )
    try:
        return RankChannel.connect(socket_path, hello, lambda: _sweep(socket_path))
    except OSError as error:
        sys.stderr.write(f"rank {rank}: cannot reach the driver: {error}\n")
        _sweep(socket_path)
        os._exit(DRIVER_GONE)


def _redirect_output(pipe: Path, told: str) -> None:
    """Redirect this process's output, including that of native code, to the pipe's reader; write `told` first."""
    try:
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)  # fails without a reader
    except OSError:
        os._exit(DRIVER_GONE)
    os.set_blocking(descriptor, True)
    os.write(descriptor, told.encode())  # before closing the launcher's pipe: tells the reader of the start
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """End the process if its reader or writer thread failed: it would hang. Other threads are the recipe's."""
    traceback.print_exception(failed.exc_value)
    if failed.thread is not None and failed.thread.name in (READER, WRITER):
        _leave(1)


def _sweep(socket_path: str) -> None:
    """Remove the files of a driver that has died."""
    shutil.rmtree(Path(socket_path).parent, ignore_errors=True)


def _torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def run_rank(load: Callable[[], Serve], libraries: Sequence[str] = ()) -> None:
    """Run a rank until it ends; does not return.

    `load` imports the engine and returns the function that serves the channel. `libraries`: modules to import before.
    """
    watch = _Stopwatch()
    channel = begin()
    watch.lap("connect")
    live(channel, lambda: _serve(channel, load, libraries, watch))


def live(channel: RankChannel, work: Callable[[], None]) -> None:
    """Do `work` at the edge of the process: report every exception to the driver. Does not return."""
    try:
        work()
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        channel.fatal(error)
        _leave(1)
    channel.flush()
    _leave(0)


class _Stopwatch:
    """Seconds by name; `lap` assigns the time since the last lap to a name."""

    def __init__(self) -> None:
        # The processor time so far is the cost of starting the interpreter and importing our first modules.
        self.seconds = {"python": time.process_time()}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def _serve(channel: RankChannel, load: Callable[[], Serve], libraries: Sequence[str], watch: _Stopwatch) -> None:
    channel.phase = "importing"
    progress.report_to(channel.progressed)
    sys.meta_path.insert(0, cast("Any", SimpleNamespace(find_spec=progress.made)))  # reports imports, finds none
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
    _store = _init_distributed(topology, channel)
    watch.lap("rendezvous")
    channel.phase = IDLE
    seconds = {name: round(value, 4) for name, value in watch.seconds.items()}
    channel.event(READY, {"device": str(topology.device), "seconds": seconds})
    serve(channel, topology)


def _leave(status: int) -> None:
    """End the process without the interpreter's teardown, which can wait for other ranks' collectives."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _topology(rank: int) -> Topology:
    import torch

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != OPTIONS.num_processes:
        raise RuntimeError(f"{OPTIONS.num_processes} ranks were promised, the launcher started {world_size}")
    if OPTIONS.device == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    return Topology(rank=rank, world_size=world_size, device=device, deterministic=OPTIONS.deterministic)


def _init_distributed(topology: Topology, channel: RankChannel) -> Store:
    """Create the default group, for the device's tensors; other data use gloo groups (`engine.groups`).

    Returns the store that connects the ranks. torch does not keep it alive, so the caller must.
    """
    import torch.distributed as dist

    from harmony_core.engine.groups import ChannelStore, closing_doors

    # Documented names that torch.distributed re-exports without saying so to type checkers.
    patience = timedelta(seconds=INIT_TIMEOUT)
    store: Store = dist.HashStore() if topology.world_size == 1 else ChannelStore(channel, patience)  # type: ignore[attr-defined]
    cuda = topology.device.type == "cuda"
    with contextlib.nullcontext() if cuda else closing_doors():
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.PrefixStore("harmony", store),  # type: ignore[attr-defined]
            rank=topology.rank,
            world_size=topology.world_size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=topology.device if cuda else None,
        )
    return store


def _load_engine() -> Serve:
    from harmony_core.engine.worker import Worker

    return lambda channel, topology: Worker(channel, topology).serve()


if __name__ == "__main__":
    run_rank(_load_engine, LIBRARIES)
