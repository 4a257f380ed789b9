"""What JSON can hold of any value."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from harmony_core.plain_data import plain


class Odd:
    def __str__(self) -> str:
        return "odd"


class Colour(StrEnum):
    red = "r"


class Side(Enum):
    left = (1, math.inf)


@dataclass
class Pair:
    first: Any
    second: Any


class Model(BaseModel):
    path: Path = Path("x")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({1: (1, math.nan), "s": {2}}, {"1": [1, "nan"], "s": [2]}),
        (-math.inf, "-inf"),
        (Path("x"), "x"),
        (np.float32(0.5), 0.5),
        (np.array(math.nan), "nan"),
        (Odd(), "odd"),
        (Odd, str(Odd)),
        ([Colour.red, Side.left], ["r", [1, "inf"]]),
        (Pair(True, Model()), {"first": True, "second": {"path": "x"}}),
    ],
    ids=str,
)
def test_any_value_becomes_plain_data(value: Any, wanted: Any) -> None:
    found = plain(value)
    assert found == wanted and type(found) is type(wanted)
    assert json.loads(json.dumps(found, allow_nan=False)) == wanted


def test_a_list_in_itself_ends_as_text() -> None:
    nested: list[object] = []
    nested.append(nested)
    json.dumps(plain(nested))
