"""The interface of external models: a builder, and a handle that generates text and refuses what needs tokens."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Coroutine, Sequence
from typing import Any, NoReturn, Self

from harmony_core.client.engine import Engine
from harmony_core.client.handle import SamplingSettings
from harmony_core.client.inference_model import InferenceModel, Timings
from harmony_core.client.live import DryRunEnded
from harmony_core.client.losses import AnyThread
from harmony_core.client.session import TOKENS_TO_GENERATE, ModelBuilder
from harmony_core.config.argument_kinds import checked, checked_class, whole
from harmony_core.errors import UsageError
from harmony_core.external import Address, Endpoint
from harmony_core.external.endpoint import check_params
from harmony_core.external.messages import Tool
from harmony_core.rpc.tracebacks import callers_line
from harmony_core.text.threads import StringThread, check_last_turn
from harmony_core.text.turns import Turn


class ExternalBuilder(ModelBuilder):
    """Configuration of an external model: `tokens_to_generate` and `extra_params`. All other settings raise UsageError.

    The model's name, its server and its key are taken from its address and from the environment.
    """

    def __init__(self, engine: Engine, address: Address) -> None:
        self._engine = engine
        self._address = address
        self._tokens = TOKENS_TO_GENERATE
        self._params: dict[str, Any] = {}

    def __getattr__(self, name: str) -> NoReturn:
        if name not in ("_version", "_asked"):  # which models of the registry have
            raise AttributeError(name)
        raise UsageError(
            f"{self._address} runs at its provider: tokens_to_generate and extra_params are its only settings, "
            "and it cannot be trained",
            hint="name a model of the registry to set tp, kv_cache_len, max_seqlen, adapters or heads, or to train",
        )

    def tokens_to_generate(self, tokens: int) -> ModelBuilder:
        """The most new tokens of one request."""
        return self._changed(_tokens=whole("tokens_to_generate", tokens, 1))

    def extra_params(self, **params: Any) -> ModelBuilder:
        """Further fields of each request, and limits: max_concurrent, requests_per_minute, timeout, max_retries.

        By default 32, no limit, 120 seconds for an attempt, and 4. Raises UsageError for a key, and for a field that
        the thread or another setting determines.
        """
        check_params(self._address, params)
        return self._changed(_params=self._params | params)

    def api_key(self, api_key: str) -> ModelBuilder:
        """Keys come from the environment only. Raises UsageError unless it is the key that is there."""
        variable = self._address.key_variable
        if api_key != os.environ.get(variable):
            raise UsageError(f"{self._address}: api_key() takes only the key in ${variable}", hint=f"set {variable}")
        return self

    def to_python_dict(self) -> dict[str, Any]:
        """The full configuration."""
        return {"path": str(self._address), "tokens_to_generate": self._tokens, "extra_params": dict(self._params)}

    def _changed(self, **changes: Any) -> ExternalBuilder:
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    @checked
    async def spawn_inference(self, name: str) -> InferenceModel:
        """A handle that sends requests. Raises ResourceError without the SDK or the provider's key."""
        endpoint = Endpoint(self._address, name, self._params, self._engine.events)
        self._engine.closing.push_async_callback(endpoint.close)
        return ExternalModel(endpoint, self.to_python_dict(), self._engine.options.dry_run)


@checked_class
class ExternalModel(InferenceModel):
    """An external model. It generates text; verbs that need tokens, log-probs or weights raise UsageError."""

    def __init__(self, endpoint: Endpoint, built: dict[str, Any], dry_run: bool) -> None:
        self._endpoint = endpoint
        self._settings = SamplingSettings()
        self._built = built
        self._dry_run = dry_run
        self._tools: tuple[Tool, ...] = ()
        self._schema: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> NoReturn:
        if name != "_live":  # which models on the ranks have
            raise AttributeError(name)
        raise UsageError(
            f"{self!r} takes and gives text: what needs its tokens, log-probs, scores or weights cannot be done, "
            "and generate and generate_and_validate can",
            hint="name a model of the registry for that",
        )

    def __repr__(self) -> str:
        return f"ExternalModel({self._endpoint.name!r}, {str(self._endpoint.address)!r})"

    @property
    def longest_completion(self) -> int:
        """The maximum number of new tokens requested."""
        cap: int = self._built["tokens_to_generate"]
        return min(self._settings.max_gen_len or cap, cap)

    def is_scalar(self) -> bool:
        """False: it generates."""
        return False

    def get_builder_args(self) -> dict[str, Any]:
        """The settings that this model was spawned with; "path" is its key."""
        return dict(self._built)

    def tools(self, tools: Sequence[Any]) -> Self:
        """A copy whose model may call these functions: objects with `name`, `description` and `parameters`."""
        other = self._with()
        other._tools = tuple(Tool(t.name, t.description or "", t.parameters or {"type": "object"}) for t in tools)
        return other

    def constrained_decoding(self, schema_json: str, format: str = "json") -> Self:
        """A copy whose answers are JSON of this schema, by the provider's own JSON mode."""
        if format != "json":
            raise UsageError(f"{self!r}: a provider constrains to JSON schemas only, not to {format!r}")
        other = self._with()
        other._schema = json.loads(schema_json)
        return other

    def generate(
        self,
        thread: AnyThread,
        response_model: Any = None,
        return_timings: bool = False,
        *,
        continue_final: bool = False,
    ) -> Coroutine[Any, Any, Any]:
        """A new thread: the input and the model's turn, with `function_call` fragments where it calls tools.

        Raises ProviderError when the provider fails, DataError for a thread that cannot be sent.
        """
        if response_model is not None:
            return self._parsed(thread, response_model)
        return self._answer(thread, return_timings, continue_final)

    async def _parsed(self, thread: AnyThread, response_model: Any) -> Any:
        from harmony_core.structured_output import get_pydantic_schema, pydantic_parse

        constrained = self.constrained_decoding(get_pydantic_schema(response_model))
        answered = await constrained._answer(thread, False, False)
        return answered, pydantic_parse(answered.last_content(), response_model)

    async def _answer(self, thread: AnyThread, return_timings: bool, continue_final: bool) -> Any:
        if self._dry_run:
            raise DryRunEnded(callers_line("the recipe"))
        settings = self._settings
        if continue_final or settings.min_gen_len or settings.limits:
            raise UsageError(f"{self!r} cannot use continue_final, min_gen_len or max_seqlen")
        check_last_turn(thread, continue_final)
        given = {"temperature": settings.temperature, "top_p": settings.top_p}
        sampling = {name: value for name, value in given.items() if value != 1}  # some models refuse even the default
        began, before = time.monotonic(), thread.text_turns
        asked = self._endpoint.ask(before, self._tools, self._schema, max_tokens=self.longest_completion, **sampling)
        reply = await asked
        answered = StringThread.from_turns(
            [*(Turn(turn.role, turn.fragments, 0.0) for turn in before), Turn("assistant", reply.fragments, 1.0)],
            thread.metadata,
            thread.uuid(),
            thread.template_kwargs,
        )
        seconds = time.monotonic() - began
        timings = Timings(ttft_from_creation_sec=seconds, tbt_sec=0.0, num_tokens=reply.completion_tokens)
        return (answered, timings) if return_timings else answered

    async def dealloc(self) -> None:
        """Close the connections; its handles cannot be used afterwards."""
        await self._endpoint.close()
