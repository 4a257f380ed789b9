"""Images in threads: their formats, files and data URIs, and threads as HTML and Markdown with their images.

Images stay encoded. Only what changes an image needs Pillow, the extra `images`.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import io
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harmony_core.errors import DataError, ResourceError, storing
from harmony_core.plain_files import expanded, read_plain, write_text

if TYPE_CHECKING:
    from PIL.Image import Image

    from harmony_core.text.threads import StringThread

MAX_IMAGE_BYTES = 10 * 1024 * 1024
_MAGIC = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF87a": "gif", b"GIF89a": "gif", b"RIFF": "webp"}


def data_uri(data: bytes) -> str:
    """The data URI of an encoded image."""
    kind = next(kind for magic, kind in _MAGIC.items() if data.startswith(magic))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def checked_image(data: bytes) -> bytes:
    """The bytes of an encoded image. Raises DataError for another format, and for more than MAX_IMAGE_BYTES."""
    if not data.startswith(tuple(_MAGIC)) or len(data) > MAX_IMAGE_BYTES:
        raise DataError(f"an image must be PNG, JPEG, GIF or WebP and at most {MAX_IMAGE_BYTES} bytes")
    return data


def image_of_uri(url: Any) -> bytes:
    """The image of a base64 data URI. Raises DataError."""
    head, separator, body = url.partition(";base64,") if isinstance(url, str) else ("", "", "")
    if not head.startswith("data:image/") or not separator:
        raise DataError(
            "an image's 'url' must be a base64 data URI (StringThread.from_fragments also takes a file): "
            "nothing is fetched from the network",
            hint="data:image/png;base64,...",
        )
    if len(body) > MAX_IMAGE_BYTES * 4 // 3 + 4:
        raise DataError(f"an image is larger than {MAX_IMAGE_BYTES} bytes")
    try:
        return checked_image(base64.b64decode(body, validate=True))
    except binascii.Error as error:
        raise DataError(f"an image cannot be decoded: {error}") from None


def with_file_inlined(fragment: Any) -> Any:
    """The fragment; for an image whose `url` is a path, with its data URI. Raises VerificationError, DataError."""
    url = fragment.get("url") if isinstance(fragment, Mapping) and fragment.get("type") == "image" else None
    if not isinstance(url, str | Path) or re.match(r"[a-z][a-z0-9+.-]+:", str(url), re.IGNORECASE):
        return fragment
    return {**fragment, "url": data_uri(checked_image(read_plain(expanded(url), MAX_IMAGE_BYTES)))}


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ImportError:
        raise ResourceError(
            "this needs the package pillow, which is not installed", hint="pip install 'harmony-core[images]'"
        ) from None


def pil_to_base64(
    image: Image, format: str = "PNG", longest_side_max_size: int | None = None, black_and_white: bool = False
) -> str:
    """Encode a Pillow image as base64 without a `data:` prefix; larger ones are made smaller, the shape is kept."""
    _pillow()
    if black_and_white:
        image = image.convert("L")
    if longest_side_max_size is not None and max(image.size) > longest_side_max_size:
        image = image.copy()
        image.thumbnail((longest_side_max_size, longest_side_max_size))
    if format.upper() in ("JPEG", "JPG"):
        format, image = "JPEG", image if image.mode == "L" else image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return base64.b64encode(buffer.getvalue()).decode()


def image_to_base64(
    image_path: str | Path, format: str = "PNG", longest_side_max_size: int | None = None, black_and_white: bool = False
) -> str:
    """`pil_to_base64` of the image in a file. Raises VerificationError, DataError, ResourceError without Pillow."""
    data = checked_image(read_plain(expanded(image_path), MAX_IMAGE_BYTES))
    with _pillow().open(io.BytesIO(data)) as image:
        return pil_to_base64(image, format, longest_side_max_size, black_and_white)


def save_inlined_string_to_png(image_str: str, path_to_save: str | Path) -> None:
    """Write an image, given as a data URI or as base64, as a PNG file. Raises DataError, ResourceError."""
    uri = image_str if image_str.startswith("data:") else f"data:image/png;base64,{image_str}"
    with _pillow().open(io.BytesIO(image_of_uri(uri))) as image, storing(f"cannot write {path_to_save}"):
        image.save(expanded(path_to_save), format="PNG")


def save_string_thread_to_markdown_dir(thread: StringThread, directory_path: str | Path) -> None:
    """Write `thread.md` with a heading for each turn, and the images as files beside it. Raises ResourceError."""
    folder, parts = expanded(directory_path), []
    with storing(f"cannot write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for number, (role, fragments) in enumerate(thread.get_fragments(), 1):
            parts.append(f"## {role}")
            for place, fragment in enumerate(fragments, 1):
                if fragment["type"] == "image":
                    kind = fragment["url"].partition(";")[0].rpartition("/")[2]
                    name = f"image-{number}-{place}.{kind}"
                    (folder / name).write_bytes(image_of_uri(fragment["url"]))
                    parts.append(f"![{name}]({name})")
                else:
                    parts.append(_text(fragment))
        write_text(folder / "thread.md", "\n\n".join(parts) + "\n")


def string_thread_to_html_string(thread: StringThread) -> str:
    """The conversation as HTML that loads nothing: text is escaped, images are inside; trained turns are green."""
    rows = []
    for (role, fragments), weight in zip(thread.get_fragments(), thread.get_turn_weights(), strict=True):
        inner = (
            f'<img alt="" style="max-width:100%" src="{fragment["url"]}">'
            if fragment["type"] == "image"
            else escape(_text(fragment))
            for fragment in fragments
        )
        rows.append(
            f'<div style="margin:4px 0;padding:4px 8px;border-left:3px solid {"#2a2" if weight else "#88a"}">'
            f"<b>{escape(role)}</b>{f' <small>weight {weight:g}</small>' if weight else ''}"
            f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">{"<br>".join(inner)}</div></div>'
        )
    metadata = "" if thread.metadata is None else f"<small>metadata: {escape(repr(thread.metadata))}</small>"
    return f"<div>{''.join(rows)}{metadata}</div>"


def _text(fragment: Mapping[str, Any]) -> str:
    """A fragment that is not an image, for people."""
    if fragment["type"] == "function_call":
        return f"{fragment['name']}({fragment['arguments']})"
    return str(next((fragment[name] for name in ("text", "content", "raw_text") if name in fragment), fragment))
