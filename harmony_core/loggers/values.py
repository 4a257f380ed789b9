"""What a metric's value looks like where only numbers, only JSON or only text can be kept."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from harmony_core.logging_table import Table
from harmony_core.redaction import Redactor


def plain(value: object) -> Any:
    """The value as JSON holds it; numbers that JSON has no name for become text."""
    if isinstance(value, Table):
        headers, rows = value.export()
        return {"headers": headers, "rows": rows}
    if value is None or isinstance(value, bool | int | str):
        return value
    number = number_of(value)
    if number is not None:
        return number if math.isfinite(number) else str(number)
    return repr(value)


def number_of(value: object) -> float | None:
    """A number, numpy's and torch's scalars included; None for anything else."""
    if isinstance(value, int | float):
        return float(value)
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0:
        found = item()
        return float(found) if isinstance(found, int | float) else None
    return None


def shown_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as it may leave the machine: plain values, secrets masked."""
    redactor = Redactor.from_environment(os.environ)
    shown = redactor.data({name: plain(value) for name, value in config.items()})
    assert isinstance(shown, dict)
    return shown
