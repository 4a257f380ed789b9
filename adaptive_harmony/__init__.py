"""The documented import path of the recipe API. Nothing is defined here: every name comes from `harmony_core`."""

from adaptive_harmony import parameters, runtime
from harmony_core.client import HarmonyClient, InferenceModel, ModelBuilder, Timings, TrainingModel, get_client
from harmony_core.datasets import DataSet
from harmony_core.errors import HarmonyError
from harmony_core.graders import Grade
from harmony_core.loggers import Logger, WandbLogger
from harmony_core.notifiers import JobNotifier, StageNotifier, StdoutJobNotifier, StdoutStageNotifier
from harmony_core.schedulers import CombinedSchedule, CosineScheduler, CosineSchedulerWithoutWarmup, Scheduler
from harmony_core.threads import StringThread, StringTurn, TokenizedThread, TokenizedTurn

__all__ = [
    "CombinedSchedule",
    "CosineScheduler",
    "CosineSchedulerWithoutWarmup",
    "DataSet",
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
