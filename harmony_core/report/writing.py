"""From a run's directory to its page: one file that needs no network. Knows nothing of how a run is carried out."""

from __future__ import annotations

import os
from pathlib import Path

from harmony_core.redaction import Redactor
from harmony_core.report.page import render
from harmony_core.report.reading import read_run

FILE = "report.html"


def build_report(directory: Path, redactor: Redactor | None = None, status: str | None = None) -> str:
    """The page of the run in `directory`. `status` says more than the record where a run has crashed."""
    redactor = redactor or Redactor.from_environment(os.environ)
    return render(read_run(directory, redactor, status), redactor.text)


def write_report(
    directory: Path, output: Path | None = None, redactor: Redactor | None = None, status: str | None = None
) -> Path:
    """Write the page to `output`, or to `report.html` beside the run's other files. Raises OSError."""
    target = output or directory / FILE
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(build_report(directory, redactor, status), encoding="utf-8")
    os.replace(temporary, target)
    return target
