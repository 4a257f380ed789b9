"""From a run's directory to its page: one file that fetches nothing. The browser knows its one script by its digest.

`page.html` puts the page together and escapes every value; here is what it shows. `parts.py` has its larger parts.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from harmony_core.journal import MAX_TEXT as MAX_SAMPLE_TEXT
from harmony_core.plain_files import write_text
from harmony_core.runs.report import parts
from harmony_core.runs.report.figures import MAX_POINTS, Curve, number, seconds, shown
from harmony_core.runs.report.reading import MAX_CURVES, MAX_SAMPLES, RunData, read_run

FILE = "report.html"
MAX_POINTS_IN_ALL = 40_000
MAX_TEXT = 20_000
_COLOURS = 7
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_JOINED = ": neighbouring steps are one point, drawn as their mean in a band from the least to the greatest."
_FIRST = ("loss", "reward", "score", "accuracy")
_LAST = ("completion_percentage", "training/completion_percentage", "step")
_STATUS = {"succeeded": "good", "failed": "bad", "crashed": "bad", "stopped": "fair", "running": "fair"}


def build_report(directory: Path, status: str | None = None) -> str:
    """The page of the run in `directory`. `status` says more than the record where a run has crashed."""
    return _rendered(read_run(directory, status))


def write_report(directory: Path, output: Path | None = None, status: str | None = None) -> Path:
    """Write the page to `output`, or to `report.html` beside the run's other files. Raises OSError."""
    target = output or directory / FILE
    write_text(target, build_report(directory, status))
    return target


def _rendered(data: RunData) -> str:
    charts = _charts(data)
    flat = [chart for chart in charts if _is_flat(chart[1])]
    return _template().render(
        **_assets(),
        **_outcome(data),
        **parts.times(data),
        **parts.samples(data),
        **parts.tables(data),
        **parts.configuration(data),
        data=data,
        charts=charts,
        drawn=[chart for chart in charts if chart not in flat],
        flat=[(name, " / ".join(dict.fromkeys(one["last"] for one in series))) for name, series in flat],
        spawns=parts.spawns(data),
        footer=_footer(data),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        max_text=MAX_TEXT,
        max_rows=parts.MAX_ROWS,
        max_cell=parts.MAX_CELL,
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "seconds": seconds, "shown": shown}
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.get_template("page.html")


def _visible(value: object) -> str:
    """A value as text whose control characters are visible; of what no UTF-8 can hold, a question mark."""
    if isinstance(value, Markup):
        return value
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value)).encode("utf-8", "replace").decode("utf-8")


def _assets() -> dict[str, Any]:
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    sources = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    policy = f"{sources}; base-uri 'none'; form-action 'none'"
    return {"style": Markup(style), "script": Markup(script), "policy": Markup(policy)}


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _outcome(data: RunData) -> dict[str, Any]:
    """Status, the figures that one looks for first, the result and the errors."""
    run, found = data.run, data.result.get("errors")
    gates_failed = any(not gate.get("passed") for gate in data.gates)
    figures = [("exit code", shown(run["exit"]))] if "exit" in run else []
    if data.began is not None and data.ended is not None:
        figures.insert(0, ("duration", seconds(data.ended - data.began)))
    if data.optimizer_steps:
        figures.append(("optimizer steps", number(data.optimizer_steps)))
    if data.dropped:
        figures.append(("samples dropped", number(data.dropped.total())))
    if data.ranks:
        figures.append(("ranks", f"{len(data.ranks)} × {data.ranks[0].get('device', '?')}"))
    result = data.result.get("result")
    return {
        "status": "succeeded, a gate does not hold" if gates_failed and data.status == "succeeded" else data.status,
        "tone": "bad" if gates_failed else _STATUS.get(data.status, "fair"),
        "subtitle": " · ".join(str(run[name]) for name in ("id", "started", "host") if run.get(name)),
        "figures": figures,
        "result": result if result is None or isinstance(result, str) else _indented(result),
        "crashed": data.status == "crashed",
        "errors": [_error(error) for error in found if isinstance(error, dict)] if isinstance(found, list) else [],
    }


def _indented(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _error(error: dict[str, Any]) -> str:
    lines = error.get("lines")
    return "\n".join(map(str, lines)) if isinstance(lines, list) else str(error.get("message"))


def _charts(data: RunData) -> list[tuple[str, list[dict[str, Any]]]]:
    """(name, series) of each metric; a metric that several stages log is one chart of several series.

    Objectives come first; what only counts, last.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    budget = max(MAX_POINTS_IN_ALL // max(sum(len(stage.curves) for stage in data.stages), 1), 50)
    for place, (label, stage) in enumerate(zip(data.labels, data.stages, strict=True)):
        for name, curve in stage.curves.items():
            curve.thin(budget)
            found.setdefault(name, []).append(_series(label, curve, f"s{place % _COLOURS}"))
    return sorted(found.items(), key=lambda chart: (chart[0] in _LAST, not _is_objective(chart[0]), "/" in chart[0]))


def _is_flat(series: list[dict[str, Any]]) -> bool:
    """Whether a metric had one value in each stage, and needs no curve."""
    return all(one["low"] == one["high"] and len(one["p"]) > 1 and not one["bad"] for one in series)


def _is_objective(name: str) -> bool:
    return any(word in name for word in _FIRST)


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


def _footer(data: RunData) -> list[str]:
    joined = any(p.values > 1 for stage in data.stages for curve in stage.curves.values() for p in curve.points)
    lines = [
        "One file without any reference to the network.",
        f"A curve has at most {MAX_POINTS} points" + (_JOINED if joined else "."),
        f"At most {MAX_CURVES} curves, {MAX_SAMPLES} samples of {MAX_SAMPLE_TEXT:,} characters and {parts.MAX_ROWS} "
        "rows of a table are shown, about 8 MiB in all; everything is in events.jsonl.",
    ]
    if data.curves_left_out:
        lines.append(f"{data.curves_left_out} values of further metrics were left out.")
    if data.damaged_lines:
        lines.append(f"{data.damaged_lines} lines of events.jsonl could not be read.")
    return lines
