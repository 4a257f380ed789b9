"""One rank: takes instructions, executes them on the shards of the spawned models, answers."""
