"""What a recipe holds: handles of models that live on the ranks. No tensors here."""

from harmony_core.client.builder import ModelBuilder
from harmony_core.client.engine import EngineOptions
from harmony_core.client.harmony_client import HarmonyClient, get_client
from harmony_core.client.inference_model import InferenceModel, Timings
from harmony_core.client.live import DryRunEnded
from harmony_core.client.training_model import TrainingModel

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
