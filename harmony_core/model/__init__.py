"""What a model's directory holds, as the registry, the memory plan and the ranks read it.

A recipe states the kind of model that it needs by one of these classes: `Model[model_kinds.Trainable]`.
"""

from __future__ import annotations

from typing import ClassVar


class ModelKind:
    """Base of the kinds; `kind` is the name that requests for a model use."""

    kind: ClassVar[str] = "all"

    def __init__(self, kind: str | None = None) -> None:
        """The classes are the kinds: an instance, and so its argument, has no use."""


class Inferable(ModelKind):
    """Any model: it can sample and score. A bare `Model` means this kind."""


class Trainable(ModelKind):
    """A model whose weights, or an adapter on them, can be trained."""

    kind = "trainable"
