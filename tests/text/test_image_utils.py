"""Images in threads: from files, to base64 and files, in Markdown and HTML."""

from __future__ import annotations

import asyncio
import base64
import io
import sys
from pathlib import Path

import pytest
from PIL import Image

from harmony_core.errors import DataError, ResourceError, VerificationError
from harmony_core.text import display
from harmony_core.text.image_utils import (
    image_to_base64,
    pil_to_base64,
    save_inlined_string_to_png,
    save_string_thread_to_markdown_dir,
    string_thread_to_html_string,
)
from harmony_core.text.threads import StringThread


@pytest.fixture
def file(tmp_path: Path) -> Path:
    Image.new("RGBA", (40, 20), (255, 0, 0, 255)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def opened(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def thread_of(url: str) -> StringThread:
    turns = [
        ("user", [{"type": "text", "text": "What is <it>?"}, {"type": "image", "url": url}]),
        ("assistant", ANSWER),
    ]
    return asyncio.run(StringThread.from_fragments(turns, {"<k>": 1}))


CALL = {"type": "function_call", "call_id": "1", "name": "look", "arguments": '{"at": "it"}'}
ANSWER = [{"type": "text", "text": "<script>red</script>"}, CALL]


def test_base64(file: Path) -> None:
    assert base64.b64decode(image_to_base64(file)).startswith(b"\x89PNG")
    small = opened(image_to_base64(str(file), "jpeg", longest_side_max_size=10, black_and_white=True))
    assert (small.format, small.size, small.mode) == ("JPEG", (10, 5), "L")
    assert opened(image_to_base64(file, "JPEG")).mode == "RGB", "JPEG has no transparency"
    image = Image.new("RGB", (8, 8))
    assert opened(pil_to_base64(image, longest_side_max_size=4)).size == (4, 4) and image.size == (8, 8)
    (file.parent / "text.png").write_text("no image")
    with pytest.raises(DataError, match="must be PNG"):
        image_to_base64(file.parent / "text.png")


def test_saving(file: Path) -> None:
    for number, text in enumerate([encoded := image_to_base64(file, "GIF"), f"data:image/gif;base64,{encoded}"]):
        save_inlined_string_to_png(text, file.parent / f"{number}.png")
        assert (file.parent / f"{number}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="cannot be decoded"):
        save_inlined_string_to_png("@@@", file.parent / "bad.png")


def test_without_pillow_the_extra_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ResourceError, match="pillow") as raised:
        image_to_base64(file)
    assert "harmony-core[images]" in raised.value.hint
    assert "<img" in string_thread_to_html_string(thread_of(str(file))), "no image is changed"


def test_an_image_may_be_a_file(file: Path) -> None:
    thread = thread_of(str(file))
    url = thread.get_fragments()[0][1][1]["url"]
    assert url == "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    assert thread_of(url).get_fragments() == thread.get_fragments()
    with pytest.raises(VerificationError):
        thread_of(str(file.parent / "none.png"))
    for url in ("https://example.org/a.png", "http://example.org/a.png"):
        with pytest.raises(DataError, match="nothing is fetched"):
            thread_of(url)
    with pytest.raises(DataError, match="data URI"):
        asyncio.run(StringThread.from_dataset([("user", [{"type": "image", "url": str(file)}])], None))


def test_markdown_and_html(file: Path) -> None:
    thread = thread_of(str(file))
    save_string_thread_to_markdown_dir(thread, file.parent / "out")
    assert (file.parent / "out" / "image-1-2.png").read_bytes() == file.read_bytes()
    expected = "## user\n\nWhat is <it>?\n\n![image-1-2.png](image-1-2.png)\n\n## assistant\n\n<script>red</script>\n\n"
    assert (file.parent / "out" / "thread.md").read_text() == expected + 'look({"at": "it"})\n'
    shown = string_thread_to_html_string(thread)
    assert "<script>" not in shown and "What is &lt;it&gt;?" in shown and "&lt;k&gt;" in shown
    assert 'src="data:image/png;base64,' in shown and "look({&quot;at&quot;" in shown
    assert thread._repr_html_() == shown


def test_lines_are_wrapped() -> None:
    assert (display.WRAP_WIDTH, display.MAX_TOOL_RESPONSE_LEN) == (90, 500)
    assert display.wrapped("") == "" and display.wrapped("  a  b") == "  a  b"
    words = "word " * 40
    assert all(len(line) <= 94 for line in display.wrapped(words).split("\n"))
    assert display.wrapped(words).replace("\n    ", "") == words
