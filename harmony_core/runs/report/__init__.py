"""A run as one HTML page: curves, samples, dropped samples, time, memory, configuration, errors."""
