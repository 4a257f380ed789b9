"""Sampled conversations: rewards as chips, trained tokens coloured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from harmony_core.report.markup import Markup, element, escaped, joined, number, section

MAX_TOKENS = 800
"""Trained tokens of one sample that are coloured one by one; the rest of it is one piece."""


def samples_section(samples: Sequence[dict[str, Any]], seen: int, stages: Sequence[str]) -> Markup:
    """Every sample as a card, behind a choice of the step. `stages` are the stages' names."""
    if not samples:
        return Markup("")
    rewards = [value for sample in samples if (value := _number(sample.get("reward"))) is not None]
    low, high = min(rewards, default=0.0), max(rewards, default=0.0)
    cards = [_card(sample, low, high, stages) for sample in samples]
    legend = element(
        "p",
        element("i", "trained", class_="t w4"),
        " token of which the log-prob is pushed",
        *(
            [
                ", ",
                element("i", "up", class_="t w4 up"),
                " or ",
                element("i", "down", class_="t w4 down"),
                " by its advantage",
            ]
            if any("advantage" in sample for sample in samples)
            else []
        ),
        "; paler with less weight. Hold the pointer over a token for its weight and probability.",
        class_="legend",
    )
    note = f"{len(samples)} of {seen} recorded" if seen > len(samples) else f"{seen} recorded"
    return section("Samples", legend, element("div", *cards, class_="cards"), id="samples", note=note)


def _number(value: object) -> float | None:
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


def _card(sample: dict[str, Any], low: float, high: float, stages: Sequence[str]) -> Markup:
    stage = f"{stages[sample['stage']]} " if len(stages) > 1 else ""
    where = f"{stage}step {sample['step']}"
    chips = [element("span", where, class_="where"), element("span", sample.get("source", ""), class_="where")]
    if "group" in sample:
        chips.append(element("span", f"group {sample['group']}", class_="where"))
    if "reward" in sample:
        chips.append(_chip("reward", sample["reward"], _level(_number(sample["reward"]), low, high)))
    if "advantage" in sample:
        chips.append(_chip("advantage", sample["advantage"], "plain"))
    grades = sample.get("grades")
    chips += [_chip(name, value, "plain") for name, value in (grades.items() if isinstance(grades, dict) else ())]
    advantage = _number(sample.get("advantage"))
    direction = "" if not advantage else " up" if advantage > 0 else " down"
    turns = [_turn(turn, direction) for turn in sample["turns"] if isinstance(turn, dict)]
    cut = element("p", "cut: the sample is longer than what is recorded", class_="muted") if sample.get("cut") else ""
    head = element("header", joined(chips))
    return element("article", head, *turns, cut, class_="sample", data_step=where, data_reward=sample.get("reward"))


def _level(reward: float | None, low: float, high: float) -> str:
    if reward is None or high <= low:
        return "plain"
    return f"r{min(int((reward - low) / (high - low) * 5), 4)}"


def _chip(name: str, value: object, level: str) -> Markup:
    shown = number(found) if (found := _number(value)) is not None else str(value)
    return element("span", f"{name} ", element("b", shown), class_=f"chip {level}")


def _turn(turn: dict[str, Any], direction: str) -> Markup:
    found = turn.get("pieces")
    pieces = (
        [piece for piece in found if isinstance(piece, list) and len(piece) >= 2] if isinstance(found, list) else []
    )
    most = max((abs(_number(piece[1]) or 0.0) for piece in pieces), default=0.0)
    text: list[Markup] = []
    for place, piece in enumerate(pieces):
        weight = _number(piece[1]) or 0.0
        if weight and place < MAX_TOKENS:
            text.append(_token(piece, weight / most, direction, odd=bool(place % 2)))
        else:
            text.append(escaped(piece[0]))
    role = element("span", turn.get("role", "?"), class_="role")
    return element("div", role, element("p", joined(text), class_="text"), class_="turn")


def _token(piece: list[Any], share: float, direction: str, odd: bool) -> Markup:
    text = str(piece[0])
    if not text:
        return Markup("")
    words = [f"weight {piece[1]}"]
    logprob = _number(piece[2]) if len(piece) > 2 else None
    if logprob is not None:
        words.append(f"log-prob {logprob:.3f}, probability {math.exp(min(logprob, 0.0)):.1%}")
    level = max(1, min(math.ceil(abs(share) * 4), 4))
    marks = f"{' odd' if odd else ''}{' nl' if text.endswith(chr(10)) else ''}"
    return element("i", text, class_=f"t w{level}{direction}{marks}", title=", ".join(words))
