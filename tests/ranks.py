"""A pool of bare gloo ranks for numeric tests: four processes, started once, that run functions and return JSON.

    def case(group, factor):                      # tests/engine/models/some_cases.py
        return {"rank": group.rank, "value": factor * group.rank}

    results = rank_pool.run("engine.models.some_cases:case", ranks=2, factor=3)      # one result for each rank

The processes are forked from one that has imported torch and transformers, so the imports are paid once.
"""

from __future__ import annotations

import importlib
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from harmony_core.engine.models.parallel import TensorParallel

SIZE = 4


class RankPool:
    """`size` processes on this machine; a failure in one of them ends all, and the next `run` starts new ones."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self._process: subprocess.Popen[bytes] | None = None
        self._sockets: list[socket.socket] = []
        self._store: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        """Start the processes without waiting for them; `run` does so when it must."""
        self._store = tempfile.TemporaryDirectory(prefix="ranks-")
        pairs = [socket.socketpair() for _ in range(self.size)]
        self._sockets = [ours for ours, _ in pairs]
        fds = [theirs.fileno() for _, theirs in pairs]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._store.name, ",".join(map(str, fds))],
            pass_fds=fds,
            env=environment,
            cwd=Path(__file__).parent,
        )
        for _, theirs in pairs:
            theirs.close()

    def run(self, function: str, ranks: int, timeout: float = 120.0, **arguments: Any) -> list[Any]:
        """Call `"module:function"` (module below tests/) with a `Group` and `arguments` on the first `ranks` ranks."""
        if self._process is None:
            self.start()
        request = json.dumps({"function": function, "ranks": ranks, "arguments": arguments}).encode() + b"\n"
        for rank in range(ranks):
            self._sockets[rank].sendall(request)
        answers = self._answers(ranks, timeout)
        failures = [f"rank {rank}: {answer['error']}" for rank, answer in answers.items() if "error" in answer]
        if failures or len(answers) < ranks:
            self.stop()
            raise AssertionError("\n".join(failures) or f"{ranks - len(answers)} ranks did not answer in {timeout} s")
        return [answers[rank]["result"] for rank in range(ranks)]

    def stop(self) -> None:
        """End the processes, whatever they are doing."""
        for end in self._sockets:
            end.close()
        if self._process is not None:
            # The children watch the same pipe of life as their parent: the process group goes at once.
            self._process.terminate()
            self._process.wait(10)
        if self._store is not None:
            self._store.cleanup()
        self._process, self._sockets, self._store = None, [], None

    def _answers(self, ranks: int, timeout: float) -> dict[int, dict[str, Any]]:
        """Each rank's answer, up to the first failure: after it the others may wait for that rank for ever."""
        deadline = time.monotonic() + timeout
        buffers = dict.fromkeys(range(ranks), b"")
        answers: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for rank in range(ranks):
                selector.register(self._sockets[rank], selectors.EVENT_READ, rank)
            while len(answers) < ranks and time.monotonic() < deadline:
                for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                    piece = self._sockets[key.data].recv(1 << 20)
                    buffers[key.data] += piece
                    if not piece:
                        return answers | {key.data: {"error": "the process died"}}
                    if piece.endswith(b"\n"):
                        answers[key.data] = json.loads(buffers[key.data])
                    if "error" in answers.get(key.data, ()):
                        return answers
        return answers


@dataclass(frozen=True)
class Group:
    """What a function gets first: its rank among `size`, and the gloo groups over them."""

    rank: int
    size: int
    groups: dict[tuple[int, ...], ProcessGroup]

    @property
    def group(self) -> ProcessGroup:
        """All `size` ranks."""
        return self.groups[tuple(range(self.size))]

    def grid(self, tp: int) -> tuple[TensorParallel, ProcessGroup, int]:
        """Contiguous tensor-parallel groups of `tp`: ours, our data-parallel group, and our place in that."""
        from harmony_core.engine.models.parallel import TensorParallel

        replica, place = divmod(self.rank, tp)
        tp_group = self.groups[tuple(range(replica * tp, (replica + 1) * tp))]
        dp_group = self.groups[tuple(range(place, self.size, tp))]
        return TensorParallel(tp, place, tp_group), dp_group, replica


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Four bare gloo ranks, started when first asked for."""
    pool = RankPool()
    pool.start()
    yield pool
    pool.stop()


def _subsets(size: int) -> list[tuple[int, ...]]:
    """Every group that `Group` may hand out: the first n ranks, and the rows and columns of every grid over them."""
    found = set()
    for count in range(1, size + 1):
        for tp in (t for t in range(1, count + 1) if count % t == 0):
            found |= {tuple(range(start, start + tp)) for start in range(0, count, tp)}
            found |= {tuple(range(place, count, tp)) for place in range(tp)}
    return sorted(found)


def _serve(rank: int, size: int, store: str, end: socket.socket) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{store}/store", size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=120),
    )
    # All at once and in one order on every rank: making a group is itself a collective.
    groups = {ranks: dist.new_group(list(ranks)) for ranks in _subsets(size)}
    for line in end.makefile("rb"):
        request = json.loads(line)
        try:
            group = Group(rank, request["ranks"], groups)
            module, _, name = request["function"].partition(":")
            result = getattr(importlib.import_module(module), name)(group, **request["arguments"])
            answer = {"result": result}
        except Exception:
            answer = {"error": traceback.format_exc()}
        end.sendall(json.dumps(answer).encode() + b"\n")
    os._exit(0)


def _main(store: str, fds: list[int]) -> None:
    import signal

    import torch
    import transformers.models.gemma3.modeling_gemma3
    import transformers.models.llama.modeling_llama
    import transformers.models.mistral.modeling_mistral
    import transformers.models.qwen2.modeling_qwen2
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401 - imported once, for all ranks

    torch.set_num_threads(1)
    # The forked ranks must find this module under the name that tests import it by.
    sys.path.insert(0, str(Path(__file__).parent))
    children = []
    for rank, fd in enumerate(fds):
        pid = os.fork()
        if pid == 0:
            for other in fds:
                if other != fd:
                    os.close(other)
            _serve(rank, len(fds), store, socket.socket(fileno=fd))
        children.append(pid)
    for fd in fds:
        os.close(fd)

    def end_children(*_: Any) -> None:
        for pid in children:
            os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end_children)
    for pid in children:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    _main(sys.argv[1], [int(fd) for fd in sys.argv[2].split(",")])
