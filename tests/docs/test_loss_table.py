"""The documentation's table of losses is that of the code, and each row has its formula."""

from __future__ import annotations

from docs.loss_table import PAGE, PLACE, table
from harmony_core.client.losses import ROWS
from harmony_core.engine.training.losses import LOSSES


def test_the_table_is_that_of_the_code() -> None:
    found = PLACE.search(PAGE.read_text("utf-8"))
    assert found and found[0] == table(), "python tests/docs/loss_table.py"


def test_each_row_has_its_formula() -> None:
    assert ROWS.keys() == LOSSES.keys()
