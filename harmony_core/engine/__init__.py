"""One engine process: hosts the shard of every spawned model."""
