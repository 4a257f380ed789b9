"""Configuration: defaults, YAML files, environment and flags, merged with their sources kept."""
