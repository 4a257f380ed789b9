"""Calls of one external model through its provider's SDK, an optional dependency: limits, retries, counts, errors."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from harmony_core.errors import ProviderError, UsageError
from harmony_core.external import messages
from harmony_core.external.address import HOSTS, Address
from harmony_core.external.messages import Reply, Tool
from harmony_core.journal import current
from harmony_core.redaction import Redactor, is_secret_name
from harmony_core.text.turns import Turn

log = logging.getLogger(__name__)

REQUEST = "external.request"
"""The event of each request: {"model", "key", "prompt_tokens", "completion_tokens", "failed", "cut", "seconds"}."""

DEFAULTS: dict[str, Any] = {"max_concurrent": 32, "requests_per_minute": 0, "timeout": 120, "max_retries": 4}
"""Settings that are ours among `extra_params`; all others are the provider's, and sent with each request. `timeout` is
in seconds, for one attempt; `requests_per_minute` 0 is no limit."""
_OURS = ("model", "messages", "system", "tools", "stream", "response_format", "output_config", "base_url")
_FIXED = ("gpt-5", "o1", "o3", "o4")
"""OpenAI's models that take no temperature and top_p; Anthropic's interface takes none since 2026-10-21."""
_MAX_MESSAGE = 400
_NO_KEY = "no-key"  # what the SDKs need in place of a key that a server does not ask for


def check_params(address: Address, params: Mapping[str, Any]) -> None:
    """Raise UsageError for settings that hold keys, that requests set themselves, or that are not numbers above 0."""
    if secret := [name for name in params if is_secret_name(name)]:
        raise UsageError(f"extra_params: {secret[0]} is not taken", hint=f"set the variable {address.key_variable}")
    if own := [name for name in params if name in _OURS]:
        raise UsageError(f"extra_params: {own[0]} cannot be set for {address}: its key, the thread and tools() do")
    for name in DEFAULTS.keys() & params.keys():
        value, least = params[name], 0 if name in ("requests_per_minute", "max_retries") else 1e-3
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
            raise UsageError(
                f"extra_params: {name} must be a number{' above 0' if least else ', 0 or more'}, not {value!r}"
            )


class Endpoint:
    """One external model under a name. Its handles share it, and with it the limits. Needs a running event loop."""

    def __init__(
        self, address: Address, name: str, params: Mapping[str, Any], tell: Callable[[str, dict[str, Any], None], None]
    ) -> None:
        address.check()
        self.address = address
        self.name = name
        ours = {**DEFAULTS, **params}
        self._extra = {key: value for key, value in params.items() if key not in DEFAULTS}
        self._tell = tell
        self._sdk: Any = importlib.import_module(address.provider)
        self._key = os.environ.get(address.key_variable) or _NO_KEY
        client = self._sdk.AsyncOpenAI if address.provider == "openai" else self._sdk.AsyncAnthropic
        # A redirection would carry the key to another host.
        http = self._sdk.DefaultAsyncHttpxClient(follow_redirects=False)
        limits = {"timeout": ours["timeout"], "max_retries": int(ours["max_retries"])}
        self._client = client(api_key=self._key, base_url=address.server, http_client=http, **limits)
        self._slots = asyncio.Semaphore(max(1, int(ours["max_concurrent"])))
        self._pause = 60 / ours["requests_per_minute"] if ours["requests_per_minute"] else 0.0
        self._next = 0.0
        self._told = False

    async def ask(
        self,
        turns: Sequence[Turn],
        tools: Sequence[Tool],
        schema: Mapping[str, Any] | None,
        max_tokens: int,
        **sampling: Any,
    ) -> Reply:
        """The model's answer to these turns; a schema asks for JSON. Raises ProviderError, and DataError for a turn."""
        openai = self.address.provider == "openai"
        if schema is not None and not openai:
            schema = self._sdk.transform_schema(schema)
        request = (messages.openai_request if openai else messages.anthropic_request)(turns, tools, schema)
        if sampling and (not openai or self.address.model.startswith(_FIXED)):
            self._say_once(f"{self.address} takes no {' and '.join(sampling)}: the provider's own is used")
            sampling = {}
        if openai:  # other servers know the older name
            request["max_completion_tokens" if self.address.server == HOSTS["openai"] else "max_tokens"] = max_tokens
        else:
            request["max_tokens"] = max_tokens
        create = self._client.chat.completions.create if openai else self._client.messages.create
        async with self._slots:
            await self._wait()
            began, reply = time.monotonic(), None
            try:
                raw = await create(model=self.address.model, extra_body=sampling | self._extra, **request)
                reply = (messages.openai_reply if openai else messages.anthropic_reply)(raw.model_dump(warnings=False))
            except self._sdk.APIError as error:
                raise self._failed(getattr(error, "status_code", None), str(error)) from None
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise self._failed(None, f"its reply cannot be read: {type(error).__name__}: {error}") from None
            finally:
                self._count(reply, time.monotonic() - began)
        return reply

    async def _wait(self) -> None:
        """Let requests begin no faster than `requests_per_minute`."""
        now = time.monotonic()
        at = max(now, self._next)
        self._next = at + self._pause
        await asyncio.sleep(at - now)

    def _say_once(self, told: str) -> None:
        if not self._told:
            log.warning("%s", told)
        self._told = True

    def _count(self, reply: Reply | None, seconds: float) -> None:
        counts = {"prompt_tokens": 0, "completion_tokens": 0} if reply is None else reply._asdict()
        tokens = {name: counts[name] for name in ("prompt_tokens", "completion_tokens")}
        cut = reply is not None and reply.finish in ("length", "max_tokens")
        told = {"model": self.name, "key": str(self.address), "requests": 1, "failed": int(reply is None), **tokens}
        self._tell(REQUEST, told | {"cut": int(cut), "seconds": round(seconds, 3)}, None)

    def _failed(self, status: int | None, told: str) -> ProviderError:
        masked = Redactor([*current().mask.values, self._key]).text(" ".join(told.split()))
        hints = {401: f"{self.address.key_variable} is refused", 429: "extra_params(requests_per_minute=...) waits"}
        short = masked if len(masked) <= _MAX_MESSAGE else masked[:_MAX_MESSAGE] + "..."
        return ProviderError(f"{self.address}: {short}", hint=hints.get(status or 0, ""), status=status)

    async def close(self) -> None:
        """Close the connections."""
        with suppress(RuntimeError):  # their event loop is gone, and they with it
            await self._client.close()
