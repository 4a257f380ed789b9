"""The parts of a turn as plain dicts (documented path `harmony_client`): what `from_fragments` takes."""

from __future__ import annotations

from typing import Literal, Required, TypedDict


class TextFragment(TypedDict, total=False):
    """Text. `parsed_json` is given by a structured answer, and dropped on input."""

    type: Required[Literal["text"]]
    text: Required[str]
    parsed_json: str


class ImageFragment(TypedDict):
    """An image: a data URI of JPEG, PNG, WebP or GIF."""

    type: Literal["image"]
    url: str


class ReasoningFragment(TypedDict):
    """A thought, which a template writes apart from the text."""

    type: Literal["reasoning"]
    text: str


class FunctionCallFragment(TypedDict):
    """A call of a tool; `arguments` is JSON."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
