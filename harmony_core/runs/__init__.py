"""A run's directory: its record, checkpoints, signals, result and report."""
