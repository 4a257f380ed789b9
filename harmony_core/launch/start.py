"""Run as a program of its own: `python -m harmony_core.launch.start PARENT RANKS ARGUMENTS...` becomes the launcher.

The kernel ends it when PARENT ends. Because the child requests this itself, the parent, which may have threads, runs
no code between fork and exec. With RANKS 0 the arguments are a command to execute, otherwise arguments of
`accelerate launch`.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys

from harmony_core.rpc.platform import die_with_parent


def main() -> None:
    """Request the signal, check that the parent still exists, and become the launcher."""
    parent, ranks, *arguments = sys.argv[1:]
    if not die_with_parent(int(parent), signal.SIGTERM):
        sys.exit(0)
    os.environ["ADAPTIVE_LAUNCHER_PID"] = str(os.getpid())
    if ranks == "0":
        os.execvp(arguments[0], arguments)
    if ranks != "1":
        _meet_in_memory()
    sys.argv[1:] = arguments
    runpy.run_module("accelerate.commands.launch", run_name="__main__", alter_sys=True)


def _meet_in_memory() -> None:
    """Give torchrun's agent a store in memory.

    By default torchrun opens a store for its agents on all interfaces, without access control. Here one agent runs on
    one machine, and ranks find each other through the driver (`harmony_core/rpc/connection.py`).
    """
    from torch.distributed import HashStore  # type: ignore[attr-defined]
    from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousParameters, RendezvousStoreInfo, registry
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    class InProcess(StaticTCPRendezvous):
        """The rendezvous of a single agent with itself."""

        def __init__(self, params: RendezvousParameters) -> None:
            super().__init__("127.0.0.1", 0, rank=0, world_size=1, run_id=params.run_id, timeout=0)

        def next_rendezvous(self) -> RendezvousInfo:
            """Returns at once."""
            return RendezvousInfo(HashStore(), self.rank, self.world_size, RendezvousStoreInfo("127.0.0.1", 0))

    # For every kind of rendezvous: when a port is taken, accelerate switches to one that listens and unpickles.
    registry.get_rendezvous_handler = InProcess
    os.environ["PET_RDZV_ENDPOINT"] = "none"  # without one torchrun warns that there is no address


if __name__ == "__main__":
    main()
