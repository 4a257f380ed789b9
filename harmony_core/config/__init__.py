"""A recipe's configuration: defaults, YAML, environment and flags, merged and checked, each value with its source."""

from harmony_core.config.layers import Assignment, FileLayer, Layer, Resolved, assignments_from_env, resolve
from harmony_core.config.problems import Issue, Source
from harmony_core.config.schema import Parameter, Schema
from harmony_core.config.validation import validate
from harmony_core.config.yaml_source import YamlDocument, load_yaml, load_yaml_file

__all__ = [
    "Assignment",
    "FileLayer",
    "Issue",
    "Layer",
    "Parameter",
    "Resolved",
    "Schema",
    "Source",
    "YamlDocument",
    "assignments_from_env",
    "load_yaml",
    "load_yaml_file",
    "resolve",
    "validate",
]
