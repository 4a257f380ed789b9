"""A rank's end of the socket, against a plain socket that plays the driver."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harmony_core.rpc.protocol import Beat, Cancel, Dealloc, Event, Hello, Message, Nothing, Score, Scored
from harmony_core.rpc.rank_channel import IDLE, RankChannel
from harmony_core.rpc.wire import Frame, FrameDecoder, encode

HELLO = Hello(token="t", protocol=1, version="v", rank=3, world_size=4, pid=1, device="cpu", torch="")


class Channel(RankChannel):
    """The end of the connection ends a rank's process; here only the thread that reads."""

    def _leave(self, reason: str) -> None:  # type: ignore[override]
        pass


class Driver:
    """The other end: sends frames, reads frames."""

    def __init__(self, directory: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.path = str(directory / "s")
        self.listener.bind(self.path)
        self.listener.listen()
        self.decoder = FrameDecoder()
        self.frames: list[Frame] = []

    def accept(self) -> None:
        self.socket, _ = self.listener.accept()
        self.socket.settimeout(10)

    def read(self, kind: str) -> list[Frame]:
        """Everything read until a frame of this kind has come."""
        while not any(frame.header.kind == kind for frame in self.frames):
            self.frames += self.decoder.feed(self.socket.recv(1 << 16))
        frames, self.frames = self.frames, []
        return frames

    def call(self, message: Message, id: int) -> None:
        self.socket.sendall(encode("call", message, id=id, seq=id))


@pytest.fixture
def ends(no_leftovers: Path) -> Iterator[tuple[Driver, RankChannel]]:
    # As the real driver does: a directory for the socket and the note, removed as soon as the rank is connected.
    with tempfile.TemporaryDirectory(dir=no_leftovers) as directory:
        driver = Driver(Path(directory))
        channel = Channel.connect(driver.path, HELLO)
        driver.accept()
    driver.listener.close()
    yield driver, channel
    driver.socket.close()
    for thread in threading.enumerate():
        if thread.name == "rank-reader":
            thread.join(5)
            assert not thread.is_alive()
    channel._socket.close()
    channel._note.close()


def test_hello_first_then_a_beat_with_the_phase(ends: tuple[Driver, RankChannel]):
    driver, channel = ends
    frames = driver.read("event")
    assert frames[0].body == HELLO
    channel.phase, channel.step = IDLE, 12
    deadline = time.monotonic() + 5
    beats: list[Beat] = []
    while not (beats and beats[-1].phase == IDLE) and time.monotonic() < deadline:
        beats += [frame.body for frame in driver.read("event") if isinstance(frame.body, Beat)]
    assert beats[-1].phase == IDLE and beats[-1].step == 12


def test_calls_casts_answers_and_events(ends: tuple[Driver, RankChannel]):
    driver, channel = ends
    driver.call(Dealloc(model="m"), 5)
    driver.socket.sendall(encode("cast", Cancel(call=5)))
    first, second = channel.inbox.get(timeout=5), channel.inbox.get(timeout=5)
    assert (first.id, first.message, first.seq) == (5, Dealloc(model="m"), 5)
    assert (second.id, second.message, second.seq) == (0, Cancel(call=5), None)
    channel.event("freed", {"bytes": 3})
    channel.reply(5, Nothing())
    *_, event, answer = [frame for frame in driver.read("ok") if not isinstance(frame.body, Beat | Hello)]
    assert event.body == Event(type="freed", data={"bytes": 3})
    assert (answer.header.id, answer.header.method, answer.body) == (5, "Dealloc", Nothing())


def test_an_answer_of_the_wrong_type_is_our_bug(ends: tuple[Driver, RankChannel]):
    driver, channel = ends
    driver.call(Dealloc(model="m"), 5)
    channel.inbox.get(timeout=5)
    with pytest.raises(AssertionError, match="Scored for Dealloc"):
        channel.reply(5, Scored(logprobs=b""))


@pytest.mark.timeout(60, method="signal")  # what would wait for the driver, waits for ever
def test_a_driver_that_does_not_read_does_not_hold_the_engine_up(ends: tuple[Driver, RankChannel]):
    """Answers of 64 MiB wait in the rank; all arrive whole, though other threads send in between."""
    driver, channel = ends
    for id in range(1, 65):
        driver.call(Score(model="m", replica=0, tokens=b"", targets=b""), id)
        channel.inbox.get(timeout=5)
    talker = threading.Thread(target=lambda: [channel.event("e", {"i": i}) for i in range(200)])
    talker.start()
    for id in range(1, 65):
        channel.reply(id, Scored(logprobs=bytes([id]) * (1 << 20)))
    talker.join()  # nobody has read so far
    answers: list[Frame] = []
    events: list[int] = []
    while len(answers) < 64 or len(events) < 200:
        for frame in driver.decoder.feed(driver.socket.recv(1 << 20)):
            if frame.header.kind == "ok":
                answers.append(frame)
            elif isinstance(frame.body, Event):
                events.append(frame.body.data["i"])
    assert [frame.header.id for frame in answers] == list(range(1, 65))
    assert all(frame.body == Scored(logprobs=bytes([frame.header.id]) * (1 << 20)) for frame in answers)
    assert events == list(range(200))
    channel.flush()
