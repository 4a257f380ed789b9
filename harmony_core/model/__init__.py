"""What a model's directory holds, as the registry, the memory plan and the ranks read it.

The classes here name what a recipe needs of a model, as a type argument: `Model[model_kinds.Trainable]`.
"""

from __future__ import annotations

from typing import ClassVar


class ModelKind:
    """Base of the kinds; `kind` is the name by which a model is asked for it."""

    kind: ClassVar[str] = "all"


class Inferable(ModelKind):
    """Any model: it can be sampled from and scored with. What a bare `Model` means."""


class Trainable(ModelKind):
    """A model whose weights, or an adapter on them, can be trained."""

    kind = "trainable"
