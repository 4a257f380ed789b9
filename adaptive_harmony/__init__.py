"""The documented import paths of the recipe API. Every name comes from `harmony_core`."""

from adaptive_harmony import parameters, runtime
from harmony_core.algorithms.training import (
    CombinedSchedule,
    CosineScheduler,
    CosineSchedulerWithoutWarmup,
    Scheduler,
)
from harmony_core.client import HarmonyClient, InferenceModel, ModelBuilder, Timings, TrainingModel, get_client
from harmony_core.data.datasets import DataSet
from harmony_core.errors import HarmonyError
from harmony_core.graders import Grade
from harmony_core.graders.evaluation import EvalSample, EvalSampleInteraction
from harmony_core.loggers import Logger, WandbLogger
from harmony_core.notifiers import JobNotifier, StageNotifier, StdoutJobNotifier, StdoutStageNotifier
from harmony_core.text.threads import StringThread, StringTurn, TokenizedThread, TokenizedTurn

__all__ = [
    "CombinedSchedule",
    "CosineScheduler",
    "CosineSchedulerWithoutWarmup",
    "DataSet",
    "EvalSample",
    "EvalSampleInteraction",
    "Grade",
    "HarmonyClient",
    "HarmonyError",
    "InferenceModel",
    "JobNotifier",
    "Logger",
    "ModelBuilder",
    "Scheduler",
    "StageNotifier",
    "StdoutJobNotifier",
    "StdoutStageNotifier",
    "StringThread",
    "StringTurn",
    "Timings",
    "TokenizedThread",
    "TokenizedTurn",
    "TrainingModel",
    "WandbLogger",
    "get_client",
    "parameters",
    "runtime",
]
