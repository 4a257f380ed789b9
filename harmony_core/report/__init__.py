"""A run as one HTML page: curves, samples, what was dropped, time, memory, configuration, errors."""

from harmony_core.report.writing import build_report, write_report

__all__ = ["build_report", "write_report"]
