"""What a model's directory holds, as the registry, the memory plan and the ranks read it."""
