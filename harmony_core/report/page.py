"""The whole page: one file that fetches nothing. Its one script is known to the browser by its digest."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harmony_core.journal import MAX_TEXT
from harmony_core.report import sections
from harmony_core.report.curves import MAX_POINTS, Curve
from harmony_core.report.markup import Markup, data_script, element, joined, number, section
from harmony_core.report.reading import MAX_CURVES, MAX_SAMPLES, RunData
from harmony_core.report.samples import samples_section
from harmony_core.report.sections import MAX_ROWS

MAX_POINTS_IN_ALL = 40_000
_COLOURS = 7
_JOINED = ": neighbouring steps are one point, drawn as their mean in a band from the least to the greatest."
_FIRST = ("loss", "reward", "score", "accuracy")
_LAST = ("completion_percentage", "training/completion_percentage", "step")

_CONTROLS = Markup(
    '<div class="controls" id="curve-controls" hidden>'
    '<label><input type="search" id="filter" placeholder="find a metric" aria-label="find a metric"></label>'
    '<label>smoothing <input type="range" id="smooth" min="0" max="0.98" step="0.02" value="0"></label>'
    '<label><input type="checkbox" id="log"> log scale</label>'
    '<label><input type="checkbox" id="time-axis"> over time</label></div>'
)
_SAMPLE_CONTROLS = Markup(
    '<div class="controls" id="sample-controls" hidden>'
    '<label>step <select id="sample-step"><option value="">all</option></select></label>'
    '<label>order <select id="sample-order"><option value="">as recorded</option>'
    '<option value="high">highest reward first</option>'
    '<option value="low">lowest reward first</option></select></label>'
    "</div>"
)


def render(data: RunData, mask: Callable[[str], str]) -> str:
    """The page as text. `mask` hides secrets; the script and the style, which have none, are left as they are."""
    parts = [
        sections.failure(data),
        sections.gates(data),
        _curves(data),
        sections.times(data),
        _with_controls(samples_section(data.samples, data.samples_seen, data.labels)),
        sections.tables(data),
        sections.dropped(data),
        sections.models(data),
        sections.configuration(data),
        sections.environment(data),
    ]
    links = [element("a", title, href=f"#{id}") for id, title in _titles(parts)]
    head = joined([element("nav", element("div", *links)), Markup("<main>"), sections.header(data)])
    body = joined([head, *parts, _footer(data), Markup("</main>")])
    title = element("title", f"{data.run.get('name', 'run')} · {data.run.get('id', '')}")
    content = joined([body, data_script("data", {"charts": [chart for chart in _charts(data) if not _flat(chart[1])]})])
    return _document(Markup(mask(title)), Markup(mask(content)))


def _document(title: Markup, content: Markup) -> str:
    style, script = _asset("page.css"), _asset("page.js")
    sources = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    policy = f"{sources}; base-uri 'none'; form-action 'none'"
    head = joined(
        [
            Markup('<meta charset="utf-8">'),
            Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
            Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Markup('<meta name="referrer" content="no-referrer">'),
            title,
            Markup(f"<style>{style}</style>"),
        ]
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{content}<script>{script}</script></body></html>\n'
    )


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _titles(parts: list[Markup]) -> list[tuple[str, str]]:
    names = {
        "failure": "What went wrong",
        "gates": "Gates",
        "curves": "Curves",
        "time": "Time",
        "samples": "Samples",
        "tables": "Tables",
        "dropped": "Dropped",
        "models": "Models",
        "config": "Configuration",
        "environment": "Environment and logs",
    }
    return [(id, title) for (id, title), part in zip(names.items(), parts, strict=True) if part]


def _with_controls(samples: Markup) -> Markup:
    return Markup(samples.replace('<div class="cards">', f'{_SAMPLE_CONTROLS}<div class="cards">', 1))


def _curves(data: RunData) -> Markup:
    charts = _charts(data)
    if not charts:
        return Markup("")
    last = [
        element("span", f"{name} ", element("b", series[-1]["last"]), class_="chip plain") for name, series in charts
    ]
    without = element("noscript", element("p", "Curves are drawn by a script. The last values:"), *last)
    flat = [
        element(
            "span", f"{name} ", element("b", " / ".join(dict.fromkeys(x["last"] for x in series))), class_="chip plain"
        )
        for name, series in charts
        if _flat(series)
    ]
    drawn = [_CONTROLS, element("div", id="charts", class_="charts")] if len(flat) < len(charts) else []
    never = [element("p", "Never changed: ", *flat, class_="muted flat")] if flat else []
    note = f"{len(charts)} metric{'s' if len(charts) > 1 else ''}"
    return section("Curves", *drawn, *never, without, id="curves", note=note)


def _flat(series: list[dict[str, Any]]) -> bool:
    """Whether a metric had one value in each stage, and needs no curve."""
    return all(one["low"] == one["high"] and len(one["p"]) > 1 and not one["bad"] for one in series)


def _rank(name: str, series: list[dict[str, Any]]) -> tuple[bool, ...]:
    """Objectives first; what only counts, last."""
    return name in _LAST, not any(word in name for word in _FIRST), "/" in name


def _charts(data: RunData) -> list[tuple[str, list[dict[str, Any]]]]:
    """(name, series) of each metric; a metric that several stages log is one chart of several series."""
    found: dict[str, list[dict[str, Any]]] = {}
    total = sum(len(stage.curves) for stage in data.stages)
    labels = data.labels
    budget = max(MAX_POINTS_IN_ALL // max(total, 1), 50)
    for place, stage in enumerate(data.stages):
        for name, curve in stage.curves.items():
            curve.thin(budget)
            found.setdefault(name, []).append(_series(labels[place], curve, f"s{place % _COLOURS}"))
    return sorted(found.items(), key=lambda entry: _rank(*entry))


def _series(stage: str, curve: Curve, colour: str) -> dict[str, Any]:
    points = [
        [_rounded(p.step), round(p.seconds, 2), _rounded(p.mean)]
        + ([] if p.values == 1 else [_rounded(p.low), _rounded(p.high)])
        for p in curve.points
    ]
    return {
        "stage": stage,
        "colour": colour,
        "last": number(curve.last),
        "bad": curve.not_finite,
        "low": _rounded(curve.low) if points else 0,
        "high": _rounded(curve.high) if points else 0,
        "p": points,
    }


def _rounded(value: float) -> float:
    value = float(f"{value:.6g}") if abs(value) < 1e6 else value
    return int(value) if value == int(value) and abs(value) < 2**53 else value


def _footer(data: RunData) -> Markup:
    joined_points = any(p.values > 1 for stage in data.stages for curve in stage.curves.values() for p in curve.points)
    lines = [
        "One file without any reference to the network.",
        f"A curve has at most {MAX_POINTS} points" + (_JOINED if joined_points else "."),
        f"At most {MAX_CURVES} curves, {MAX_SAMPLES} samples of {MAX_TEXT:,} characters and {MAX_ROWS} rows of a table "
        "are shown, about 8 MiB in all; everything is in events.jsonl.",
    ]
    if data.curves_left_out:
        lines.append(f"{data.curves_left_out} values of further metrics were left out.")
    if data.damaged_lines:
        lines.append(f"{data.damaged_lines} lines of events.jsonl could not be read.")
    return element("footer", *(element("p", line) for line in lines))
