"""A real rank, torch and process group included, that serves only small answers. Run as `EngineOptions.command`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from harmony_core.engine.process import run_rank
from harmony_core.rpc.protocol import AbandonStep, Dealloc, Nothing, OptimStep, Shutdown, StepMetrics
from harmony_core.rpc.rank_channel import IDLE

if TYPE_CHECKING:
    from harmony_core.engine.process import Serve, Topology
    from harmony_core.rpc.rank_channel import RankChannel


def load() -> Serve:
    import torch
    import torch.distributed as dist

    def serve(channel: RankChannel, topology: Topology) -> None:
        while True:
            channel.phase = IDLE
            request = channel.inbox.get()
            channel.phase = type(request.message).__name__
            match request.message:
                case Shutdown():
                    channel.reply(request.id, Nothing())
                    return
                case OptimStep():
                    total = torch.tensor([float(topology.rank + 1)])
                    dist.all_reduce(total)
                    values = {"total": total.item(), "world": float(dist.get_world_size())}
                    channel.reply(request.id, StepMetrics(values=values))
                case AbandonStep(model="sleep"):
                    time.sleep(3600)
                case Dealloc(model=name):
                    if name == "raise":
                        raise ValueError("boom")
                    channel.reply(request.id, Nothing())

    return serve


if __name__ == "__main__":
    run_rank(load)
