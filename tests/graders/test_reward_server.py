"""The client of reward servers against the server of `adaptive graders serve`, and against ones that misbehave."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import pytest

from harmony_core.errors import GradeFailed, IgnoreGradeException, ResourceError, UsageError
from harmony_core.graders import BaseGrader, RewardClient, RewardServerGrader, score_or_refuse
from harmony_core.graders.reward_types import Request, Turn
from harmony_core.graders.server import RewardServer
from harmony_core.text.threads import StringThread


def thread(answer: str) -> StringThread:
    return StringThread([("user", "q"), ("assistant", answer)], {"bonus": 1})


async def grade(sample: StringThread) -> float:
    answer = sample.last_content()
    if answer == "raise":
        raise KeyError("x")
    if answer == "ignore":
        raise IgnoreGradeException("not this one")
    return len(answer) + float(sample.metadata["bonus"])


def served(work: Callable[[RewardServer], Coroutine[Any, Any, Any]]) -> Any:
    """The result of work beside a running server."""

    async def both() -> Any:
        schema = {"type": "object", "required": ["bonus"], "properties": {"bonus": {"type": "integer"}}}
        server = RewardServer(BaseGrader.from_function("length", grade), schema=schema)
        serving = asyncio.ensure_future(server.serve())
        try:
            return await work(server)
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    return asyncio.run(both())


def test_grades_come_over_http_in_batches_and_failures_keep_their_kind() -> None:
    async def work(server: RewardServer) -> None:
        grader = RewardServerGrader("remote", "id-1", server.url, token=server.token)
        await grader.client.setup()
        assert (await asyncio.to_thread(grader.client.blocking_info)).name == "length"
        found = await asyncio.gather(*(grader.grade(thread("x" * n)) for n in range(100)))
        assert [g.value for g in found] == [n + 1.0 for n in range(100)] and found[0].grader_key == "id-1"
        answers = ("raise", "ignore", "ok")
        results = await asyncio.gather(*(grader.grade(thread(a)) for a in answers), return_exceptions=True)
        failed, ignored, scored = results
        assert isinstance(failed, GradeFailed) and "KeyError: 'x'" in failed.message and server.url in failed.message
        assert isinstance(ignored, IgnoreGradeException) and "not this one" in ignored.message
        assert getattr(scored, "value", None) == 3.0
        assert (await grader.client.validate_metadata({"bonus": 1})).is_valid
        wrong = await grader.client.validate_metadata({"bonus": "one"})
        assert wrong.error_message == "bonus has the wrong type"
        await grader.client.drop_websocket()
        await grader.client.connect_websocket()
        assert await score_or_refuse(grader, thread("ab")) == 3.0
        await grader.client.drop_websocket()

    served(work)


def status_for_a_huge_body(server: RewardServer) -> int:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    connection.putrequest("POST", "/score")
    connection.putheader("Authorization", f"Bearer {server.token}")
    connection.putheader("Content-Length", str(2**40))
    connection.endheaders()
    try:
        return connection.getresponse().status
    finally:
        connection.close()


def test_the_server_asks_for_its_token_and_bounds_what_it_reads() -> None:
    async def work(server: RewardServer) -> None:
        known = {"Authorization": f"Bearer {server.token}"}
        async with httpx2.AsyncClient(base_url=server.url, trust_env=False) as web:
            assert (await web.get("/info")).status_code == 401
            assert (await web.get("/info", headers={"Authorization": "Bearer no"})).status_code == 401
            assert (await web.get("/nothing", headers=known)).status_code == 404
            assert (await web.post("/score", headers=known, content=b"{")).status_code == 400
            reply = await web.post("/score", headers=known, json={"turns": [], "more": 1})
            assert reply.status_code == 400 and "more" in reply.json()["detail"]
        assert await asyncio.to_thread(status_for_a_huge_body, server) == 413
        client = RewardClient(server.url, token="wrong")
        with pytest.raises(GradeFailed, match="status 401"):
            await client.info()
        await client.drop_websocket()

    served(work)


@contextmanager
def misbehaving(*answers: tuple[int, Any]) -> Iterator[tuple[str, list[str]]]:
    """A server that gives these answers, the last one again and again; and the paths that were asked."""
    pending, asked = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            status, value = pending.pop(0) if len(pending) > 1 else pending[0]
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running = threading.Thread(target=server.serve_forever, args=(0.02,))
    running.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        running.join()


def scores(url: str, count: int = 1) -> list[Any]:
    async def work() -> list[Any]:
        client = RewardClient(url, timeout=20)
        request = Request(turns=[Turn(role="user", content="q")])
        found = await asyncio.gather(*(client.score(request) for _ in range(count)), return_exceptions=True)
        await client.drop_websocket()
        return [getattr(one, "reward", one) for one in found]

    return asyncio.run(work())


def test_what_is_tried_again_and_what_is_not() -> None:
    good = {"reward": 2.0, "metadata": {}}
    with misbehaving((503, "busy"), (429, "slow down"), (200, good)) as (url, asked):
        assert scores(url) == [2.0] and len(asked) == 3
    with misbehaving((400, "no")) as (url, asked):
        (failed,) = scores(url)
        assert isinstance(failed, GradeFailed) and "status 400" in failed.message and len(asked) == 1
    with misbehaving((404, "none"), (200, good)) as (url, asked):
        assert scores(url, 3) == [2.0] * 3
        assert asked == ["/batch_score", "/score", "/score", "/score"], "a server without batches"


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ({"reward": "high", "metadata": {}}, "valid number"),
        (b'{"reward": NaN, "metadata": {}}', "finite number"),
        ({"reward": 1.0, "metadata": {}, "more": 1}, "not permitted"),
        (b"<html>", "no JSON"),
        (b" " * (17 * 2**20), "more than 16 MiB"),
    ],
)
def test_replies_are_validated(reply: Any, said: str) -> None:
    with misbehaving((200, reply)) as (url, _):
        (failed,) = scores(url)
        assert isinstance(failed, GradeFailed) and said in failed.message and url in failed.message


def test_a_server_that_is_down_is_named() -> None:
    with misbehaving((200, {})) as (url, _):
        pass
    (failed,) = scores(url)
    assert isinstance(failed, ResourceError) and url in failed.message and "adaptive graders serve" in failed.hint
    with pytest.raises(ResourceError, match=url):
        RewardClient(url).blocking_info()
    with pytest.raises(UsageError, match="begins with http"):
        RewardClient("localhost:1")
