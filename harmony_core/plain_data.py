"""The one way from a value to what JSON holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

_DEEPEST = 32


def plain(value: Any, depth: int = 0) -> Any:
    """What JSON can carry; anything else as text. Infinite and undefined numbers become text too."""
    if isinstance(value, Enum):
        return plain(value.value, depth + 1)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if depth > _DEEPEST or isinstance(value, type):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v, depth + 1) for v in value]
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name), depth + 1) for f in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):  # pydantic's
        return plain(value.model_dump(mode="json"), depth + 1)
    found = unwrapped(value)
    return str(value) if found is value else plain(found, depth + 1)


def unwrapped(value: object) -> Any:
    """The number in a scalar of numpy's or torch's; anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
