"""Client, models, threads and records."""

from harmony_core.client import (
    HarmonyClient as HarmonyClient,
    InferenceModel as InferenceModel,
    ModelBuilder as ModelBuilder,
    Timings as Timings,
    TrainingModel as TrainingModel,
    get_client as get_client,
)
from harmony_core.client.handle import SerializedThread as SerializedThread
from harmony_core.errors import HarmonyError as HarmonyError
from harmony_core.graders import Grade as Grade
from harmony_core.graders.evaluation import (
    EvalSample as EvalSample,
    EvalSampleInteraction as EvalSampleInteraction,
    EvaluationArtifactBase as EvaluationArtifactBase,
)
from harmony_core.recipe.platform import (
    DEFAULT_MAX_DRAFT_STEPS as DEFAULT_MAX_DRAFT_STEPS,
    ControlPlaneClient as ControlPlaneClient,
    DatasetConfigResponse as DatasetConfigResponse,
    InferenceSettings as InferenceSettings,
    ModelConfigResponse as ModelConfigResponse,
    StatDuration as StatDuration,
    StatInstant as StatInstant,
    Thread as Thread,
    utils as utils,
)
from harmony_core.text.fragments import (
    FunctionCallFragment as FunctionCallFragment,
    ImageFragment as ImageFragment,
    ReasoningFragment as ReasoningFragment,
    TextFragment as TextFragment,
)
from harmony_core.text.threads import (
    StringThread as StringThread,
    StringTurn as StringTurn,
    TokenizedThread as TokenizedThread,
    TokenizedTurn as TokenizedTurn,
)
from harmony_core.text.tool_calls import Tool as Tool
from harmony_core.text.turns import Fragment as Fragment
