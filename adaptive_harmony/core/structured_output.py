"""Answers as pydantic models."""

from harmony_core.errors import JsonParseError as JsonParseError, OutputParserException as OutputParserException
from harmony_core.structured_output import (
    FIX_OUTPUT_FORMAT as FIX_OUTPUT_FORMAT,
    generate_and_validate as generate_and_validate,
    get_pydantic_schema as get_pydantic_schema,
    get_simple_pydantic_schema as get_simple_pydantic_schema,
    pydantic_parse as pydantic_parse,
    render_pydantic_model as render_pydantic_model,
    render_schema as render_schema,
)
