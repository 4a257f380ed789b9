"""Metrics for TensorBoard, and tables as pages beside them."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harmony_core.errors import ResourceError
from harmony_core.loggers.base import Logger, Metrics
from harmony_core.loggers.event_file import EventFile
from harmony_core.loggers.values import number_of, shown_config
from harmony_core.logging_table import Table

DIRECTORY, LINK = "TENSORBOARD_LOGGING_DIR", "TENSORBOARD_MONITORING_LINK"

_PAGE = """<!doctype html><html><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color-scheme: light dark }}
table {{ border-collapse: collapse }} td, th {{ border: 1px solid #8886; padding: .3rem .6rem; text-align: left;
vertical-align: top; white-space: pre-wrap }}</style></head><body><h1>{title}</h1>{body}</body></html>
"""


class TBMetricsLogger(Logger):
    """Writes an event file to `logging_dir/run_name`; needs no package to write, and TensorBoard to look.

    Numbers are scalars; other values and the configuration are texts. A table becomes a page of its own under
    `tables/`, listed by `tables/index.html`. Raises ResourceError when the folder cannot be written.
    """

    def __init__(self, run_name: str, logging_dir: str, monitoring_link: str | None = None) -> None:
        super().__init__()
        self.directory = Path(logging_dir) / run_name
        self._link = monitoring_link
        try:
            self._file = EventFile(self.directory)
        except OSError as error:
            raise ResourceError(f"cannot write TensorBoard events to {self.directory}: {error}") from error

    @staticmethod
    def is_available() -> bool:
        """Whether `TENSORBOARD_LOGGING_DIR` says where to write."""
        return bool(os.environ.get(DIRECTORY))

    def record(self, step: int, metrics: Metrics) -> None:
        """One event with the step's numbers, one for each text, a page for each table."""
        numbers = {name: number for name, value in metrics.items() if (number := number_of(value)) is not None}
        if numbers:
            self._file.scalars(step + 1, numbers)
        for name, value in metrics.items():
            if isinstance(value, Table):
                self._page(step + 1, name, value)
            elif name not in numbers:
                self._file.text(step + 1, name, str(value))

    def _page(self, step: int, name: str, table: Table) -> None:
        folder = self.directory / "tables"
        folder.mkdir(exist_ok=True)
        file = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-step-{step:06d}.html"
        title = html.escape(f"{name}, step {step}")
        file.write_text(_PAGE.format(title=title, body=table.to_html_table()), encoding="utf-8")
        self.create_index_page(str(folder))

    def create_index_page(self, root_dir: str, sample_files: Sequence[str] | None = None) -> None:
        """Write `root_dir/index.html` with a link to each page, or to `sample_files`."""
        root = Path(root_dir)
        names = sample_files
        if names is None:
            names = sorted(file.name for file in root.glob("*.html") if file.name != "index.html")
        links = "".join(f'<li><a href="{html.escape(name)}">{html.escape(name)}</a></li>' for name in names)
        page = _PAGE.format(title="Tables", body=f"<ul>{links}</ul>")
        (root / "index.html").write_text(page, encoding="utf-8")

    def log_config(self, config: dict[str, Any]) -> None:
        """The configuration as a text; secrets are masked."""
        lines = [f"    {name}: {value}" for name, value in shown_config(config).items()]
        self._file.text(self.step, "config", "\n".join(lines))

    @property
    def training_monitoring_link(self) -> str | None:
        """Where TensorBoard runs, as it was given."""
        return self._link

    def close(self) -> None:
        """Close the file."""
        self._file.close()
