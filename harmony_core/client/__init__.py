"""Builders and handles of models that live on the ranks, and the order of all requests. No tensors."""

from harmony_core.client.inference_model import InferenceModel, Timings
from harmony_core.client.live import DryRunEnded
from harmony_core.client.session import HarmonyClient, ModelBuilder, get_client
from harmony_core.client.training_model import TrainingModel
from harmony_core.options import EngineOptions

__all__ = [
    "DryRunEnded",
    "EngineOptions",
    "HarmonyClient",
    "InferenceModel",
    "ModelBuilder",
    "Timings",
    "TrainingModel",
    "get_client",
]
