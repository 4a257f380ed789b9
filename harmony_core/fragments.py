"""What a turn is made of: typed fragments, their public dict form and their JSON form.

Knows nothing of turns, weights or models. Images are kept as the bytes that were given; nothing here decodes pixels.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from harmony_core.errors import DataError

MAX_IMAGE_BYTES = 10 * 1024 * 1024
_IMAGE_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "png",
    b"\xff\xd8\xff": "jpeg",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"RIFF": "webp",
}

Fragment = dict[str, Any]
"""The public form: `{"type": "text", "text": ...}` and its kin."""


class _Described:
    """A fragment's two outer forms, made from its fields."""

    __slots__ = ()
    kind: ClassVar[str]

    def fields(self) -> dict[str, Any]:
        """The fields by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def public(self) -> Fragment:
        """The dict a recipe sees."""
        return {"type": self.kind} | self.fields()

    def stored(self) -> dict[str, Any]:
        """The form in a thread's JSON."""
        return {type(self).__name__: self.fields()}


@dataclass(frozen=True, slots=True)
class Text(_Described):
    """Plain text."""

    kind = "text"
    text: str

    def stored(self) -> dict[str, Any]:
        """The form in a thread's JSON."""
        return {"Text": self.text}


@dataclass(frozen=True, slots=True)
class Reasoning(_Described):
    """Text a model thought before it answered."""

    kind = "reasoning"
    text: str

    def stored(self) -> dict[str, Any]:
        """The form in a thread's JSON."""
        return {"Reasoning": self.text}


@dataclass(frozen=True, slots=True)
class FunctionCall(_Described):
    """A call of a tool; `arguments` is JSON text."""

    kind = "function_call"
    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolResponse(_Described):
    """What a tool answered to a call."""

    kind = "tool_response"
    call_id: str | None
    content: str


@dataclass(frozen=True, slots=True)
class Image(_Described):
    """The bytes of an encoded image (PNG, JPEG, GIF or WebP)."""

    kind = "image"
    data: bytes

    def public(self) -> Fragment:
        """The dict a recipe sees."""
        kind = next(kind for magic, kind in _IMAGE_MAGIC.items() if self.data.startswith(magic))
        return {"type": "image", "url": f"data:image/{kind};base64,{base64.b64encode(self.data).decode()}"}

    def stored(self) -> dict[str, Any]:
        """The form in a thread's JSON."""
        return {"Image": list(self.data)}


@dataclass(frozen=True, slots=True)
class StructuredOutput(_Described):
    """Text that parsed as an instance of a JSON schema."""

    kind = "structured_output"
    raw_text: str
    parsed_json: Any
    schema: Any

    def __hash__(self) -> int:  # the others may hold dicts
        return hash(self.raw_text)


AnyFragment = Text | Reasoning | FunctionCall | ToolResponse | Image | StructuredOutput


def text_of(fragments: tuple[AnyFragment, ...]) -> str:
    """The text fragments joined; images, reasoning, calls and tool responses are not text."""
    return "".join(
        fragment.text if isinstance(fragment, Text) else fragment.raw_text
        for fragment in fragments
        if isinstance(fragment, Text | StructuredOutput)
    )


def from_public(raw: Any) -> AnyFragment:
    """Build from the dict form. Raises DataError for an unknown type, a missing or ill-typed field, a bad image."""
    if not isinstance(raw, Mapping):
        raise DataError(f"a fragment must be a dict with a 'type', not {type(raw).__name__}")
    kind = raw.get("type")
    if kind == "text":
        return Text(_string(raw, "text"))
    if kind == "reasoning":
        return Reasoning(_string(raw, "text"))
    if kind == "function_call":
        return FunctionCall(_string(raw, "call_id"), _string(raw, "name"), _string(raw, "arguments"))
    if kind == "tool_response":
        return ToolResponse(
            _string(raw, "call_id") if raw.get("call_id") is not None else None, _string(raw, "content")
        )
    if kind == "image":
        return _image(_string(raw, "url"))
    if kind == "structured_output":
        return StructuredOutput(_string(raw, "raw_text"), raw.get("parsed_json"), raw.get("schema"))
    raise DataError(
        f"invalid fragment type: {kind!r}",
        hint="there is: text, reasoning, function_call, tool_response, image, structured_output",
    )


def from_stored(raw: Any) -> AnyFragment:
    """Build from the JSON form. Raises DataError."""
    if not isinstance(raw, dict) or len(raw) != 1:
        raise DataError("a stored fragment must be an object with one key")
    ((kind, value),) = raw.items()
    if kind == "Text" and isinstance(value, str):
        return Text(value)
    if kind == "Reasoning" and isinstance(value, str):
        return Reasoning(value)
    if kind == "Image":
        try:
            return _checked_image(bytes(value))
        except (TypeError, ValueError):
            raise DataError("a stored image must be a list of bytes") from None
    named = {"FunctionCall": "function_call", "ToolResponse": "tool_response", "StructuredOutput": "structured_output"}
    if kind in named and isinstance(value, dict):
        return from_public({"type": named[kind], **value})
    raise DataError(f"invalid stored fragment: {kind!r}")


def _string(raw: Mapping[Any, Any], field: str) -> str:
    value = raw.get(field)
    if not isinstance(value, str):
        found = "is missing" if field not in raw else f"is {type(value).__name__}"
        raise DataError(f"a {raw['type']} fragment needs a string {field!r}, which {found}")
    return value


def _image(url: str) -> Image:
    head, separator, body = url.partition(";base64,")
    if not head.startswith("data:image/") or not separator:
        raise DataError("an image must be a base64 data URI", hint="data:image/png;base64,...")
    if len(body) > MAX_IMAGE_BYTES * 4 // 3 + 4:
        raise DataError(f"an image is larger than {MAX_IMAGE_BYTES} bytes")
    try:
        return _checked_image(base64.b64decode(body, validate=True))
    except binascii.Error as error:
        raise DataError(f"an image cannot be decoded: {error}") from None


def _checked_image(data: bytes) -> Image:
    if not data.startswith(tuple(_IMAGE_MAGIC)) or len(data) > MAX_IMAGE_BYTES:
        raise DataError(f"an image must be PNG, JPEG, GIF or WebP and at most {MAX_IMAGE_BYTES} bytes")
    return Image(data)
