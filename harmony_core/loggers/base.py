"""The interface of metric loggers, tables of samples, and metrics as JSON holds them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeAlias

from harmony_core.errors import UsageError
from harmony_core.journal import current
from harmony_core.plain_files import plain, unwrapped

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
        """Add a column. Its length must equal the table's, unless the table is empty."""
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
        """Headers and rows, as JSON holds them."""
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


Metrics: TypeAlias = Mapping[str, "str | int | float | Table"]


class Logger:
    """Each call records the metrics of one step. The step number is the logger's own count and survives a resume.

    Subclasses implement `record`, or `__call__`; the latter must count the steps itself if it needs them.
    """

    step: int = 0
    writes_events: bool = False
    """Whether metrics become events of a run, from which its report is made."""

    failed = False
    """Whether the run has failed. Set before `close`."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self, metrics: Metrics) -> None:
        """Record one step's metrics."""
        self.record(self.step, metrics)
        self.step += 1

    def record(self, step: int, metrics: Metrics) -> None:
        """Write the metrics of step number `step`."""
        raise NotImplementedError(f"{type(self).__name__} has neither record(step, metrics) nor __call__(metrics)")

    def log_config(self, config: dict[str, Any]) -> None:
        """Record the configuration of the run."""

    @staticmethod
    def is_available() -> bool:
        """Whether the logger can be used in this environment."""
        return True

    def get_state(self) -> dict[str, Any]:
        """The state to pass to `set_state` on resume."""
        return {"step": self.step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from `get_state`."""
        self.step = int(state["step"])

    @property
    def training_monitoring_link(self) -> str | None:
        """The address at which the metrics can be watched."""
        return None

    def close(self) -> None:
        """Write buffered metrics and end."""


def masked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics or a configuration as JSON holds them, with secrets masked and tables as headers and rows."""
    found = {name: value.as_data() if isinstance(value, Table) else plain(value) for name, value in values.items()}
    shown = current().mask.data(found)
    assert isinstance(shown, dict)
    return shown


def number_of(value: object) -> float | None:
    """A number, including numpy's and torch's scalars; None for anything else."""
    found = unwrapped(value)
    return float(found) if isinstance(found, int | float) else None
