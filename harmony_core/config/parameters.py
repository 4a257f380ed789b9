"""Models, datasets and graders in a recipe's configuration. Each is written as a plain string.

A parameter holds the name; `check` looks the name up, and `load` or `spawn_...` opens it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from typing_extensions import TypeVar

from harmony_core import data as dataset_kinds, model as model_kinds
from harmony_core.config.argument_kinds import checked
from harmony_core.data.columns import check_columns
from harmony_core.data.datasets import check_hub_name, is_hub_name, load_threads
from harmony_core.data.files import paths_of
from harmony_core.errors import HarmonyError, ModelRefused, NotFoundError, UsageError, did_you_mean
from harmony_core.external.address import Address
from harmony_core.journal import current
from harmony_core.plain_files import expanded

if TYPE_CHECKING:
    from harmony_core.client import InferenceModel, ModelBuilder, TrainingModel
    from harmony_core.recipe.context import RecipeContext
    from harmony_core.registry import ModelVersion, Registry
    from harmony_core.text.threads import StringThread

__all__ = ["Dataset", "KeyOnly", "Model", "Parameter", "dataset_kinds", "model_kinds", "shipped_data"]

ModelKindT = TypeVar("ModelKindT", bound=model_kinds.ModelKind, default=model_kinds.Inferable)
DatasetKindT = TypeVar("DatasetKindT", bound=dataset_kinds.DatasetKind, default=dataset_kinds.DatasetKind)
KindT = TypeVar("KindT")


class Parameter(BaseModel):
    """A name in a recipe's configuration: validates from a bare string or from an object; immutable and hashable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key_field: ClassVar[str]
    """The field that a bare string fills."""

    def __init__(self, name: str | os.PathLike[str] | None = None, /, **fields: Any) -> None:
        """`Dataset("rows.jsonl")` equals `rows.jsonl` in a YAML file or a flag. Raises UsageError."""
        if name is not None:
            if not isinstance(name, str | os.PathLike):
                raise UsageError(f"a {type(self).__name__} is named by a string, not by {name!r}")
            fields[self.key_field] = os.fspath(name)
        super().__init__(**fields)

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Accept a string, an object, or a parameter that was written without its kind."""
        if isinstance(data, cls):
            return data
        if isinstance(data, Parameter) and issubclass(cls, type(data)):
            return cast("Self", data._as(cls))
        if isinstance(data, str | os.PathLike):
            return handler({cls.key_field: os.fspath(data)})
        if not isinstance(data, Mapping):
            raise ValueError(f"expected a name as a string, got {type(data).__name__}")
        return handler(data)

    @classmethod
    def validate_from_json(cls, data: Any) -> Self:
        """Validate a string, an object or another parameter. Raises pydantic's ValidationError."""
        return cls.model_validate(data)

    def _as(self, cls: type[Any]) -> Any:
        """The same parameter as an instance of a subclass."""
        return cls(**{name: getattr(self, name) for name in type(self).model_fields})

    def with_base(self, directory: Path) -> Self:
        """The same parameter with a relative file, if it names one, resolved against `directory`."""
        return self

    def check(self, registry: Registry) -> Any:
        """Look the name up, without starting or loading anything. Raises an error if it cannot be used as requested."""
        raise NotImplementedError

    def __hash__(self) -> int:
        return hash(getattr(self, self.key_field))


class KeyOnly(Parameter):
    """A parameter with a key as its only field: it is serialised and described as that string."""

    schema_format: ClassVar[str]

    @model_serializer
    def serialize_model(self) -> str:
        """The bare key."""
        return str(getattr(self, self.key_field))

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        kind = {"kind": cls.kind().kind} if issubclass(cls, Model) else {}
        return {"type": "string", "format": cls.schema_format, "minLength": 1, **kind}


def _kind_of(cls: type[BaseModel], base: type[KindT]) -> type[KindT]:
    """The type argument of a generic parameter; `base` for one without an argument."""
    given = [ancestor.__dict__.get("__pydantic_generic_metadata__") or {} for ancestor in cls.__mro__]
    arguments = [argument for metadata in given for argument in metadata.get("args", ())]
    return next((kind for kind in arguments if isinstance(kind, type) and issubclass(kind, base)), base)


