"""The process behind `adaptive graders serve`: a reward server on this machine for one grader."""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import threading
from collections.abc import Coroutine
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic import TypeAdapter, ValidationError

from harmony_core import __version__
from harmony_core.errors import DataError, IgnoreGradeException, ResourceError
from harmony_core.graders.base import BaseGrader, grade_or_refuse
from harmony_core.graders.reward_types import (
    BATCH_PATH,
    INFO_PATH,
    MAX_BODY,
    METADATA_SCHEMA_PATH,
    SCORE_PATH,
    Failure,
    Request,
    Response,
    ServerInfo,
)
from harmony_core.text.threads import StringThread

_ONE, _MANY = TypeAdapter(Request), TypeAdapter(list[Request])


class RewardServer:
    """Serves a grader on 127.0.0.1. Every request needs the header `Authorization: Bearer <token>`.

    Port 0 takes a free one; `url` and `token` are known once it is made. Raises ResourceError for a port in use.
    """

    def __init__(self, grader: BaseGrader[Any], port: int = 0, schema: dict[str, Any] | None = None) -> None:
        self.grader, self.schema = grader, schema or {"type": "object"}
        self.token = secrets.token_urlsafe(24)
        self._loop: asyncio.AbstractEventLoop | None = None
        try:
            self._http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        except OSError as error:
            message = f"port {port} cannot be used: {error.strerror}"
            raise ResourceError(message, hint="--port 0 takes a free one") from None
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    async def serve(self) -> None:
        """Answer until the task is cancelled."""
        self._loop = asyncio.get_running_loop()
        thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            while True:  # a signal that arrives just before the loop waits is seen at the next turn
                await asyncio.sleep(0.5)
        finally:
            self._http.shutdown()
            self._http.server_close()

    async def scores(self, requests: list[Request]) -> list[dict[str, Any]]:
        """The replies, in order."""
        return list(await asyncio.gather(*map(self._score, requests)))

    async def _score(self, request: Request) -> dict[str, Any]:
        thread = StringThread([(turn.role, turn.content) for turn in request.turns], request.metadata or {})
        try:
            grade = await grade_or_refuse(self.grader, thread)
        except DataError as error:
            ignored = isinstance(error, IgnoreGradeException)
            return Failure(error=error.message, ignored=ignored, id=request.id).model_dump()
        metadata = {} if grade.reasoning is None else {"reason": grade.reasoning}
        return Response(reward=grade.value, metadata=metadata, id=request.id).model_dump()

    def info(self) -> ServerInfo:
        """What `/info` says."""
        return ServerInfo(version=__version__, name=self.grader.grader_key, description=type(self.grader).__name__)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of work in the event loop, for a request's thread."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 60

            def do_GET(self) -> None:
                known = {INFO_PATH: server.info().model_dump(), METADATA_SCHEMA_PATH: server.schema}
                if self._allowed():
                    self._reply(200, known[self.path]) if self.path in known else self._refuse(404, "no such path")

            def do_POST(self) -> None:
                if not self._allowed():
                    return
                if self.path not in (SCORE_PATH, BATCH_PATH):
                    return self._refuse(404, "no such path")
                size = self.headers.get("Content-Length", "")
                if not size.isdecimal() or int(size) > MAX_BODY:
                    return self._refuse(413, f"a body has a Content-Length of at most {MAX_BODY}")
                body = self.rfile.read(int(size))
                many = self.path == BATCH_PATH
                try:
                    requests = _MANY.validate_json(body) if many else [_ONE.validate_json(body)]
                except ValidationError as error:
                    first = error.errors()[0]
                    return self._refuse(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
                replies = server.run(server.scores(requests))
                self._reply(200, replies if many else replies[0])

            def _allowed(self) -> bool:
                given = self.headers.get("Authorization", "").encode("utf-8", "replace")
                if hmac.compare_digest(given, f"Bearer {server.token}".encode()):
                    return True
                self._refuse(401, "the header Authorization: Bearer <token> is missing or wrong")
                return False

            def _refuse(self, status: int, reason: str) -> None:
                self.close_connection = True  # the body may not have been read
                self._reply(status, {"detail": reason})

            def _reply(self, status: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if self.close_connection:
                    self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
