"""Metric loggers behind one interface."""
