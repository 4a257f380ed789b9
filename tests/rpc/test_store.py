"""The store over which ranks find each other: what it answers, what it refuses, and who may ask."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harmony_core.errors import EngineError
from harmony_core.rpc import connection as driver_end
from harmony_core.rpc.connection import Answer, Connection, Listener, RankStore
from harmony_core.rpc.protocol import Dealloc, Hello, Message
from harmony_core.rpc.rank_channel import RankChannel
from harmony_core.rpc.wire import FrameDecoder, StoreAdd, StoreGet, StoreSet, WireError, encode

if TYPE_CHECKING:
    from harmony_core.engine.groups import ChannelStore

HELLO = Hello(token="t", protocol=1, version="v", rank=0, world_size=2, pid=1, device="cpu", torch="")
MIB = 1 << 20


def asked(ranks: RankStore, request: Message) -> list[list[bytes] | None]:
    """Where the answer will be."""
    answers: list[list[bytes] | None] = []
    ranks.ask(request, lambda answer: answers.append(answer.values))
    return answers


def test_values_are_there_for_everybody_and_numbers_add_up() -> None:
    ranks = RankStore()
    assert asked(ranks, StoreSet(key="a", value=b"1")) == [[]]
    assert asked(ranks, StoreSet(key="a", value=b"")) == [[]]
    assert asked(ranks, StoreGet(keys=["a"], wait=True)) == [[b""]]
    assert [asked(ranks, StoreAdd(key="n", amount=amount)) for amount in (2, -5, 1)] == [[[b"2"]], [[b"-3"]], [[b"-2"]]]
    assert asked(ranks, StoreGet(keys=["n", "a"], wait=False)) == [[b"-2", b""]]
    assert asked(ranks, StoreGet(keys=["n", "b"], wait=False)) == [None]


def test_who_waits_is_answered_when_the_last_key_comes() -> None:
    ranks = RankStore()
    both, one = asked(ranks, StoreGet(keys=["a", "b"], wait=True)), asked(ranks, StoreGet(keys=["b"], wait=True))
    asked(ranks, StoreSet(key="a", value=b"x"))
    assert (both, one) == ([], [])
    asked(ranks, StoreAdd(key="b", amount=7))
    asked(ranks, StoreAdd(key="b", amount=1))
    assert (both, one) == ([[b"x", b"7"]], [[b"7"]])


def test_it_holds_so_much_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, keys and those who wait count; what is replaced or answered no longer does."""
    monkeypatch.setattr(driver_end, "MAX_STORE_BYTES", 10_000)
    ranks = RankStore()
    for _ in range(20):
        asked(ranks, StoreSet(key="same", value=bytes(5000)))
    waiting = [asked(ranks, StoreGet(keys=["late"], wait=True)) for _ in range(15)]
    asked(ranks, StoreSet(key="late", value=b""))
    assert waiting == [[[b""]]] * 15
    asked(ranks, StoreSet(key="other", value=bytes(4000)))
    with pytest.raises(EngineError, match=r"the store of the ranks is full: \d+ of 10000 bytes"):
        asked(ranks, StoreSet(key="one more", value=bytes(4000)))
    for fill in (
        lambda index: StoreSet(key=f"{index}", value=b""),
        lambda index: StoreGet(keys=[f"wait {index}"], wait=True),
    ):
        ranks = RankStore()
        with pytest.raises(EngineError, match="full"):
            for index in range(100):
                asked(ranks, fill(index))
    assert asked(ranks, StoreGet(keys=["there is always an answer"], wait=False)) == [None]


@pytest.mark.parametrize("value", [b"1e9", b"--1", b"7" * 10_000, b"\xff"], ids=["1e9", "--1", "long", "byte"])
def test_a_value_that_is_no_number_is_not_added_to(value: bytes) -> None:
    ranks = RankStore()
    asked(ranks, StoreSet(key="a", value=value))
    with pytest.raises(EngineError, match="'a' in the store of the ranks is not a number"):
        asked(ranks, StoreAdd(key="a", amount=1))


@pytest.mark.parametrize(
    "request_",
    [
        StoreSet(key="k", value=bytes(MIB + 1)),
        StoreSet(key="k" * 1025, value=b""),
        StoreAdd(key="k" * 1025, amount=1),
        StoreGet(keys=["k" * 1025], wait=True),
        StoreGet(keys=["k"] * 4097, wait=True),
    ],
    ids=lambda request: f"{type(request).__name__}-{len(encode('call', request))}",
)
def test_what_is_too_large_is_no_frame_of_ours(request_: Message) -> None:
    with pytest.raises(WireError, match="length"):
        list(FrameDecoder().feed(encode("call", request_, id=1)))