class Model(KeyOnly, Generic[ModelKindT]):
    """A model of the registry, or an external one, by its key. `to_builder` replays the setters called on it."""

    key_field: ClassVar[str] = "model_key"
    schema_format: ClassVar[str] = "model-key"

    model_key: str = Field(min_length=1)

    _calls: tuple[tuple[str, tuple[Any, ...], dict[str, Any]], ...] = PrivateAttr(default=())

    @classmethod
    def kind(cls) -> type[model_kinds.ModelKind]:
        """The requested kind of model: `Model[model_kinds.Trainable].kind() is model_kinds.Trainable`."""
        return _kind_of(cls, model_kinds.ModelKind)

    def _as(self, cls: type[Any]) -> Any:
        model = super()._as(cls)
        model._calls = self._calls
        return model

    def check(self, registry: Registry) -> ModelVersion | Address:
        """The version that the key refers to, or the address of an external model.

        Raises NotFoundError for an unknown key, ModelRefused if a kind that cannot be trained is to be trained,
        ResourceError if an external model's SDK or key is missing.
        """
        if (address := Address.parse(self.model_key)) is not None:
            if issubclass(self.kind(), model_kinds.Trainable):
                raise ModelRefused(f"'{address.key}' is an external model and cannot be trained")
            address.check()
            return address
        version = registry.resolve(self.model_key)
        if issubclass(self.kind(), model_kinds.Trainable) and not version.trainable:
            raise ModelRefused(
                f"'{self.model_key}' is of kind {version.kind} and cannot be trained",
                hint="`adaptive models list` shows the models that can",
            )
        return version

    def _recorded(self, name: str, *args: Any, **kwargs: Any) -> Self:
        copy = self.model_copy()
        copy._calls = (*self._calls, (name, args, kwargs))
        return copy

    def tp(self, tp: int) -> Self:
        """Tensor-parallel degree. Overrides the values of the registry and of `to_builder`."""
        return self._recorded("tp", tp)

    def with_adapter(self, use_adapter: bool = True, **settings: Any) -> Self:
        """Train a LoRA adapter (or, with False, the full weights). Settings as of the builder's method."""
        return self._recorded("with_adapter", use_adapter, **settings)

    def with_draft(self, draft_model_path: str, num_draft_steps: int | None = None) -> Self:
        """Sample with a draft model."""
        return self._recorded("with_draft", draft_model_path, num_draft_steps)

    def into_scoring_model(self) -> Self:
        """Replace the language-model head by a scalar one."""
        return self._recorded("into_scoring_model")

    def extra_params(self, **params: Any) -> Self:
        """Parameters of an external model."""
        return self._recorded("extra_params", **params)

    def tools(self, tools: list[str]) -> Self:
        """Tools by URI."""
        return self._recorded("tools", tools)

    def api_key(self, api_key: str) -> Self:
        """An external model's key, which must be the environment's."""
        return self._recorded("api_key", api_key)

    @checked
    async def to_builder(
        self,
        ctx: RecipeContext,
        kv_cache_len: int | None = None,
        tokens_to_generate: int | None = None,
        tp: int | None = None,
        extra_params: dict[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> ModelBuilder:
        """A builder with the registry's inference defaults, overridden by the arguments, then by recorded calls."""
        builder = ctx.client.model(self.model_key, kv_cache_len=kv_cache_len, tokens_to_generate=tokens_to_generate)
        if tp is not None:
            builder = builder.tp(tp)
        if extra_params:
            builder = builder.extra_params(**extra_params)
        if chat_template_kwargs:
            builder = builder.chat_template_kwargs(chat_template_kwargs)
        for name, args, kwargs in self._calls:
            builder = getattr(builder, name)(*args, **kwargs)
        return builder

    @checked
    async def spawn_inference(
        self,
        name: str,
        ctx: RecipeContext,
        kv_cache_len: int | None = None,
        tokens_to_generate: int | None = None,
        tp: int | None = None,
        extra_params: dict[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> InferenceModel:
        """Call `to_builder` and `spawn_inference`; an error gets a note with the key."""
        with self._noted("inference", name):
            settings = (kv_cache_len, tokens_to_generate, tp, extra_params, chat_template_kwargs)
            return await (await self.to_builder(ctx, *settings)).spawn_inference(name)

    @checked
    async def spawn_train(
        self,
        name: str,
        ctx: RecipeContext,
        max_batch_size: int,
        tp: int | None = None,
        extra_params: dict[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> TrainingModel:
        """Call `to_builder` and `spawn_train`; `max_batch_size` in tokens; an error gets a note with the key."""
        with self._noted("training", name):
            builder = await self.to_builder(ctx, None, None, tp, extra_params, chat_template_kwargs)
            return await builder.spawn_train(name, max_batch_size)

    @contextlib.contextmanager
    def _noted(self, purpose: str, name: str) -> Iterator[None]:
        try:
            yield
        except HarmonyError as error:
            error.add_note(f"while spawning model '{self.model_key}' for {purpose} as '{name}'")
            raise


class Dataset(Parameter, Generic[DatasetKindT]):
    """Rows of files, of the hub (`hf:owner/name`), or a dataset that comes with the package.

    A string with a suffix or a slash is a file, a directory, or with `*` several files; anything else the name of a
    shipped dataset: in a YAML file, a flag or a default. Written as an object it takes further fields,
    `{dataset_key: rows.csv, columns: {user: ask}}`.
    """

    key_field: ClassVar[str] = "dataset_key"

    dataset_key: str = Field(min_length=1)
    """The name, or the file as it was written."""
    feedback_key: str | None = None
    """Which of a row's feedback values becomes `metadata["res"]`."""
    local_file_path: str | None = None
    """The file, where it is one."""
    columns: dict[str, str | None] = Field(default_factory=dict)
    """The column of each field (`user: question`); null leaves the usual column to the metadata (`tools: null`)."""
    roles: dict[str, str] = Field(default_factory=dict)
    """The role that each further name of a role stands for (`narrator: user`)."""
    max_refused: int = Field(default=0, ge=0)
    """Bad rows that are left out with a warning; more are an error."""

    @model_validator(mode="before")
    @classmethod
    def _find_file(cls, data: Any) -> Any:
        """Treat a key that looks like a file as a file, also in a dataset that is written as an object."""
        if isinstance(data, Mapping) and isinstance(key := data.get("dataset_key"), str):
            is_file = not is_hub_name(key) and ("/" in key or Path(key).suffix != "")
            return {"local_file_path": key if is_file else None} | dict(data)
        return data

    @model_serializer(mode="wrap")
    def _documented(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Serialise the documented fields, and the other fields if they are set."""
        ours = {"columns", "roles", "max_refused"}
        return {name: value for name, value in handler(self).items() if value or name not in ours}

    @classmethod
    def kind(cls) -> type[dataset_kinds.DatasetKind]:
        """The kind of row that the recipe needs."""
        return _kind_of(cls, dataset_kinds.DatasetKind)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        # The object lists no properties here, so that it does not add six flags to the usual one.
        text = {"type": "string", "format": "dataset-key", "kind": cls.kind().kind or "all", "minLength": 1}
        return {"anyOf": [text, {"type": "object", "title": "Dataset", "description": cls.__doc__}]}

    def with_base(self, directory: Path) -> Self:
        """The same dataset with a relative file resolved against `directory`."""
        if self.local_file_path is None:
            return self
        return self.model_copy(update={"local_file_path": str(directory / expanded(self.local_file_path))})

    def path(self) -> Path:
        """The file or directory to read. Raises NotFoundError with the nearest names."""
        if self.local_file_path is not None:
            file = expanded(self.local_file_path)
            paths_of(file)
            return file
        if self.dataset_key in (shipped := shipped_data()):
            return shipped[self.dataset_key]
        hint = did_you_mean(self.dataset_key, shipped)
        raise NotFoundError(
            f"there is no dataset named '{self.dataset_key}'",
            hint=f"{hint}{'; ' if hint else ''}a file is written with its suffix or a slash",
        )

    def check(self, registry: Registry) -> Path | str:
        """The file, or the hub's name, without network access. Raises NotFoundError, UsageError, ResourceError."""
        check_columns(self.columns)
        return str(check_hub_name(self.dataset_key)[0]) if is_hub_name(self.dataset_key) else self.path()

    async def load(self, ctx: RecipeContext | None = None) -> Sequence[StringThread]:
        """Every row as a thread: a list, or for a large dataset a sequence that reads each thread on access.

        Raises NotFoundError, ResourceError, or DataError as `path:number: reason`.
        """
        source = self.dataset_key if is_hub_name(self.dataset_key) else self.path()
        settings = (self.kind().kind, self.feedback_key, self.columns, self.roles, self.max_refused)
        rows = await asyncio.to_thread(load_threads, source, *settings)
        if (planned := current().rows) is not None:
            planned.loaded.append((self.dataset_key, rows))
        return rows


def shipped_data() -> dict[str, Path]:
    """The datasets that come with the package, by name."""
    return shipped_files("data/*.jsonl")


def shipped_files(pattern: str) -> dict[str, Path]:
    """Files that come with the package's recipes, by name; the package is found without importing it."""
    spec = importlib.util.find_spec("harmony_core.recipes")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return {file.stem: file for folder in folders for file in sorted(Path(folder).glob(pattern))}
