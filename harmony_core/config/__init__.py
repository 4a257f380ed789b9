"""A recipe's configuration: defaults, YAML, environment and flags, each value with its source."""

from harmony_core.config.layers import (
    Assignment,
    Layer,
    Resolved,
    as_data,
    assignments_from_env,
    resolve,
    settle_names,
    sources_of,
    validate,
)
from harmony_core.config.schema import Parameter, Schema
from harmony_core.config.yaml_source import (
    Issue,
    Source,
    YamlDocument,
    as_yaml,
    dotted,
    load_yaml,
    load_yaml_file,
    places,
)

__all__ = [
    "Assignment",
    "Issue",
    "Layer",
    "Parameter",
    "Resolved",
    "Schema",
    "Source",
    "YamlDocument",
    "as_data",
    "as_yaml",
    "assignments_from_env",
    "dotted",
    "load_yaml",
    "load_yaml_file",
    "places",
    "resolve",
    "settle_names",
    "sources_of",
    "validate",
]
