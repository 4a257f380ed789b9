"""A grader that asks a reward server over HTTP, and its client."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from harmony_core.errors import DataError, GradeFailed, HarmonyError, IgnoreGradeException, ResourceError, UsageError
from harmony_core.graders.base import BaseGrader, Grade, timed_out
from harmony_core.graders.reward_types import (
    BATCH_PATH,
    INFO_PATH,
    MAX_BATCH,
    MAX_BODY,
    METADATA_SCHEMA_PATH,
    SCORE_PATH,
    Failure,
    MetadataValidationResponse,
    Request,
    Response,
    ServerInfo,
    Turn,
)
from harmony_core.text.threads import StringThread

if TYPE_CHECKING:
    import httpx2  # imported when it is used: it takes a tenth of a second

TOKEN = "ADAPTIVE_REWARD_TOKEN"
"""Environment variable with the token that `adaptive graders serve` prints."""

_TYPES: dict[str, Any] = {"string": str, "integer": int, "number": int | float, "array": list, "object": dict}
_ATTEMPTS = 4
_FIRST_WAIT = 0.25


class RewardClient:
    """Scores conversations at a server's address, over at most `max_connections` connections that are used again.

    Requests made at the same time are sent together if the server has `/batch_score`. Requests are repeated, with waits
    that double, only after connection errors, 429 and 5xx. `timeout` in seconds is that of one request. The token is
    `token`, or that of the environment variable ADAPTIVE_REWARD_TOKEN. Raises UsageError for an address that is not
    http:// or https://.
    """

    def __init__(
        self, base_url: str, max_connections: int = 32, timeout: float | None = None, token: str | None = None
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise UsageError(f"the address of a reward server begins with http:// or https://, got {base_url[:100]!r}")
        self.base_url, self.timeout = base_url.rstrip("/"), timeout
        self._most = max_connections
        token = token or os.environ.get(TOKEN)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http: httpx2.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: list[tuple[Request, asyncio.Future[Response]]] = []
        self._sending: set[asyncio.Task[None]] = set()
        self._has_batches = True

    async def setup(self) -> None:
        """Ask the server for its `info`, so that one that is down is found before the work begins."""
        await self.info()

    async def connect_websocket(self) -> None:
        """Close the connections; the next request opens new ones. A websocket is not used."""
        await self.drop_websocket()

    async def drop_websocket(self) -> None:
        """Close the connections."""
        if self._http is not None and self._loop is asyncio.get_running_loop():
            await self._http.aclose()
        self._http = None

    async def score(self, req: Request) -> Response:
        """The server's reply.

        Raises ResourceError, naming the address, when the server cannot be reached; GradeFailed when it refuses the
        request or does not reply as it should; IgnoreGradeException when it ignores the sample.
        """
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._waiting.append((req, future))
        if len(self._waiting) == 1:
            task = asyncio.ensure_future(self._send())
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        return await future

    async def _send(self) -> None:
        """Send what has been asked for by now, and hand out the replies."""
        waiting, self._waiting = self._waiting, []
        parts = [waiting[i : i + MAX_BATCH] for i in range(0, len(waiting), MAX_BATCH)]
        await asyncio.gather(*(self._send_part(*zip(*part, strict=True)) for part in parts))

    async def _send_part(self, requests: Sequence[Request], futures: Sequence[asyncio.Future[Response]]) -> None:
        bodies = [request.model_dump() for request in requests]
        replies: Any = None
        try:
            if len(bodies) > 1 and self._has_batches:
                replies = await self._ask("POST", BATCH_PATH, bodies, missing=True)
                self._has_batches = replies is not None
                if self._has_batches and (not isinstance(replies, list) or len(replies) != len(bodies)):
                    raise self._failed(f"replied to {len(bodies)} requests with {str(replies)[:100]!r}")
        except (GradeFailed, ResourceError) as error:
            replies = [error] * len(bodies)
        if replies is None:
            calls = (self._ask("POST", SCORE_PATH, body) for body in bodies)
            replies = await asyncio.gather(*calls, return_exceptions=True)
        for future, reply in zip(futures, replies, strict=True):
            found = reply if isinstance(reply, BaseException) else self._read(reply)
            if not future.done():
                future.set_exception(found) if isinstance(found, BaseException) else future.set_result(found)

    def _read(self, reply: Any) -> Response | DataError:
        try:
            if not isinstance(reply, dict) or "error" not in reply:
                return Response.model_validate(reply)
            failure = Failure.model_validate(reply)
            return IgnoreGradeException(failure.error) if failure.ignored else self._failed(f"says: {failure.error}")
        except ValidationError as error:
            return self._failed(f"replied {str(reply)[:100]!r}: {error.errors()[0]['msg']}")

    async def validate_metadata(self, metadata: dict[Any, Any]) -> MetadataValidationResponse:
        """Whether the metadata have the fields that the server's JSON schema requires, of the types that it names."""
        schema = await self._ask("GET", METADATA_SCHEMA_PATH)
        told = [f"{name} is missing" for name in schema.get("required", ()) if name not in metadata]
        for name, field in schema.get("properties", {}).items():
            if name in metadata and not isinstance(metadata[name], _TYPES.get(field.get("type"), object)):
                told.append(f"{name} has the wrong type")
        return MetadataValidationResponse(is_valid=not told, error_message="; ".join(told) or None)

    async def info(self) -> ServerInfo:
        """The server's version, name and description."""
        return ServerInfo.model_validate(await self._ask("GET", INFO_PATH))

    def blocking_info(self) -> ServerInfo:
        """As `info`, outside of an event loop."""
        import httpx2

        with httpx2.Client(headers=self._headers, timeout=self.timeout, trust_env=False) as http:
            try:
                return ServerInfo.model_validate(http.get(self.base_url + INFO_PATH).raise_for_status().json())
            except httpx2.HTTPError as error:
                raise self._down(error) from error

    async def _ask(self, method: str, path: str, body: Any = None, missing: bool = False) -> Any:
        """The JSON of a reply; None for a path that the server does not have, if it may be `missing`."""
        import httpx2

        for attempt in range(_ATTEMPTS):
            if attempt:
                await asyncio.sleep(_FIRST_WAIT * 2 ** (attempt - 1))
            try:
                status, content = await self._exchange(method, path, body)
            except httpx2.TimeoutException:
                raise timed_out(self.base_url, self.timeout or 0) from None
            except httpx2.TransportError as error:
                failure: HarmonyError = self._down(error)
                continue
            if missing and status in (404, 405):
                return None
            told = content[:200].decode(errors="replace")
            if status < 400:
                try:
                    return json.loads(content)
                except ValueError:
                    raise self._failed(f"replied {told!r}, which is no JSON") from None
            failure = self._failed(f"answered {path} with status {status}: {told}")
            if status != 429 and status < 500:
                break
        raise failure

    async def _exchange(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        import httpx2

        if self._http is None or self._loop is not asyncio.get_running_loop():
            self._loop = asyncio.get_running_loop()
            limits = httpx2.Limits(max_connections=self._most, max_keepalive_connections=self._most)
            self._http = httpx2.AsyncClient(limits=limits, headers=self._headers, trust_env=False)
        content = bytearray()
        async with self._http.stream(method, self.base_url + path, json=body, timeout=self.timeout) as reply:
            async for chunk in reply.aiter_bytes():
                content += chunk
                if len(content) > MAX_BODY:
                    raise self._failed(f"replied with more than {MAX_BODY >> 20} MiB")
        return reply.status_code, bytes(content)

    def _failed(self, what: str) -> GradeFailed:
        return GradeFailed(f"the reward server {self.base_url} {what}", grader=self.base_url)

    def _down(self, error: Exception) -> ResourceError:
        return ResourceError(
            f"the reward server {self.base_url} cannot be reached: {error or type(error).__name__}",
            hint="start it (adaptive graders serve FILE.py:FUNCTION), or correct the address",
            address=self.base_url,
        )


class RewardServerGrader(BaseGrader[dict[str, Any]]):
    """Grades by a reward server at `reward_server_ip`, an http:// or https:// address; see `RewardClient`.

    The grade's key is `grader_id`. `grade` raises as `RewardClient.score`; in a rollout the sample is then unscored.
    """

    keeps_time = True

    def __init__(self, grader_key: str, grader_id: str, reward_server_ip: str, token: str | None = None) -> None:
        super().__init__(grader_key)
        self.grader_id = grader_id
        self.client = RewardClient(reward_server_ip, timeout=self.timeout, token=token)

    async def grade(self, sample: StringThread) -> Grade:
        """The server's reward; its reason is `metadata["reason"]` of the reply."""
        self.client.timeout = self.timeout
        turns = [Turn(role=turn.role, content=turn.content) for turn in sample.get_turns()]
        metadata = sample.metadata if isinstance(sample.metadata, dict) else None
        response = await self.client.score(Request(turns=turns, metadata=metadata))
        self.add_log({"score": response.reward})
        reason = response.metadata.get("reason")
        return Grade(response.reward, self.grader_id, None if reason is None else str(reason))
