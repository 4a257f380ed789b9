"""What a run listens on, and that a stranger on the same machine gets nothing in, out or slower through it."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from engines import LiveEngine, pairs, start_engine, stop_engine
from harmony_core.client import TrainingModel
from harmony_core.errors import EngineError
from harmony_core.launch.launcher import Launch, launch_command, launch_environment
from harmony_core.options import EngineOptions
from harmony_core.rpc import platform
from leftovers import running, wait_until
from sockets import NOBODY, Address, flood, forked, listening

pytestmark = pytest.mark.skipif(not platform.LINUX, reason="the kernel's tables are read")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


async def step(model: TrainingModel) -> None:
    for thread in pairs(8):
        await model.train_language_modelling(thread)
    await model.optim_step(1e-3, 0.0, 1.0)


def processes(engine: LiveEngine) -> tuple[int, list[int]]:
    """The launcher and the ranks."""
    started = engine.client._engine
    assert started._launching is not None
    return started._launching.result()._processes.launcher_pid, [rank.pid for rank in started._ranks]


def held(pid: int) -> tuple[int, int]:
    """How many descriptors a process has, and how many bytes of memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return len(list(Path(f"/proc/{pid}/fd").iterdir())), pages * os.sysconf("SC_PAGE_SIZE")


def on_loopback(addresses: list[Address]) -> bool:
    return all(ipaddress.ip_address(host).is_loopback for host, _ in addresses)


def test_a_run_of_two_ranks_listens_on_loopback_and_a_flood_changes_nothing(two_ranks: LiveEngine) -> None:
    async def work() -> None:
        model = await two_ranks.client.model("builtin:tiny-lm", kv_cache_len=1024).spawn_train("besieged", 256)
        for _ in range(3):
            await step(model)
        launcher, ranks = processes(two_ranks)
        ports = listening([launcher, os.getpid(), *ranks])
        assert ports[launcher] == [] and on_loopback(ports[os.getpid()])  # the driver is where the tests run
        assert all(len(ports[pid]) >= 3 and on_loopback(ports[pid]) for pid in ranks), ports

        before = {pid: held(pid) for pid in ranks}
        child, pipe = flood([address for pid in ranks for address in ports[pid]], rounds=3)
        steps = 0
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            await step(model)
            steps += 1
        told = json.loads(os.read(pipe, 1 << 16))
        os.close(pipe)
        assert told == {"opened": 0, "read": 0} and steps > 0
        for pid in ranks:
            descriptors, memory = held(pid)
            assert descriptors <= before[pid][0] + 2 and memory < before[pid][1] + (64 << 20)
        assert listening(ranks) == {pid: ports[pid] for pid in ranks}
        await step(model)
        await model.dealloc()

    two_ranks.run(work())


@pytest.mark.slow
def test_each_rank_has_one_port_for_each_of_its_groups(tmp_path: Path) -> None:
    """With two ranks: all of them, their control, and the replicas of tp 1; with tp 2 a block and the ranks of it."""
    engine = start_engine(tmp_path, 2)
    try:
        for tp, count in ((1, 3), (2, 5)):
            model = engine.client.model("builtin:tiny-lm", kv_cache_len=1024).tp(tp)
            engine.run(model.spawn_train(f"tp-{tp}", 256))
            _, ranks = processes(engine)
            assert [len(found) for found in listening(ranks).values()] == [count, count]
    finally:
        stop_engine(engine)


@pytest.mark.slow
def test_a_port_that_is_taken_makes_the_launcher_open_no_other(tmp_path: Path) -> None:
    """accelerate then asks torchrun for another kind of rendezvous, whose store listens and unpickles."""
    script = "import os, time; open(os.environ['HERE'] + '/' + os.environ['RANK'], 'w').close(); time.sleep(600)"
    options = EngineOptions(log_dir=tmp_path, run_id=f"taken-{os.getpid()}", command=[sys.executable, "-c", script])
    launch = Launch("cpu", 2)
    command = launch_command(options, launch, tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command[command.index("--main_process_port") + 1] = str(taken.getsockname()[1])
        environment = launch_environment(options, launch, os.environ) | {"HERE": str(tmp_path)}
        launcher = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            assert wait_until(lambda: (tmp_path / "1").exists() and (tmp_path / "0").exists(), 60)
            processes = running("ADAPTIVE_RUN_ID", options.run_id)
            assert len(processes) == 3 and not any(listening(processes).values())
        finally:
            launcher.terminate()
            _, said = launcher.communicate(timeout=60)
        assert "already in use" in said


def listener(host: str) -> socket.socket:
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


@as_root
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["4", "4 as 6"])
def test_who_came_in_while_a_group_was_made_is_noticed(family: int) -> None:
    from harmony_core.engine.groups import closing_doors

    def connect(user: int) -> tuple[int, int]:
        child, pipe = forked(user)
        if child:
            assert os.read(pipe, 1) == b"x"
            return child, pipe
        try:
            sock = socket.socket(family)
            host, port = door.getsockname()
            sock.connect((f"::ffff:{host}" if family == socket.AF_INET6 else host, port))
            os.write(pipe, b"x")
            sock.recv(1)
        finally:
            os._exit(0)

    for user, foreign in ((0, []), (NOBODY, [NOBODY])):
        error: EngineError | None = None
        try:
            with closing_doors():
                door = listener("127.0.0.1")
                child, pipe = connect(user)
                guest, _ = door.accept()
        except EngineError as raised:
            error = raised
        assert platform.foreign_peers() == foreign
        assert (f"user {NOBODY} has connected" in str(error)) if foreign else error is None
        guest.close()
        door.close()
        os.waitpid(child, 0)
        os.close(pipe)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_closed_door_keeps_who_is_in_and_lets_nobody_else_in(host: str) -> None:
    with listener(host) as open_before:
        assert open_before.fileno() in platform.listening_sockets()
        with listener(host) as door, socket.create_connection(door.getsockname()[:2]) as guest:
            inside, _ = door.accept()
            with inside:
                platform.drop_connections(door.fileno())
                with pytest.raises(TimeoutError):
                    socket.create_connection(door.getsockname()[:2], timeout=0.3)
                guest.sendall(b"still here")
                assert inside.recv(10) == b"still here"
        socket.create_connection(open_before.getsockname()[:2], timeout=5).close()
