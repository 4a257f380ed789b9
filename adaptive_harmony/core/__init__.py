"""Schedulers, datasets and helpers."""
