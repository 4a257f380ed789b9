"""What a turn is made of: typed fragments, their public dict form and their JSON form.

Knows nothing of turns, weights or models. Images are kept as the bytes that were given; nothing here decodes pixels.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import msgspec

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


class _Fragment(msgspec.Struct, frozen=True):
    def public(self) -> Fragment:
        """The dict a recipe sees."""
        found: Fragment = msgspec.to_builtins(self)
        return found

    def stored(self) -> dict[str, Any]:
        """The form in a thread's JSON."""
        fields = self.public()
        del fields["type"]
        return {type(self).__name__: fields}


class _Words(_Fragment, frozen=True):
    text: str

    def stored(self) -> dict[str, Any]:
        """The form in a thread's JSON."""
        return {type(self).__name__: self.text}


class Text(_Words, frozen=True, tag="text"):
    """Plain text."""


class Reasoning(_Words, frozen=True, tag="reasoning"):
    """Text a model thought before it answered."""


class FunctionCall(_Fragment, frozen=True, tag="function_call"):
    """A call of a tool; `arguments` is JSON text."""

    call_id: str
    name: str
    arguments: str


class ToolResponse(_Fragment, frozen=True, omit_defaults=True, tag="tool_response"):
    """What a tool answered to a call. `name`: the tool's, where the data says it."""

    call_id: str | None
    content: str
    name: str | None = None


class Image(_Fragment, frozen=True, tag="image"):
    """The bytes of an encoded image (PNG, JPEG, GIF or WebP)."""

    data: bytes

    def public(self) -> Fragment:
        """The dict a recipe sees."""
        kind = next(kind for magic, kind in _IMAGE_MAGIC.items() if self.data.startswith(magic))
        return {"type": "image", "url": f"data:image/{kind};base64,{base64.b64encode(self.data).decode()}"}

    def stored(self) -> dict[str, Any]:
        """The form in a thread's JSON."""
        return {"Image": list(self.data)}


class StructuredOutput(_Fragment, frozen=True, tag="structured_output"):
    """Text that parsed as an instance of a JSON schema."""

    raw_text: str
    parsed_json: Any = None
    schema: Any = None

    def __hash__(self) -> int:  # the others may hold dicts
        return hash(self.raw_text)


AnyFragment = Text | Reasoning | FunctionCall | ToolResponse | Image | StructuredOutput

_BY_TAG: dict[Any, type[AnyFragment]] = {str(cls.__struct_config__.tag): cls for cls in AnyFragment.__args__}
_TAGS = {cls.__name__: tag for tag, cls in _BY_TAG.items()}


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
    if not isinstance(kind, str) or kind not in _BY_TAG:
        raise DataError(f"invalid fragment type: {kind!r}", hint=f"there is: {', '.join(_BY_TAG)}")
    if kind == "image":
        return _image(raw.get("url"))
    given = {"call_id": None, **raw} if kind == "tool_response" else dict(raw)
    try:
        return msgspec.convert(given, _BY_TAG[kind])
    except msgspec.ValidationError as error:
        raise DataError(f"a {kind} fragment: {error}") from None


def from_stored(raw: Any) -> AnyFragment:
    """Build from the JSON form. Raises DataError."""
    if not isinstance(raw, dict) or len(raw) != 1:
        raise DataError("a stored fragment must be an object with one key")
    ((name, value),) = raw.items()
    if name == "Image":
        try:
            return _checked_image(bytes(value))
        except (TypeError, ValueError):
            raise DataError("a stored image must be a list of bytes") from None
    fields = {"text": value} if name in ("Text", "Reasoning") else value
    if name not in _TAGS or not isinstance(fields, dict):
        raise DataError(f"invalid stored fragment: {name!r}")
    return from_public({"type": _TAGS[name], **fields})


def _image(url: Any) -> Image:
    head, separator, body = url.partition(";base64,") if isinstance(url, str) else ("", "", "")
    if not head.startswith("data:image/") or not separator:
        raise DataError("an image's 'url' must be a base64 data URI", hint="data:image/png;base64,...")
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
