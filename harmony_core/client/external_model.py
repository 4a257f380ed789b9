"""The interface of external models: a builder, and a handle that generates text and refuses what needs tokens."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Coroutine, Sequence
from typing import Any, NoReturn, Self, cast

from harmony_core.client.engine import Engine
from harmony_core.client.handle import SamplingSettings
from harmony_core.client.inference_model import InferenceModel, Timings
from harmony_core.client.live import DryRunEnded
from harmony_core.client.losses import AnyThread
from harmony_core.client.session import TOKENS_TO_GENERATE, ModelBuilder
from harmony_core.config.argument_kinds import checked, checked_class, whole
from harmony_core.errors import ConflictError, DataError, UsageError
from harmony_core.external.address import Address
from harmony_core.external.endpoint import Endpoint, split_params
from harmony_core.grammar import Constraint
from harmony_core.rpc.tracebacks import callers_line
from harmony_core.structured_output import get_pydantic_schema
from harmony_core.text.threads import StringThread
from harmony_core.text.tool_calls import Tool
from harmony_core.text.turns import AnyFragment, StructuredOutput, Turn


class ExternalBuilder(ModelBuilder):
    """Configuration of an external model; the settings of models on our devices raise UsageError."""

    def __init__(self, engine: Engine, address: Address) -> None:
        self._engine, self._address = engine, address
        self._tokens, self._params = TOKENS_TO_GENERATE, dict[str, Any]()

    def __getattr__(self, name: str) -> NoReturn:
        if name not in ("_version", "_asked"):  # what models of the registry have
            raise AttributeError(name)
        raise UsageError(
            f"{self._address.key} runs at its provider: it cannot be trained, and its only settings are "
            "tokens_to_generate and extra_params",
            hint="name a model of the registry",
        )

    def tokens_to_generate(self, tokens: int) -> ModelBuilder:
        """The most new tokens of one request."""
        return self._changed(_tokens=whole("tokens_to_generate", tokens, 1))

    def extra_params(self, **params: Any) -> ModelBuilder:
        """Limits (max_concurrent, requests_per_minute, timeout, max_retries), and further fields of each request.

        Raises UsageError for a key, a limit out of its bounds, and a field that other settings determine.
        """
        split_params(params)
        return self._changed(_params=self._params | params)

    def api_key(self, api_key: str) -> ModelBuilder:
        """Raises UsageError unless the key is the environment's, from which alone it is taken."""
        if api_key != self._address.secret:
            variable = f"{self._address.provider.upper()}_API_KEY"
            raise UsageError(f"api_key() takes no other key than the environment's: set {variable}")
        return self

    def to_python_dict(self) -> dict[str, Any]:
        """The full configuration."""
        return {"path": self._address.key, "tokens_to_generate": self._tokens, "extra_params": dict(self._params)}

    def _changed(self, **changes: Any) -> ExternalBuilder:
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    @checked
    async def spawn_inference(self, name: str) -> InferenceModel:
        """A handle that sends requests; nothing is sent before. Raises ResourceError without the SDK or a key."""
        endpoint = Endpoint(self._address, name, self._params, self._engine.events)
        self._engine.closing.push_async_callback(endpoint.client.close)
        return ExternalModel(endpoint, self.to_python_dict(), self._engine.options.dry_run)