class Driver(Listener):
    """A driver that takes one rank, over a socket pair, on a thread of its own; and may be slow to answer."""

    def __init__(self, end: socket.socket, ranks: RankStore, accepting: bool = True) -> None:
        self.ranks, self.accepting, self.mute = ranks, accepting, False
        self._loop = asyncio.new_event_loop()
        self._ended: asyncio.Future[str] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(end,))
        self._thread.start()

    def _run(self, end: socket.socket) -> None:
        self._loop.run_until_complete(self._loop.connect_accepted_socket(lambda: Connection(self), end))
        self._loop.run_until_complete(self._ended)
        self._loop.close()

    def hello(self, connection: Connection, message: Hello) -> None:
        if self.accepting:
            connection.accept()

    def asked(self, connection: Connection, message: Message, answer: Answer) -> None:
        if not self.mute:
            self.ranks.ask(message, answer)

    def lost(self, connection: Connection, reason: str) -> None:
        self._ended.set_result(reason)

    def ended(self) -> str:
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self._ended.result()


class Channel(RankChannel):
    """The end of the connection ends a rank's process; here only the thread that reads."""

    def _leave(self, reason: str) -> None:  # type: ignore[override]
        pass


Connect = Callable[..., tuple["ChannelStore", Driver]]


@pytest.fixture
def connect(no_leftovers: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Ranks of one run, each with the driver at the other end."""
    from harmony_core.engine.groups import ChannelStore

    opened: list[tuple[RankChannel, Driver]] = []

    def one(ranks: RankStore, seconds: float = 10.0) -> tuple[ChannelStore, Driver]:
        path = str(no_leftovers / f"store-{len(opened)}")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            channel = Channel.connect(path, HELLO)
            end, _ = listener.accept()
        for left in no_leftovers.iterdir():
            left.unlink()
        driver = Driver(end, ranks)
        opened.append((channel, driver))
        return ChannelStore(channel, timedelta(seconds=seconds)), driver

    yield one
    for channel, driver in opened:
        channel._socket.shutdown(socket.SHUT_RDWR)
        driver.ended()
        channel._socket.close()


def test_torch_speaks_to_it_over_the_channel(connect: Connect) -> None:
    """By way of torch's own store, as process groups do."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    ranks = RankStore()
    stores = [connect(ranks)[0] for _ in range(2)]
    one, two = (PrefixStore("p", kept) for kept in stores)
    got: list[bytes] = []
    waiting = threading.Thread(target=lambda: got.append(two.get("late")))
    waiting.start()
    one.set("early", "text")
    two.wait(["early"], timedelta(seconds=10))
    assert two.get("early") == b"text" and two.check(["early"]) and not two.check(["early", "late"])
    assert (one.add("n", 2), two.add("n", 3)) == (2, 5)
    one.set("late", b"\x00\xff")  # type: ignore[arg-type]  # bytes will do
    waiting.join(10)
    assert got == [b"\x00\xff"] and list(ranks._values) == ["p/early", "p/n", "p/late"]


def test_a_key_that_does_not_come_ends_the_wait_and_an_error_reaches_the_rank(connect: Connect) -> None:
    from torch.distributed import DistStoreError

    kept, driver = connect(RankStore(), seconds=0.2)
    with pytest.raises(DistStoreError, match=r"not answered in 0\.2 s: StoreGet.*'rank 1'"):
        kept.get("rank 1")
    with pytest.raises(DistStoreError, match=r"0\.1 s"):
        kept.wait(["rank 1"], timedelta(seconds=0.1))
    kept.set("rank 1", b"here, but too late")
    assert kept.get("rank 1") == b"here, but too late"
    with pytest.raises(EngineError, match="'rank 1' in the store of the ranks is not a number"):
        kept.add("rank 1", 1)
    with pytest.raises(ValueError, match="1048577 bytes for 'large'"):
        kept.set("large", bytes(MIB + 1))
    driver.mute = True
    with pytest.raises(DistStoreError, match="StoreSet"):
        kept.set("k", b"")


@pytest.mark.parametrize(
    ("accepting", "frame", "reason"),
    [
        (False, encode("call", StoreSet(key="k", value=b""), id=1), "'StoreSet' before Hello"),
        (True, encode("event", HELLO) + encode("call", Dealloc(model="m"), id=1), "a rank sent a call"),
        (True, encode("event", HELLO) + encode("cast", Dealloc(model="m"), id=1), "a rank sent a cast"),
        (True, encode("event", HELLO) + encode("call", StoreSet(key="k", value=bytes(MIB + 1)), id=1), "length"),
    ],
    ids=["unknown", "call", "cast", "oversized"],
)
def test_only_a_known_rank_is_answered_and_only_what_the_table_has(accepting: bool, frame: bytes, reason: str) -> None:
    ranks = RankStore()
    ours, theirs = socket.socketpair()
    driver = Driver(theirs, ranks, accepting)
    with ours:
        ours.sendall(frame)
        assert reason in driver.ended()
        assert ours.recv(1) == b""
    assert ranks._values == {}
