"""The session, and the builders of its models; each setter of a builder returns a new builder."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from harmony_core.client.engine import Engine, EventSink
from harmony_core.client.handle import NO_TOOL_URIS, TOOLS_INSTEAD
from harmony_core.client.progress import SpawnsWithProgress
from harmony_core.client.storage import SCHEME
from harmony_core.config.argument_kinds import checked, whole
from harmony_core.errors import HarmonyError, ModelRefused, NotFoundError, UsageError
from harmony_core.external.address import Address
from harmony_core.home import Home
from harmony_core.journal import current
from harmony_core.launch.processes import private_directory
from harmony_core.model.spec import check_tp
from harmony_core.options import EngineOptions
from harmony_core.plain_files import read_json
from harmony_core.recipe_file import RecipeFile
from harmony_core.registry import Registry
from harmony_core.rpc.protocol import LoraSettings, Spawn
from harmony_core.text.turns import TemplateKwargs

if TYPE_CHECKING:
    from harmony_core.client.engine import Engine
    from harmony_core.client.inference_model import InferenceModel
    from harmony_core.client.live import LiveModel
    from harmony_core.client.training_model import TrainingModel
    from harmony_core.registry import ModelVersion

TOKENS_TO_GENERATE = 2048
"""Default for the most new tokens of a request, used if neither the recipe nor the registry sets it."""


PREFILL_TOKENS = 8192
"""The most tokens that an inference model takes in one pass."""


class ModelBuilder(SpawnsWithProgress):
    """Fluent configuration of one model; every setter returns a new builder."""

    def __init__(self, engine: Engine, version: ModelVersion, asked: Spawn, variables: TemplateKwargs) -> None:
        self._engine = engine
        self._version = version
        self._asked = asked
        self._variables = variables

    @classmethod
    def of(cls, engine: Engine, version: ModelVersion) -> ModelBuilder:
        """A builder with the defaults of the registry and of the engine."""
        from harmony_core.client.spawning import source_of

        defaults, cpu = version.defaults, engine.launch.device == "cpu"
        asked = Spawn(
            spec=version.spec,
            ref=version.ref,
            source=source_of(version),
            device=engine.launch.device,
            dtype="float32" if cpu else "bfloat16",
            tp=defaults.tp or 1,
            scalar=version.scalar,
            max_batch_tokens=min(PREFILL_TOKENS, version.spec.max_positions),
            kv_cache_len=defaults.kv_cache_len,
            tokens_to_generate=defaults.tokens_to_generate or TOKENS_TO_GENERATE,
            compile=engine.compiles,
            rehearse=engine.options.rehearse or not cpu,
        )
        return cls(engine, version, asked, TemplateKwargs())

    def __repr__(self) -> str:
        return f"ModelBuilder({self.to_python_dict()})"

    def _with(self, **changes: Any) -> ModelBuilder:
        return ModelBuilder(self._engine, self._version, structs.replace(self._asked, **changes), self._variables)

    def tp(self, tp: int) -> ModelBuilder:
        """Tensor-parallel degree: devices per replica. Raises ModelRefused with the values that work."""
        check_tp(self._version.spec, whole("tp", tp, 1), self._engine.world_size)
        return self._with(tp=tp)

    def kv_cache_len(self, tokens: int) -> ModelBuilder:
        """Tokens in each replica's KV pool, guaranteed if set. Unset: as many as fit, up to 131,072."""
        return self._with(kv_cache_len=whole("kv_cache_len", tokens, 1))

    def tokens_to_generate(self, tokens: int) -> ModelBuilder:
        """The most new tokens of one request."""
        return self._with(tokens_to_generate=whole("tokens_to_generate", tokens, 1))

    def chat_template_kwargs(self, kwargs: Mapping[str, Any]) -> ModelBuilder:
        """Variables for the chat template, such as {"enable_thinking": False}. A thread's own override these.

        These override the registry's. Raises DataError for a value that is not JSON; the spawn raises UsageError for a
        name that the template does not read.
        """
        return ModelBuilder(self._engine, self._version, self._asked, self._variables | kwargs)

    def max_seqlen(self, max_seqlen: int) -> ModelBuilder:
        """Longest sequence, prompt and completion together. Unset: the model's context."""
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
        """Train a LoRA adapter instead of the full weights. This has no effect on a stored adapter.

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
        if self._version.format == "peft":
            return self
        return self._with(lora=structs.replace(self._asked.lora or LoraSettings(), **lora) if use_adapter else None)

    def dtype(self, dtype: str) -> ModelBuilder:
        """Compute in "float32", "float64" or "bfloat16"; unset: float32 on CPU, bfloat16 on CUDA."""
        if dtype not in ("float32", "float64", "bfloat16"):
            raise UsageError(f'dtype must be "float32", "float64" or "bfloat16", not {dtype!r}')
        return self._with(dtype=dtype)

    def into_scoring_model(self) -> ModelBuilder:
        """Replace the vocabulary head by a scalar head, as reward and value models have. The model then only scores.

        A model that was stored with a scalar head keeps it without this call; any other gets a new head, filled with
        zeros. With an adapter, the head is trained in full beside it.
        """
        return self._with(scalar=True)

    def with_draft(self, draft_model_path: str, num_draft_steps: int | None = None) -> ModelBuilder:
        """Speculative decoding is not supported. Raises UsageError."""
        raise UsageError("speculative decoding (with_draft) is not supported", hint="leave with_draft out")

    def tools(self, tools: list[str]) -> ModelBuilder:
        """Tool URIs are not supported. Raises UsageError unless the list is empty."""
        if tools:
            raise UsageError(NO_TOOL_URIS, hint=TOOLS_INSTEAD)
        return self

    def extra_params(self, **params: Any) -> ModelBuilder:
        """For external models. Raises UsageError unless empty."""
        if params:
            raise UsageError(f"extra_params are for external models; {', '.join(params)} means nothing here")
        return self

    def api_key(self, api_key: str) -> ModelBuilder:
        """For external models. Raises UsageError."""
        raise UsageError("api_key is for external models; local models need none")

    def to_python_dict(self) -> dict[str, Any]:
        """The full configuration, with defaults filled in."""
        asked = self._asked
        return {
            "path": f"model_registry://{asked.ref}",
            "tp": asked.tp,
            "kv_cache_len": asked.kv_cache_len,
            "tokens_to_generate": asked.tokens_to_generate,
            "max_seqlen": asked.max_seqlen,
            "use_adapter": asked.lora is not None or bool(asked.source.adapter),
            "lora": structs.asdict(asked.lora or LoraSettings()),
            "scalar": asked.scalar,
            "chat_template_kwargs": dict(self._template_kwargs),
        }

    @property
    def _template_kwargs(self) -> TemplateKwargs:
        """The registry's variables for the chat template, overridden by the builder's."""
        return TemplateKwargs(self._version.defaults.chat_template_kwargs) | self._variables

    @checked
    async def spawn_inference(self, name: str) -> InferenceModel:
        """Make the model live for generation and scoring. Raises MemoryRefused, ConflictError, ModelRefused."""
        from harmony_core.client.inference_model import InferenceModel

        return InferenceModel(await self._live(name=name))

    @checked
    async def spawn_train(self, name: str, max_batch_size: int) -> TrainingModel:
        """Make the model live for training, too. `max_batch_size`: tokens in a micro-batch, so the longest sample.

        Memory for it, including gradients, optimizer state and activations, is promised now.
        """
        from harmony_core.client.training_model import TrainingModel

        max_batch_size = whole("max_batch_size, a number of tokens,", max_batch_size, 2)
        if not self._version.trainable:
            raise ModelRefused(f"{self._version.ref} cannot be trained (kind {self._version.kind})")
        model = TrainingModel(await self._live(name=name, train=True, max_batch_tokens=max_batch_size))
        if (planned := current().rows) is not None and (gauge := model.row_gauge) is not None:
            planned.models.append(gauge.rows)
        return model

    async def _live(self, **changes: Any) -> LiveModel:
        from harmony_core.client.spawning import spawn

        asked = structs.replace(self._asked, **changes)
        lora = _stored_lora(self._version) if asked.source.adapter else asked.lora
        kv_cache_len = 0 if asked.scalar else asked.kv_cache_len  # without generation no pages are needed
        private = asked.train and lora is None
        asked = structs.replace(asked, lora=lora, private=private, kv_cache_len=kv_cache_len)
        return await spawn(self._engine, self._version, asked, self._template_kwargs)


def _stored_lora(version: ModelVersion) -> LoraSettings:
    """The settings of a stored adapter that its memory depends on."""
    config = read_json(version.path / "adapter_config.json")
    targets = config["target_modules"]
    # A pattern may match any of the modules that an adapter can have.
    lora = LoraSettings(rank=config["r"], dropout=float(config.get("lora_dropout") or 0.0))
    return lora if isinstance(targets, str) else structs.replace(lora, targets=tuple(targets))


class HarmonyClient:
    """One session with one group of ranks. `RecipeContext.client` and `get_client()` return it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._session_id = str(uuid.uuid4())

    @classmethod
    def start(cls, options: EngineOptions, registry: Registry, events: EventSink) -> HarmonyClient:
        """Begin to start the ranks in the background and return at once. Needs a running event loop.

        Raises ResourceError or ConfigError if the machine cannot satisfy `options`.
        """
        engine = Engine(options, registry, events)
        engine.start()
        return cls(engine)

    @checked
    def model(self, path: str, kv_cache_len: int | None = None, tokens_to_generate: int | None = None) -> ModelBuilder:
        """A builder for a key of the registry, or an external one (without `kv_cache_len`). Raises NotFoundError."""
        address = Address.parse(path)
        if address is not None:
            from harmony_core.client.external_model import ExternalBuilder

            builder: ModelBuilder = ExternalBuilder(self._engine, address)
        else:
            builder = ModelBuilder.of(self._engine, self._engine.registry.resolve(path.removeprefix(SCHEME)))
        if kv_cache_len is not None and address is None:
            builder = builder.kv_cache_len(kv_cache_len)
        if tokens_to_generate is not None:
            builder = builder.tokens_to_generate(tokens_to_generate)
        return builder

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._engine.world_size

    @property
    def device(self) -> str:
        """Where the ranks run: "cpu" or "cuda"."""
        return self._engine.launch.device

    @property
    def planned(self) -> list[dict[str, Any]]:
        """Every spawn so far with its limits and bytes, as plain data."""
        return list(self._engine.planned)

    @property
    def unsaved(self) -> bool:
        """Whether any model has, or had, trained weights that are not saved in the registry."""
        return bool(self._engine.unsaved)

    def memory(self) -> dict[str, Any]:
        """The promised and the free memory, in bytes per rank."""
        return self._engine.ledger.snapshot()

    def session_id(self) -> str:
        """A unique id of this session."""
        return self._session_id

    @property
    def in_use(self) -> bool:
        """Whether a model is live or being made, so that the recipe needs the ranks."""
        return bool(self._engine.spawns) and not self._engine.closed

    async def wait_failed(self) -> HarmonyError:
        """Wait until the engine fails, and return the failure."""
        return await self._engine.wait_failed()

    def close(self) -> None:
        """Begin to stop the ranks; `aclose` also waits until they are gone."""
        with contextlib.suppress(RuntimeError):
            task = asyncio.get_running_loop().create_task(self.aclose(), name="close-client")
            self._closing = task

    async def aclose(self, grace: float = 10.0) -> None:
        """Stop the ranks; on return all of their processes are gone. Calling it again does nothing."""
        await self._engine.close(grace)

    def __enter__(self) -> HarmonyClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> HarmonyClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


