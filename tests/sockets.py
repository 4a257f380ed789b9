"""What processes listen on, from the kernel's tables; and a process of another user that tries to get in."""

from __future__ import annotations

import ipaddress
import json
import os
import selectors
import socket
import struct
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

NOBODY = 65534
Address = tuple[str, int]


def _address(text: str) -> Address:
    words, _, port = text.partition(":")
    packed = b"".join(struct.pack("=I", int(words[at : at + 8], 16)) for at in range(0, len(words), 8))
    return str(ipaddress.ip_address(packed)), int(port, 16)


def listening(pids: Iterable[int]) -> dict[int, list[Address]]:
    """The TCP addresses that each process listens on."""
    found: dict[int, list[Address]] = {}
    for pid in pids:
        held = set()
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                held.add(os.readlink(entry))
            except FileNotFoundError:
                continue
        rows = [
            line.split()
            for name in ("tcp", "tcp6")
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()
        ]
        found[pid] = [_address(row[1]) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in held]
    return found


def forked(user: int) -> tuple[int, int]:
    """Fork. In the child, which is then `user`: 0, and a pipe to write to. Else its pid, and where to read."""
    ours, theirs = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads: the child only makes system calls
        child = os.fork()
    if child:
        os.close(theirs)
        return child, ours
    if user != os.geteuid():
        os.setuid(user)
    return 0, theirs


def flood(addresses: list[Address], rounds: int, at_once: int = 100) -> tuple[int, int]:
    """Start a stranger that connects to each address over and over and writes noise; its pid, and where it reports.

    The report is JSON: how many connections it opened, and how many bytes it read. Another user's where we are root.
    """
    child, pipe = forked(NOBODY if os.geteuid() == 0 else os.geteuid())
    if child:
        return child, pipe
    try:
        opened = read = 0
        for _ in range(rounds):
            for address in addresses:
                more = _knock(address, at_once)
                opened, read = opened + more[0], read + more[1]
        os.write(pipe, json.dumps({"opened": opened, "read": read}).encode())
    finally:
        os._exit(0)


def _knock(address: Address, count: int) -> tuple[int, int]:
    """Connect `count` times, write to whatever opens within a moment, read what there is: connections, bytes."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    opened = read = 0
    with selectors.DefaultSelector() as selector:
        for number in range(count):
            sock = socket.socket(family)
            sock.setblocking(False)
            sock.connect_ex(address)
            selector.register(sock, selectors.EVENT_WRITE, number)
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline:
            for key, _ in selector.select(0.05):
                sock = key.fileobj  # type: ignore[assignment]
                if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    opened += 1
                    try:
                        sock.send(struct.pack("=Q", key.data) + os.urandom(1 << 12))
                        time.sleep(0.001)
                        read += len(sock.recv(1 << 12))
                    except OSError:
                        pass
                selector.unregister(sock)
        for key in list(selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
    return opened, read
