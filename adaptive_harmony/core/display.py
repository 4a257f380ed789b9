"""Limits of what is shown."""

from harmony_core.text.display import MAX_TOOL_RESPONSE_LEN as MAX_TOOL_RESPONSE_LEN, WRAP_WIDTH as WRAP_WIDTH
