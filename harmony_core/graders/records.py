"""Graders as plain records, a format of its own: those of the platform, and what a judge's YAML file holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import NAMESPACE_URL, UUID, uuid5

from pydantic import BaseModel, ConfigDict, Field

from harmony_core.config.layers import resolve, validate
from harmony_core.config.parameters import Model
from harmony_core.config.schema import Schema
from harmony_core.config.yaml_source import load_yaml_file, raise_if_any
from harmony_core.errors import UsageError, did_you_mean
from harmony_core.graders.base import BaseGrader
from harmony_core.model import Inferable
from harmony_core.text.threads import StringThread

if TYPE_CHECKING:
    from harmony_core.client import InferenceModel
    from harmony_core.recipe.context import RecipeContext

Limits = tuple[int | None, int | None, int | None]
"""tp, kv_cache_len and max_tokens of a judge's model."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())


class JudgeTurn(_Record):
    """A turn of an example."""

    role: str
    content: str
    metadata: dict[str, Any] | None = None


class JudgeExample(_Record):
    """A judged conversation: `input` are the turns before the answer, `output` is the answer."""

    id: str = ""
    input: list[JudgeTurn] = Field(min_length=1)
    reasoning: str | None = None
    output: str
    passes: bool = Field(alias="pass")

    def thread(self) -> StringThread:
        """The conversation with its answer."""
        return StringThread([*((turn.role, turn.content) for turn in self.input), ("assistant", self.output)])


class _OfModel(_Record):
    model_uri: str = ""
    model_key: str = Field(min_length=1)


class CustomJudge(_OfModel):
    """A judge by templates. Without `user_template` it is a `BinaryJudgeGrader` of the criteria."""

    type: Literal["Judge"] = "Judge"
    criteria: str = ""
    examples: list[JudgeExample] = []
    system_template: str | None = None
    user_template: str | None = None


class RangeJudge(_OfModel):
    """A `RangeJudgeGrader`: whole numbers of `score_range`, lowest and highest included."""

    type: Literal["Range"] = "Range"
    criteria: str = Field(min_length=1)
    score_range: tuple[int, int] = (1, 5)
    evaluation_steps: list[str] | None = None
    normalize_score: bool = True


class PrebuiltJudge(_OfModel):
    """One of the judges that come with the package."""

    type: Literal["Prebuilt"] = "Prebuilt"
    prebuilt_config_key: Literal["AnswerRelevancy", "ContextRelevancy", "Faithfulness"]


class RemoteRewardEndpoint(_Record):
    """A reward server."""

    type: Literal["Remote"] = "Remote"
    url: str
    version: str = ""
    description: str = ""


class CustomGrader(_Record):
    """A grader that only a recipe can build."""

    type: Literal["Custom"] = "Custom"
    description: str | None = None


class FunctionConfig(_Record):
    """Python text that defines `grade(thread)`."""

    type: Literal["Function"] = "Function"
    source_code: str | None = None
    description: str | None = None


Config = CustomJudge | RangeJudge | PrebuiltJudge | RemoteRewardEndpoint | CustomGrader | FunctionConfig
KINDS: dict[str, type[BaseModel]] = {
    "Judge": CustomJudge,
    "Range": RangeJudge,
    "Prebuilt": PrebuiltJudge,
    "Remote": RemoteRewardEndpoint,
    "Custom": CustomGrader,
    "Function": FunctionConfig,
}


class AdaptiveGrader(_Record):
    """A grader by its key. The identifiers follow from the key unless they are given."""

    key: str
    name: str = ""
    grader_id: UUID = Field(default_factory=lambda given: uuid5(NAMESPACE_URL, f"grader:{given['key']}"))
    metric_id: UUID = Field(default_factory=lambda given: uuid5(NAMESPACE_URL, f"metric:{given['key']}"))
    config: Annotated[Config, Field(discriminator="type")]


def read_config(file: Path) -> Config:
    """The record in a YAML file. Raises ConfigError with every problem and its place."""
    document = load_yaml_file(file)
    data = document.data if isinstance(document.data, Mapping) else {}
    kind = str(data.get("type"))
    if kind not in KINDS:
        raise_if_any(document.issues)
        raise UsageError(f"{file}: type is {kind!r}, not a kind of grader", hint=did_you_mean(kind, KINDS))
    cls = KINDS[kind]
    schema = Schema(cls.model_json_schema())
    return validate(cls, resolve(schema, [document]), schema, only=str(file))  # type: ignore[return-value]


