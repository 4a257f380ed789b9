"""A configuration with one field of each kind."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

import pytest
from pydantic import BaseModel, Field

from harmony_core.config import Assignment, Resolved, Schema, Source, load_yaml, resolve, validate
from harmony_core.errors import ConfigError
from harmony_core.recipe import InputConfig


class Schedule(StrEnum):
    cosine = "cosine"
    linear = "linear"


class Lora(BaseModel):
    r: int = Field(16, ge=1)
    alpha: float = 32.0
    targets: list[str] = ["q", "v"]


class Item(BaseModel):
    path: str
    weight: float = 1.0


class Grpo(InputConfig):
    group: int = 8


class Dpo(InputConfig):
    beta: float = 0.1


class Config(InputConfig):
    model: str
    judge: str | None = None
    lr: float = Field(1e-5, gt=0)
    steps: int = 100
    schedule: Schedule = Schedule.cosine
    shuffle: bool = True
    seeds: list[int] = Field([0])
    weights: dict[str, float] = Field({})
    items: list[Item] = Field([])
    lora: Lora | None = Lora(alpha=1)
    algo: Grpo | Dpo = Grpo()
    mixed: int | list[str] = 1
    note: str = ""


class Configuring:
    """Layers in, configuration or issues out."""

    schema = Schema(Config.model_json_schema())

    def resolve(self, *layers: Any) -> Resolved:
        return resolve(self.schema, [_layer(layer, number) for number, layer in enumerate(layers)])

    def __call__(self, *layers: Any) -> Config:
        return validate(Config, self.resolve(*layers), self.schema)

    def issues(self, *layers: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            self(*layers)
        return caught.value.issues


def _layer(layer: Any, number: int) -> Any:
    if isinstance(layer, str) and layer.startswith("--"):
        return Assignment.parse(layer[2:], Source("flag", layer.partition("=")[0]))
    return load_yaml(layer, f"{number}.yaml") if isinstance(layer, str) else layer


@pytest.fixture
def configure() -> Configuring:
    return Configuring()


Configure = Callable[..., Config]
