"""The messages between the driver and its ranks, and their bytes."""
