"""The driver's end of a socket: who is listened to."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import warnings
from pathlib import Path

import pytest

from harmony_core.rpc import connection
from harmony_core.rpc.connection import Connection, Listener
from harmony_core.rpc.protocol import Hello, Message
from harmony_core.rpc.wire import encode

HELLO = Hello(token="t", protocol=1, version="v", rank=0, world_size=1, pid=1, device="cpu", torch="")
NOBODY = 65534


class Heard(Listener):
    """What reaches the driver of one peer."""

    def __init__(self) -> None:
        self.hellos: list[Message] = []
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def hello(self, connection: Connection, message: Hello) -> None:
        self.hellos.append(message)
        connection.close()

    def lost(self, connection: Connection, reason: str) -> None:
        self.ended.set_result(reason)


def greet(path: Path, user: int) -> int:
    """A process of `user` that says hello, as a rank does, and reads to the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads: the child only makes system calls
        child = os.fork()
    if child == 0:
        try:
            os.setuid(user)
            peer = socket.socket(socket.AF_UNIX)
            peer.connect(str(path))
            peer.sendall(encode("event", HELLO))
            peer.recv(1)
        finally:
            os._exit(0)
    return child


@pytest.mark.parametrize("foreign", [False, True])
def test_a_peer_of_another_user_is_not_listened_to(foreign: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root the peer really is another user's; for others the driver takes itself for another user."""
    ours = user = os.geteuid()
    if foreign and ours == 0:
        user = NOBODY
    elif foreign:
        monkeypatch.setattr(connection.os, "geteuid", lambda: ours + 1)

    async def work(path: Path) -> None:
        heard = Heard()
        server = await asyncio.get_running_loop().create_unix_server(lambda: Connection(heard), str(path))
        os.chmod(path, 0o777)
        child = greet(path, user)
        reason = await asyncio.wait_for(heard.ended, 10)
        server.close()
        os.waitpid(child, 0)
        assert (heard.hellos, reason) == (([], f"refused: the peer is user {user}") if foreign else ([HELLO], ""))

    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        asyncio.run(work(Path(directory, "s")))