async def get_model(
    ctx: RecipeContext,
    grader_key: str,
    model_key: str,
    kv_cache_len: int | None,
    max_tokens: int | None,
    tp: int | None,
) -> InferenceModel:
    """The judge's model, spawned for inference with the given limits, in tokens."""
    return await Model[Inferable](model_key=model_key).spawn_inference(grader_key, ctx, kv_cache_len, max_tokens, tp)


async def _model(ctx: RecipeContext, key: str, record: _OfModel, limits: Limits) -> InferenceModel:
    tp, kv_cache_len, max_tokens = limits
    return await get_model(ctx, key, record.model_key, kv_cache_len, max_tokens, tp)


async def grader_of(
    record: AdaptiveGrader, ctx: RecipeContext, tp: int | None, kv_cache_len: int | None, max_tokens: int | None
) -> BaseGrader[Any]:
    """See `BaseGrader.from_config`."""
    key, identifier, config = record.key, str(record.grader_id), record.config
    limits = tp, kv_cache_len, max_tokens
    if isinstance(config, CustomJudge):
        return await templated_judge(key, identifier, config, ctx, limits)
    if isinstance(config, PrebuiltJudge):
        return await prebuilt_judge(key, identifier, config, ctx, limits)
    if isinstance(config, RangeJudge):
        from harmony_core.graders import RangeJudgeGrader

        settings = config.model_dump(exclude={"type", "model_uri", "model_key"})
        return RangeJudgeGrader(key, await _model(ctx, key, config, limits), **settings)
    if isinstance(config, RemoteRewardEndpoint):
        return BaseGrader.from_remote_reward_endpoint(key, identifier, config)
    if isinstance(config, CustomGrader) or not config.source_code:
        raise ValueError(f"grader {key!r} is of type {config.type} without source: only a recipe can build it")
    return BaseGrader.from_source_code(key, config.source_code)


async def templated_judge(
    key: str, identifier: str, config: CustomJudge, ctx: RecipeContext, limits: Limits
) -> BaseGrader[Any]:
    """See `BaseGrader.from_templated_judge`."""
    from harmony_core.graders import BinaryJudgeGrader, BinaryJudgeOutput, BinaryJudgeShot, TemplatedPromptJudgeGrader

    model = await _model(ctx, key, config, limits)
    verdicts: list[tuple[JudgeExample, Literal["PASS", "FAIL"]]]
    verdicts = [(example, "PASS" if example.passes else "FAIL") for example in config.examples]
    if config.user_template is None:
        shots = [BinaryJudgeShot(e.thread(), e.reasoning, verdict) for e, verdict in verdicts] or None
        return BinaryJudgeGrader(key, model, config.criteria, shots, grader_id=identifier)
    examples = [
        {
            "context_str": "\n\n".join(f"{turn.role}:\n{turn.content}" for turn in example.input[:-1]),
            "user_question": example.input[-1].content,
            "completion": example.output,
            "output_json": json.dumps({"reasoning": example.reasoning or "", "score": verdict}),
        }
        for example, verdict in verdicts
    ]
    variables = {"criteria": config.criteria, "examples": examples}
    templates = config.system_template, config.user_template
    return TemplatedPromptJudgeGrader(key, model, *templates, BinaryJudgeOutput, variables, grader_id=identifier)


async def prebuilt_judge(
    key: str, identifier: str, config: PrebuiltJudge, ctx: RecipeContext, limits: Limits
) -> BaseGrader[Any]:
    """See `BaseGrader.from_prebuilt_judge`."""
    from harmony_core.graders import AnswerRelevancyGrader, ContextRelevancyGrader, FaithfulnessGrader

    kinds: dict[str, Any] = {
        "AnswerRelevancy": AnswerRelevancyGrader,
        "ContextRelevancy": ContextRelevancyGrader,
        "Faithfulness": FaithfulnessGrader,
    }
    model = await _model(ctx, key, config, limits)
    made: BaseGrader[Any] = kinds[config.prebuilt_config_key](model, grader_key=key, grader_id=identifier)
    return made
