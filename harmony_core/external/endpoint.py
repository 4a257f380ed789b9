"""Calls of one external model through its provider's SDK, an optional dependency: limits, retries, counts, errors."""

from __future__ import annotations

import asyncio
import importlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from harmony_core.errors import ProviderError, UsageError
from harmony_core.external import messages
from harmony_core.external.address import HOSTS, Address
from harmony_core.external.messages import Reply, Schema, Tools
from harmony_core.journal import current
from harmony_core.redaction import Redactor, is_secret_name
from harmony_core.text.turns import Turn

_OTHERS = ("model", "messages", "system", "tools", "stream", "response_format", "output_config", "base_url")
"""Fields of a request that are not set by `extra_params`."""
_FIXED = ("gpt-5", "o1", "o3", "o4")
"""OpenAI's models that take no temperature and top_p. Anthropic's interface takes none since its version 2026-10-21."""
_MAX_MESSAGE = 400


class Limits(msgspec.Struct):
    """Those of `extra_params` that are ours; all others are sent. `timeout` is in seconds, for one attempt.

    `json_mode` False is for servers without one: their answers are only parsed.
    """

    max_concurrent: Annotated[int, Meta(ge=1)] = 32
    requests_per_minute: Annotated[float, Meta(gt=0)] = float("inf")
    timeout: Annotated[float, Meta(gt=0)] = 120.0
    max_retries: Annotated[int, Meta(ge=0)] = 4
    json_mode: bool = True


def split_params(params: Mapping[str, Any]) -> tuple[Limits, dict[str, Any]]:
    """The limits, and the fields to send. Raises UsageError for keys, and for what other settings determine."""
    for name in params:
        if is_secret_name(name) or name in _OTHERS:
            raise UsageError(f"extra_params cannot hold {name}", hint="keys are taken from the environment only")
    ours = {name: value for name, value in params.items() if name in Limits.__struct_fields__}
    try:
        return msgspec.convert(ours, Limits), {name: params[name] for name in params if name not in ours}
    except msgspec.ValidationError as error:
        raise UsageError(f"extra_params: {error}") from None


class Endpoint:
    """One external model under a name. Its handles share it, and with it the limits. Raises ResourceError."""

    def __init__(
        self, address: Address, name: str, params: Mapping[str, Any], tell: Callable[[str, dict[str, Any], None], None]
    ) -> None:
        address.check()
        self.address, self.name, self._tell = address, name, tell
        limits, self._extra = split_params(params)
        self._sdk: Any = importlib.import_module(address.provider)
        self._openai = address.provider == "openai"
        client = self._sdk.AsyncOpenAI if self._openai else self._sdk.AsyncAnthropic
        self.client = client(
            api_key=address.secret or "none",  # without one the SDK makes no client, also for a server that needs none
            base_url=address.server,
            http_client=self._sdk.DefaultAsyncHttpxClient(follow_redirects=False),  # the key goes to no other host
            timeout=limits.timeout,
            max_retries=limits.max_retries,
        )
        self._json_mode = limits.json_mode
        self._slots = asyncio.Semaphore(limits.max_concurrent)
        self._pause, self._next = 60 / limits.requests_per_minute, 0.0

    async def ask(
        self, turns: Sequence[Turn], tools: Tools, schema: Schema, max_tokens: int, sampling: dict[str, Any]
    ) -> Reply:
        """The answer to these turns, in JSON if there is a schema. Raises ProviderError, and DataError for a turn."""
        if sampling and (not self._openai or self.address.model.startswith(_FIXED)):
            names, sampling = " and ".join(sampling), {}
            warnings.warn(f"{self.address.key} takes no {names}: it has no effect", stacklevel=2)
        schema = schema if self._json_mode else None
        if self._openai:
            # Other servers know the older name.
            limit = "max_completion_tokens" if self.address.server == HOSTS["openai"] else "max_tokens"
            request = {limit: max_tokens, **messages.openai_request(turns, tools, schema)}
            create, read = self.client.chat.completions.create, messages.openai_reply
        else:
            schema = schema and self._sdk.transform_schema(schema)
            request = {"max_tokens": max_tokens, **messages.anthropic_request(turns, tools, schema)}
            create, read = self.client.messages.create, messages.anthropic_reply
        async with self._slots:
            at = max(time.monotonic(), self._next)
            self._next = at + self._pause
            await asyncio.sleep(at - time.monotonic())
            began, reply = time.monotonic(), None
            try:
                answer = await create(model=self.address.model, extra_body=sampling | self._extra, **request)
                reply = read(answer.model_dump(warnings=False))
            except self._sdk.APIError as error:
                raise self._failed(getattr(error, "status_code", None), str(error)) from None
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise self._failed(None, f"its reply cannot be read: {type(error).__name__}: {error}") from None
            finally:
                self._count(reply, time.monotonic() - began)
        return reply

    def _count(self, reply: Reply | None, seconds: float) -> None:
        """Write the request's event; `cut` counts answers that were cut for their length."""
        data: dict[str, Any] = {"model": self.name, "key": self.address.key, "seconds": round(seconds, 3)}
        data |= {"requests": 1, "failed": int(reply is None), "cut": 0, "prompt_tokens": 0, "completion_tokens": 0}
        if reply is not None:
            data["cut"] = int(reply.finish in ("length", "max_tokens"))
            data |= {name: getattr(reply, name) for name in ("prompt_tokens", "completion_tokens")}
        self._tell("external.request", data, None)

    def _failed(self, status: int | None, told: str) -> ProviderError:
        masked = Redactor([*current().mask.values, self.address.secret]).text(" ".join(told.split()))
        variable = f"{self.address.provider.upper()}_API_KEY"
        hint = {401: f"{variable} is not accepted", 429: "extra_params(requests_per_minute=...) asks slower"}
        return ProviderError(
            f"{self.address.key}: {masked[:_MAX_MESSAGE]}", hint=hint.get(status or 0, ""), status=status
        )
