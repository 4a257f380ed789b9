"""Kinds of models."""

from harmony_core.model import Inferable as Inferable, ModelKind as ModelKind, Trainable as Trainable
