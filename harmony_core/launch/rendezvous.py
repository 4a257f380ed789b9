"""`python -m harmony_core.launch.rendezvous ARGUMENTS...`: `accelerate launch` without a store that listens.

torchrun opens a store for its agents, on all interfaces and for anyone. There is one agent, on one machine: it gets a
store in its own memory. Ranks find each other over the driver (`harmony_core/rpc/connection.py`).
"""

from __future__ import annotations

import os
import runpy

from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousParameters, RendezvousStoreInfo, registry
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous


class InProcess(StaticTCPRendezvous):
    """One agent that meets itself."""

    def __init__(self, params: RendezvousParameters) -> None:
        super().__init__("127.0.0.1", 0, rank=0, world_size=1, run_id=params.run_id, timeout=0)

    def next_rendezvous(self) -> RendezvousInfo:
        """At once, and with a store in memory."""
        return RendezvousInfo(HashStore(), self.rank, self.world_size, RendezvousStoreInfo("127.0.0.1", 0))


def main() -> None:
    """Become `accelerate launch`."""
    # Whatever kind is asked for: when a port happens to be taken, accelerate changes to one that listens and unpickles.
    registry.get_rendezvous_handler = InProcess
    os.environ["PET_RDZV_ENDPOINT"] = "none"  # without one torchrun warns that there is no address
    runpy.run_module("accelerate.commands.launch", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
