"""A small table of samples, as loggers show it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, Self

from harmony_core.errors import UsageError

Cell = str | float | Any


class Table:
    """Named columns of equal length. Cells keep their values; `export` and `to_html_table` turn them into text."""

    def __init__(self, initial_headers: Sequence[str] = ()) -> None:
        self._columns: dict[str, list[Cell]] = {header: [] for header in initial_headers}

    @property
    def headers(self) -> list[str]:
        """The columns' names in order."""
        return list(self._columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), []))

    def add_column(self, header: str, column: Sequence[Cell]) -> Self:
        """Add a column; its length must be the table's, unless the table is empty."""
        if header in self._columns:
            raise UsageError(f"the table has a column '{header}' already")
        if self._columns and len(column) != len(self):
            raise UsageError(f"column '{header}' has {len(column)} cells, the table has {len(self)} rows")
        self._columns[header] = list(column)
        return self

    def add_row(self, row: Sequence[Cell]) -> Self:
        """Add a row with one cell for each column."""
        if len(row) != len(self._columns):
            raise UsageError(f"a row of {len(row)} cells for the {len(self._columns)} columns {self.headers}")
        for column, cell in zip(self._columns.values(), row, strict=True):
            column.append(cell)
        return self

    def add_rows(self, rows: Sequence[Sequence[Cell]]) -> Self:
        """Add several rows."""
        for row in rows:
            self.add_row(row)
        return self

    def __getitem__(self, key: str) -> list[Cell]:
        return self._columns[key]

    def __contains__(self, key: str) -> bool:
        return key in self._columns

    def rows(self) -> list[list[Cell]]:
        """The rows with their cells' values."""
        return [list(row) for row in zip(*self._columns.values(), strict=True)]

    def export(self) -> tuple[list[str], list[list[str]]]:
        """Headers and rows, every cell as text."""
        return self.headers, [[str(cell) for cell in row] for row in self.rows()]

    def as_data(self) -> dict[str, list[Any]]:
        """What JSON holds of it."""
        headers, rows = self.export()
        return {"headers": headers, "rows": rows}

    def to_html_table(self) -> str:
        """The table as HTML; every cell's text is escaped."""
        headers, rows = self.export()
        head = "".join(f"<th>{html.escape(header)}</th>" for header in headers)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _repr_html_(self) -> str:
        return self.to_html_table()
