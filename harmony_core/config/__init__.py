"""A recipe's configuration: defaults, YAML, environment and flags, each value with its source."""

from harmony_core.config.layers import Assignment, Layer, Resolved, assignments_from_env, resolve, sources_of
from harmony_core.config.problems import Issue, Source, dotted, places
from harmony_core.config.schema import Parameter, Schema
from harmony_core.config.validation import as_data, settle_names, validate
from harmony_core.config.yaml_source import YamlDocument, as_yaml, load_yaml, load_yaml_file

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
