"""The documented import paths of the recipe API. Every name comes from `harmony_core`."""

from adaptive_harmony import parameters as parameters, runtime as runtime
from harmony_client.harmony_client import *
from harmony_core.algorithms.training import (
    CombinedSchedule as CombinedSchedule,
    CosineScheduler as CosineScheduler,
    CosineSchedulerWithoutWarmup as CosineSchedulerWithoutWarmup,
    Scheduler as Scheduler,
)
from harmony_core.artifacts import (
    CustomArtifact as CustomArtifact,
    DatasetArtifact as DatasetArtifact,
    EvaluationArtifact as EvaluationArtifact,
    save_with_artifact as save_with_artifact,
)
from harmony_core.data.datasets import DataSet as DataSet
from harmony_core.loggers import Logger as Logger, WandbLogger as WandbLogger
from harmony_core.notifiers import (
    JobNotifier as JobNotifier,
    StageNotifier as StageNotifier,
    StdoutJobNotifier as StdoutJobNotifier,
    StdoutStageNotifier as StdoutStageNotifier,
)
from harmony_core.recipe.platform import spawn_inference as spawn_inference, spawn_train as spawn_train
from harmony_core.structured_output import (
    generate_and_validate as generate_and_validate,
    get_pydantic_schema as get_pydantic_schema,
    pydantic_parse as pydantic_parse,
    render_pydantic_model as render_pydantic_model,
    render_schema as render_schema,
)
from harmony_core.text.image_utils import string_thread_to_html_string as string_thread_to_html_string