@checked_class
class ExternalModel(InferenceModel):
    """An external model. What needs its tokens, log-probs or weights raises UsageError."""

    def __init__(self, endpoint: Endpoint, built: dict[str, Any], dry_run: bool) -> None:
        self._endpoint, self._built, self._dry_run = endpoint, built, dry_run
        self._settings = SamplingSettings()

    def __getattr__(self, name: str) -> NoReturn:
        if name != "_live":  # what models on our devices have
            raise AttributeError(name)
        raise UsageError(
            f"{self._built['path']} takes and gives text: generate and generate_and_validate work, and nothing that "
            "needs its tokens, log-probs, scores or weights",
            hint="name a model of the registry",
        )

    def __repr__(self) -> str:
        return f"ExternalModel({self._endpoint.name!r}, {self._built['path']!r})"

    def is_scalar(self) -> bool:
        """False: it generates."""
        return False

    def get_builder_args(self) -> dict[str, Any]:
        """The settings that this model was spawned with; "path" is its key."""
        return dict(self._built)

    def tools(self, tools: Sequence[Any]) -> Self:
        """A copy whose model may call these tools: objects with `name`, `description` and `parameters`.

        A thread with tools of its own keeps them.
        """
        return self._with(tools=tuple(Tool.definition(tool) for tool in tools))

    def constrained_decoding(self, schema_json: str, format: str = "json") -> Self:
        """A copy that asks for JSON of this schema by the provider's JSON mode. Raises UsageError for other formats."""
        if format != "json":
            raise UsageError(f"{self._built['path']}: a provider constrains by JSON schemas only, not by {format}")
        return self._with(constraint=Constraint("json", schema_json))

    def generate(
        self,
        thread: AnyThread,
        response_model: Any = None,
        return_timings: bool = False,
        *,
        continue_final: bool = False,
    ) -> Coroutine[Any, Any, Any]:
        """A new thread: the input and the model's turn, with `function_call` fragments where it calls tools.

        A `response_model`, a pydantic model, is asked for by the provider's JSON mode. Raises ProviderError when the
        provider fails, DataError for a thread that cannot be sent, JsonParseError for JSON that cannot be read.
        """
        if response_model is not None:
            return self._instance(thread, response_model)
        return self._answer(thread, return_timings, continue_final)

    async def _instance(self, thread: AnyThread, response_model: Any) -> tuple[StringThread, Any]:
        text, instance = await self.generate_and_validate(cast(StringThread, thread), response_model, 0)
        fragment = StructuredOutput(text, instance.model_dump_json(), get_pydantic_schema(response_model))
        return _with_answer(thread, (fragment,)), instance

    async def _answer(self, thread: AnyThread, return_timings: bool, continue_final: bool) -> Any:
        settings, cap = self._settings, self._built["tokens_to_generate"]
        if continue_final or settings.min_gen_len or settings.limits:
            raise UsageError(f"{self._built['path']} has no continue_final, min_gen_len and max_seqlen")
        if [turn.role for turn in thread.text_turns[-1:]] == ["assistant"]:
            raise DataError("the thread ends with an assistant turn", hint="append a user turn")
        if self._endpoint.client.is_closed():
            raise ConflictError(f"model {self._endpoint.name!r} was deallocated", hint="spawn it again")
        if self._dry_run:
            raise DryRunEnded(callers_line("the recipe"))
        given = {"temperature": settings.temperature, "top_p": settings.top_p}
        sampling = {name: value for name, value in given.items() if value != 1}  # some models refuse even the default
        schema = json.loads(settings.constraint.text) if settings.constraint else None
        began, limit = time.monotonic(), min(settings.max_gen_len or cap, cap)
        tools = thread.template_kwargs.get("tools") or settings.tools
        reply = await self._endpoint.ask(thread.text_turns, tools, schema, limit, sampling)
        answered = _with_answer(thread, reply.fragments)
        timings = Timings(time.monotonic() - began, 0.0, reply.completion_tokens)
        return (answered, timings) if return_timings else answered

    async def dealloc(self) -> None:
        """Close the connections; its handles cannot be used afterwards."""
        await self._endpoint.client.close()


def _with_answer(thread: AnyThread, fragments: tuple[AnyFragment, ...]) -> StringThread:
    turns = [*(Turn(turn.role, turn.fragments, 0.0) for turn in thread.text_turns), Turn("assistant", fragments, 1.0)]
    return StringThread.from_turns(turns, thread.metadata, thread.uuid(), thread.template_kwargs)
