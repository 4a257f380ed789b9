"""The interface of external models: a builder, and a handle that generates text and refuses what needs tokens."""

from __future__ import annotations

import copy
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
from harmony_core.external.address import Address
from harmony_core.external.endpoint import Endpoint, split_params
from harmony_core.rpc.tracebacks import callers_line
from harmony_core.text.threads import StringThread, check_last_turn
from harmony_core.text.turns import Turn


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
        self._tools: tuple[dict[str, Any], ...] = ()

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
        """A copy whose model may call these tools: objects with `name`, `description` and `parameters`."""
        other, none = self._with(), {"type": "object", "properties": {}}
        given = [{"name": t.name, "description": t.description, "parameters": t.parameters or none} for t in tools]
        other._tools = tuple({"type": "function", "function": function} for function in given)
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

        A `response_model`, a pydantic model, is asked for by the provider's JSON mode. Raises ProviderError when the
        provider fails, DataError for a thread that cannot be sent, JsonParseError for JSON that cannot be read.
        """
        return self._answer(thread, return_timings, continue_final)

    async def _answer(self, thread: AnyThread, return_timings: bool, continue_final: bool) -> Any:
        settings, before, cap = self._settings, thread.text_turns, self._built["tokens_to_generate"]
        if continue_final or settings.min_gen_len or settings.limits:
            raise UsageError(f"{self._built['path']} has no continue_final, min_gen_len and max_seqlen")
        check_last_turn(thread, continue_final)
        if self._dry_run:
            raise DryRunEnded(callers_line("the recipe"))
        given = {"temperature": settings.temperature, "top_p": settings.top_p}
        sampling = {name: value for name, value in given.items() if value != 1}  # some models refuse even the default
        began, limit = time.monotonic(), min(settings.max_gen_len or cap, cap)
        reply = await self._endpoint.ask(before, self._tools, None, limit, sampling)
        turns = [*(Turn(turn.role, turn.fragments, 0.0) for turn in before), Turn("assistant", reply.fragments, 1.0)]
        answered = StringThread.from_turns(turns, thread.metadata, thread.uuid(), thread.template_kwargs)
        seconds = time.monotonic() - began
        timings = Timings(ttft_from_creation_sec=seconds, tbt_sec=0.0, num_tokens=reply.completion_tokens)
        return (answered, timings) if return_timings else answered

    async def dealloc(self) -> None:
        """Close the connections; its handles cannot be used afterwards."""
        await self._endpoint.client.close()
