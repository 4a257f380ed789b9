"""Datasets: the shapes in which people keep conversations, read and checked."""
