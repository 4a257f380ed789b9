"""How a model is to be spawned: an immutable record with setters, checked when it is spawned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from msgspec import structs

from harmony_core.config.argument_kinds import checked, whole
from harmony_core.errors import ModelRefused, UsageError
from harmony_core.journal import current
from harmony_core.model.spec import check_tp
from harmony_core.rpc.protocol import LoraSettings
from harmony_core.text.turns import TemplateKwargs

if TYPE_CHECKING:
    from harmony_core.client.engine import Engine
    from harmony_core.client.inference_model import InferenceModel
    from harmony_core.client.training_model import TrainingModel
    from harmony_core.registry import ModelVersion

TOKENS_TO_GENERATE = 2048
"""Most new tokens of a request where neither the recipe nor the registry says otherwise."""


@dataclass(frozen=True)
class BuilderSettings:
    """What was asked for. None: not set, so the registry's default applies, or else the engine's."""

    tp: int | None = None
    kv_cache_len: int | None = None
    tokens_to_generate: int | None = None
    max_seqlen: int | None = None
    use_adapter: bool | None = None
    lora: LoraSettings = field(default_factory=LoraSettings)
    dtype: str = ""
    scalar: bool = False
    template_kwargs: TemplateKwargs = field(default_factory=TemplateKwargs)


class ModelBuilder:
    """Fluent configuration of one model; every setter returns a new builder."""

    def __init__(self, engine: Engine, version: ModelVersion, settings: BuilderSettings) -> None:
        self._engine = engine
        self._version = version
        self._settings = settings

    def __repr__(self) -> str:
        return f"ModelBuilder({self.to_python_dict()})"

    def _with(self, **changes: Any) -> ModelBuilder:
        return ModelBuilder(self._engine, self._version, replace(self._settings, **changes))

    def tp(self, tp: int) -> ModelBuilder:
        """Tensor-parallel degree: devices per replica. Raises ModelRefused with the values that work."""
        check_tp(self._version.spec, whole("tp", tp, 1), self._engine.world_size)
        return self._with(tp=tp)

    def kv_cache_len(self, tokens: int) -> ModelBuilder:
        """Tokens in each replica's KV pool: a contract. Unset: up to 131,072, as much as fits."""
        return self._with(kv_cache_len=whole("kv_cache_len", tokens, 1))

    def tokens_to_generate(self, tokens: int) -> ModelBuilder:
        """Most new tokens of one request."""
        return self._with(tokens_to_generate=whole("tokens_to_generate", tokens, 1))

    def chat_template_kwargs(self, kwargs: Mapping[str, Any]) -> ModelBuilder:
        """Variables for the chat template, {"enable_thinking": False}: above the registry's, below a thread's own.

        Raises DataError for a value that is not JSON; the spawn, UsageError for a name that the template does not read.
        """
        return self._with(template_kwargs=self._settings.template_kwargs | kwargs)

    def max_seqlen(self, max_seqlen: int) -> ModelBuilder:
        """Longest sequence, prompt and completion together; unset: what the model was made for."""
        limit = self._version.spec.max_positions
        if not 2 <= whole("max_seqlen", max_seqlen, 2) <= limit:
            raise UsageError(f"max_seqlen must be between 2 and {limit} for {self._version.ref}, not {max_seqlen}")
        return self._with(max_seqlen=max_seqlen)

    def with_adapter(
        self,
        use_adapter: bool = True,
        *,
        rank: int | None = None,
        alpha: float | None = None,
        dropout: float | None = None,
        targets: tuple[str, ...] | list[str] | None = None,
    ) -> ModelBuilder:
        """Train a LoRA adapter in place of the full weights; on a stored adapter this changes nothing.

        Defaults: rank 16, alpha 32, dropout 0, the seven linear modules of a layer. Raises ModelRefused for
        `use_adapter=False` on a stored adapter.
        """
        if not use_adapter and self._version.format == "peft":
            raise ModelRefused(
                f"{self._version.ref} is an adapter of {self._version.base.ref if self._version.base else 'a model'}: "
                "its full weights cannot be trained",
                hint="leave with_adapter(False) out, or name the base model",
            )
        given = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": targets}
        lora = {name: value for name, value in given.items() if value is not None}
        if rank is not None:
            lora["rank"] = whole("the adapter's rank", rank, 1)
        if alpha is not None and not 0 < alpha < math.inf:
            raise UsageError(f"the adapter's alpha must be a finite number above 0, not {alpha}")
        if not 0 <= (dropout or 0) < 1:
            raise UsageError(f"the adapter's dropout must be at least 0 and below 1, not {dropout}")
        if targets is not None:
            if not targets or isinstance(targets, str):
                raise UsageError(f'the adapter\'s targets are names of modules, ["q_proj", ...], not {targets!r}')
            lora["targets"] = tuple(targets)
        if lora and self._version.format == "peft":
            raise ModelRefused(f"{self._version.ref} is an adapter already: its {' and '.join(lora)} cannot be set")
        settings = structs.replace(self._settings.lora, **lora)
        return self._with(use_adapter=use_adapter, lora=settings)

    def dtype(self, dtype: str) -> ModelBuilder:
        """Compute in "float32", "float64" or "bfloat16"; unset: float32 on CPU, bfloat16 on CUDA."""
        if dtype not in ("float32", "float64", "bfloat16"):
            raise UsageError(f'dtype must be "float32", "float64" or "bfloat16", not {dtype!r}')
        return self._with(dtype=dtype)

    def into_scoring_model(self) -> ModelBuilder:
        """With a scalar head in place of the vocabulary's, as reward and value models have: it scores only.

        A model that was stored with a scalar head keeps it, also without this call; for another one a new head is
        made, of zeros. With an adapter the head is trained whole beside it.
        """
        return self._with(scalar=True)

    def with_draft(self, draft_model_path: str, num_draft_steps: int | None = None) -> ModelBuilder:
        """Speculative decoding is not supported. Raises UsageError."""
        raise UsageError("speculative decoding (with_draft) is not supported")

    def tools(self, tools: list[str]) -> ModelBuilder:
        """Tool URIs are not supported. Raises UsageError unless the list is empty."""
        if tools:
            raise UsageError("tool URIs are not supported; tools live in the recipe's environment")
        return self

    def extra_params(self, **params: Any) -> ModelBuilder:
        """For external providers, of which there are none here. Raises UsageError unless empty."""
        if params:
            raise UsageError(f"extra_params are for external providers; {', '.join(params)} means nothing here")
        return self

    def api_key(self, api_key: str) -> ModelBuilder:
        """For external providers, of which there are none here. Raises UsageError."""
        raise UsageError("api_key is for external providers; local models need none")

    def to_python_dict(self) -> dict[str, Any]:
        """The full configuration, defaults filled in."""
        settings = self._settings
        return {
            "path": f"model_registry://{self._version.ref}",
            "tp": self.resolved_tp(),
            "kv_cache_len": settings.kv_cache_len or self._version.defaults.kv_cache_len,
            "tokens_to_generate": self.resolved_tokens_to_generate(),
            "max_seqlen": settings.max_seqlen,
            "use_adapter": settings.use_adapter,
            "lora": structs.asdict(settings.lora),
            "scalar": self.resolved_scalar(),
            "chat_template_kwargs": dict(self.resolved_template_kwargs()),
        }

    def resolved_tp(self) -> int:
        """The builder's tp, else the registry's, else 1."""
        return self._settings.tp or self._version.defaults.tp or 1

    def resolved_tokens_to_generate(self) -> int:
        """The builder's cap, else the registry's, else 2048."""
        return self._settings.tokens_to_generate or self._version.defaults.tokens_to_generate or TOKENS_TO_GENERATE

    def resolved_template_kwargs(self) -> TemplateKwargs:
        """The registry's variables for the chat template, the builder's in their place where it has the same."""
        return TemplateKwargs(self._version.defaults.chat_template_kwargs) | self._settings.template_kwargs

    def resolved_scalar(self) -> bool:
        """Whether a model spawned from it has a scalar head: asked for, or stored with one."""
        return self._settings.scalar or self._version.scalar

    @checked
    async def spawn_inference(self, name: str) -> InferenceModel:
        """Make the model live for generation and scoring. Raises MemoryRefused, ConflictError, ModelRefused."""
        from harmony_core.client.inference_model import InferenceModel
        from harmony_core.client.spawning import spawn

        return InferenceModel(await spawn(self._engine, self._version, self, name, None))

    @checked
    async def spawn_train(self, name: str, max_batch_size: int) -> TrainingModel:
        """Make the model live for training, too. `max_batch_size`: tokens in a micro-batch = longest sample.

        Its memory, gradients, optimizer state and activations included, is promised now.
        """
        from harmony_core.client.spawning import spawn
        from harmony_core.client.training_model import TrainingModel

        max_batch_size = whole("max_batch_size, a number of tokens,", max_batch_size, 2)
        if not self._version.trainable:
            raise ModelRefused(f"{self._version.ref} cannot be trained (kind {self._version.kind})")
        model = TrainingModel(await spawn(self._engine, self._version, self, name, max_batch_size))
        if (planned := current().rows) is not None and (gauge := model.row_gauge) is not None:
            planned.models.append(gauge.rows)
        return model

    @property
    def settings(self) -> BuilderSettings:
        """What was asked for."""
        return self._settings