@checked
async def get_client(
    addr: str | None = None,
    num_gpus: int | None = None,
    api_key: str | None = None,
    project: str | None = None,
    compute_pool: str | None = None,
    job_id: str | None = None,
    default_headers: dict[str, str] | None = None,
    ttl_after_disconnect_s: int | None = 30,
    name: str | None = None,
    *,
    deterministic: bool = False,
    recipe: str | os.PathLike[str] | None = None,
    hang_timeout: float = 600.0,
    silence_timeout: float = 120.0,
    save_wait: float | None = None,
) -> HarmonyClient:
    """A local engine with its own ranks, for notebooks and scripts: the client that a recipe has as `ctx.client`.

    `num_gpus` is the number of ranks (default: every visible CUDA device, else 1). With `deterministic` sampled and
    trained log-probs are equal bit for bit (CPU only; raises ResourceError elsewhere). `recipe`: the Python file with
    the loss functions for `train_custom`; raises NotFoundError if it does not exist. The other arguments are for a
    remote service and are accepted for compatibility; an address only produces a line that says the engine runs here.

    In seconds: a rank fails if it makes no progress for `hang_timeout` (0: no limit) or gives no sign of life for
    `silence_timeout`; every call then raises that failure. A save that finds the disk full is retried for `save_wait`
    (unset: ten minutes; no retry where CI is set). Raises UsageError for times out of bounds.

    The ranks are stopped by `close`, or once nothing refers to the client, its builders and its models any more.
    """
    from harmony_core.notifiers import say

    if recipe is not None and not Path(recipe).is_file():
        raise NotFoundError(f"there is no file {recipe}", hint="give the file in which the losses are")

    if addr:
        say(f"{addr}: there is no remote service; the engine runs on this machine")
    home = Home.open()
    run_id = job_id or f"session-{uuid.uuid4().hex[:12]}"
    options = EngineOptions(
        log_dir=Path(),
        temporary_logs=True,
        run_id=run_id,
        num_processes=num_gpus or None,
        deterministic=deterministic,
        recipe=None if recipe is None else RecipeFile.of(Path(recipe)),
        hang_timeout=hang_timeout,
        silence_timeout=silence_timeout,
        save_wait=save_wait,
    )
    options = replace(options, log_dir=private_directory.create())
    return HarmonyClient.start(options, Registry(home), lambda kind, data, rank: None)
