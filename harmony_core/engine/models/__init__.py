"""Model modules on a device: loading, tensor parallelism, adapters, attention, the log-prob head."""
