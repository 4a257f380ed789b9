"""A run as one HTML page: curves, samples, dropped samples, time, memory, configuration, errors."""

from harmony_core.runs.report.page import build_report, write_report

__all__ = ["build_report", "write_report"]
