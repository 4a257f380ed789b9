"""Frames between the driver and its ranks."""
