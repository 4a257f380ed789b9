"""Small pieces of HTML. Every value is escaped here, and nowhere else."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escaped(value: object) -> Markup:
    """Any value as HTML text; markup stays as it is. Control characters become visible."""
    if isinstance(value, Markup):
        return value
    text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value))
    # A lone surrogate cannot be written as UTF-8.
    return Markup(html.escape(text.encode("utf-8", "replace").decode("utf-8")))


def element(name: str, *content: object, **attributes: object) -> Markup:
    """`<name attributes>content</name>`; an attribute that is None is left out, `class_` is class, `_` is a hyphen."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{''.join(escaped(part) for part in content)}</{name}>")


def joined(parts: Iterable[object]) -> Markup:
    """The parts one after the other."""
    return Markup("".join(escaped(part) for part in parts))


def section(title: str, *content: object, id: str, note: object = "") -> Markup:
    """A part of the page with a heading."""
    head = element("h2", title, element("small", note) if note else "")
    return element("section", head, *content, id=id)


def table(headers: Sequence[object], rows: Iterable[Sequence[object]], class_: str | None = None) -> Markup:
    """A table that scrolls sideways where it is too wide."""
    head = element("tr", *(element("th", header) for header in headers))
    body = joined(element("tr", *(element("td", cell) for cell in row)) for row in rows)
    return element(
        "div", element("table", element("thead", head), element("tbody", body), class_=class_), class_="scroll"
    )


def details(title: object, *content: object, open: bool = False) -> Markup:
    """Content behind a title that opens it."""
    body = joined([element("summary", title), *content])
    return Markup(f"<details{' open' if open else ''}>{body}</details>")


def number(value: object) -> str:
    """A number for people: up to five significant digits; anything else as it is."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.5g}"


def seconds(value: float) -> str:
    """A duration for people."""
    if value < 0.1:
        return f"{value * 1000:.2g} ms" if value else "0 s"
    if value < 10:
        return f"{value:.2f} s"
    if value < 120:
        return f"{value:.1f} s"
    minutes, rest = divmod(int(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(count: object) -> str:
    """Bytes for people; anything else as it is."""
    if not isinstance(count, int | float):
        return str(count)
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def shown(value: Any) -> str:
    """A plain value as text."""
    if isinstance(value, float):
        return number(value) if abs(value) >= 1e-4 or value == 0 else f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def data_script(id: str, data: Any) -> Markup:
    """Data for the page's script. No `<` is left in it, so nothing in it can end the element."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(f'<script type="application/json" id="{id}">{text}</script>')
