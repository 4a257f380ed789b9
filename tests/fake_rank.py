"""A rank without torch, on the real channel, process start and supervisor. It does what the name in a `Dealloc` says.

    ok                 answer
    sleep:SECONDS      answer late, in phase "forward"
    progress:SECONDS   answer late, in phase "forward", and make progress; progress:SECONDS:MORE hangs then
    collective:SECONDS answer late, with a stack as of a rank that waits for another
    exit:STATUS        leave without a word
    signal:NAME        send itself a signal (SIGKILL, SIGSTOP, SIGTERM, SIGABRT)
    raise              answer with a ValueError; `typed`: with a SampleTooLong; `gloo`: with an echo of a dead peer
    fatal              raise out of the rank; `gloo-fatal`: as the echo of a dead peer
    child              start a child in the same session, answer with nothing
    garble             send bytes that are no frame
    hog:SECONDS        keep the interpreter busy

`Score` answers with its targets. ADAPTIVE_FAKE, "RANK:WHAT" or "*:WHAT", spoils the start: late (until there is the
file ADAPTIVE_FAKE_GATE), raise, exit, mute, unready, or Hello with another version, protocol, world, rank, token, pid
or torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import msgspec

from harmony_core.engine import process
from harmony_core.errors import SampleTooLong
from harmony_core.rpc.protocol import Cancel, Dealloc, Hello, Nothing, Score, Scored, Shutdown
from harmony_core.rpc.rank_channel import IDLE, Incoming, RankChannel

PEER_DIED = "gloo: Connection closed by peer [127.0.0.1]:4321"
WRONG_HELLO: dict[str, dict[str, Any]] = {
    "version": {"version": "9.9.9"},
    "protocol": {"protocol": 99},
    "world": {"world_size": 7},
    "rank": {"rank": 0},
    "token": {"token": "guess"},
    "pid": {"pid": 1},
    "torch": {"torch": "1.0"},
}


def collective(seconds: float) -> None:
    time.sleep(seconds)


collective.__code__ = collective.__code__.replace(co_filename="/torch/distributed/distributed_c10d.py")


def act(channel: RankChannel, request: Incoming, name: str) -> None:
    what, _, argument = name.partition(":")
    if what in ("sleep", "hog"):
        channel.phase = "forward"
        end = time.monotonic() + float(argument)
        while what == "hog" and time.monotonic() < end:
            sum(range(10_000))
        time.sleep(max(0.0, end - time.monotonic()))
    elif what == "progress":
        channel.phase = "forward"
        some, _, more = argument.partition(":")
        end = time.monotonic() + float(some)
        while time.monotonic() < end:
            time.sleep(0.1)
            channel.progressed()
        time.sleep(float(more or 0))
    elif what == "collective":
        channel.phase = "forward"
        collective(float(argument))
    elif what == "exit":
        os._exit(int(argument))
    elif what == "signal":
        channel.phase = "forward"
        os.kill(os.getpid(), signal.Signals[argument])
    elif what == "raise":
        raise ValueError("boom")
    elif what == "typed":
        raise SampleTooLong("12 tokens, at most 8", hint="a larger max_batch_size", tokens=12, limit=8, odd={1, 2})
    elif what == "gloo":
        raise RuntimeError(PEER_DIED)
    elif what == "child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    elif what == "garble":
        channel._socket.sendall(b"\xff" * 64)
    channel.reply(request.id, Nothing())


def serve(channel: RankChannel, spoiled: str) -> None:
    channel.phase = IDLE
    if spoiled == "raise":
        raise ModuleNotFoundError("No module named 'no_such_thing'")
    if spoiled == "unready":
        channel.phase = "rendezvous"
    else:
        channel.event(process.READY, {})
    while True:
        request = channel.inbox.get()
        match request.message:
            case Shutdown():
                channel.reply(request.id, Nothing())
                return
            case Score(targets=targets):
                channel.reply(request.id, Scored(logprobs=targets))
            case Cancel(call=call):
                channel.event("cancelled", {"call": call, "id": request.id})
            case Dealloc(model="fatal"):
                raise ValueError("boom")
            case Dealloc(model="gloo-fatal"):
                raise RuntimeError(PEER_DIED)
            case Dealloc(model=name):
                try:
                    act(channel, request, name)
                except Exception as error:
                    channel.fail(request.id, error)
                channel.phase = IDLE


def main() -> None:
    rank, _, spoiled = os.environ.get("ADAPTIVE_FAKE", "").partition(":")
    if rank not in ("*", os.environ.get("RANK", "0")):
        spoiled = ""
    if spoiled == "exit":
        sys.exit(5)
    while spoiled == "late" and not os.path.exists(os.environ["ADAPTIVE_FAKE_GATE"]):
        time.sleep(0.01)
    if spoiled == "mute":
        time.sleep(600)
    if spoiled in WRONG_HELLO:
        connect = RankChannel.connect

        def lie(path: str, hello: Hello, *more: Any) -> RankChannel:
            return connect(path, msgspec.structs.replace(hello, **WRONG_HELLO[spoiled]), *more)

        RankChannel.connect = lie  # type: ignore[method-assign, assignment]
    channel = process.begin()
    process.live(channel, lambda: serve(channel, spoiled))


if __name__ == "__main__":
    main()
