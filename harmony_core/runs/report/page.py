"""A run's report: one HTML page that loads no other file. The browser runs only the script whose digest it names.

`reading.py` reads the run's directory, this module computes derived values, and the template `page.html` lays out the
page and escapes every value.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from harmony_core.journal import MAX_TEXT as MAX_SAMPLE_TEXT
from harmony_core.memory.ledger import format_size
from harmony_core.plain_files import write_text
from harmony_core.runs.report.reading import (
    MAX_CURVES,
    MAX_POINTS,
    MAX_SAMPLES,
    Curve,
    Interval,
    RunData,
    read_run,
)

FILE = "report.html"
MAX_POINTS_IN_ALL = 40_000
LIMITS = {"text": 20_000, "rows": 50, "cell": 2000, "points": MAX_POINTS, "curves": MAX_CURVES, "samples": MAX_SAMPLES}
"""The most that the page shows of each item; for texts and cells in characters."""
MAX_TABLE_TEXT = 1_000_000
"""Characters of all tables together."""
MAX_TOKENS = 800
"""Trained tokens of one sample that are coloured individually; the rest is one piece."""
TRAINING, OPTIMIZER = "training", "optimizer"
WAITING = "waiting"
"""The name for time between the first and the last phase in which no phase was active."""
_COLOURS = 7
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_FIRST = ("loss", "reward", "score", "accuracy")
_LAST = ("completion_percentage", "training/completion_percentage", "step")
_PHASES = {"rollout": "p0", "training": "p1", "grading": "p2", "optimizer": "p3", "reference": "p4", "values": "p5"}
_PHASES |= {"callbacks": "p6", WAITING: "p-wait"}
"""A colour for a phase, the same in every stage."""
_HELD = {"weights": "parameter_bytes", "gradients": "gradient_bytes", "optimizer": "optimizer_bytes", "kv": "kv_bytes"}
_SPAWN_LIMITS = ("tp", "replicas", "max_batch_size", "kv_cache_len", "tokens_to_generate", "checkpointed_layers")


def build_report(directory: Path, status: str | None = None) -> str:
    """The page of the run in `directory`. `status` replaces the recorded status, for example for a crashed run."""
    data = read_run(directory, status)
    charts = _charts(data)
    flat = [chart for chart in charts if _is_flat(chart[1])]
    times = [with_optimizer(shares(stage.intervals), stage.optimizer_seconds) for stage in data.stages]
    rewards = [value for sample in data.samples if (value := _finite(sample.get("reward"))) is not None]
    settings = [(path, shown(value), data.sources.get(path, "")) for path, value in _leaves(data.config)]
    return _template().render(
        data=data,
        charts=charts,
        drawn=[chart for chart in charts if chart not in flat],
        flat=[(name, " / ".join(dict.fromkeys(one["last"] for one in series))) for name, series in flat],
        joined=any(p.values > 1 for stage in data.stages for curve in stage.curves.values() for p in curve.points),
        stage_times=[(*found, sum(found[2].values())) for found in zip(data.labels, data.stages, times, strict=True)],
        low=min(rewards, default=0.0),
        high=max(rewards, default=0.0),
        tables=_tables(_of_stages(data)),
        artifact_tables=_tables(_of_artifacts(data)),
        texts=[(name, text[: LIMITS["cell"]]) for stage in data.stages for name, text in stage.texts.items()][
            : LIMITS["rows"]
        ],
        spawns=_spawns(data),
        settings=[s for s in settings if (s[0], s[2]) != ("union_variant", "default")][:500],
        command=f"adaptive {shlex.join(map(str, data.argv))}" if data.argv else None,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def write_report(directory: Path, output: Path | None = None, status: str | None = None) -> Path:
    """Write the page to `output`, or to `report.html` beside the run's other files. Raises OSError."""
    target = output or directory / FILE
    write_text(target, build_report(directory, status))
    return target


@cache
def _template() -> Template:
    folder = Path(__file__).parent
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    sources = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    policy = f"{sources}; base-uri 'none'; form-action 'none'"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "seconds": seconds, "size": _size, "shown": shown, "indented": _indented}
    environment.filters |= {"finite": _finite, "pieces": _pieces}
    environment.globals |= {"style": Markup(style), "script": Markup(script), "policy": Markup(policy)}
    environment.globals |= {"max": LIMITS | {"sample_text": MAX_SAMPLE_TEXT}, "colours": _PHASES}
    environment.globals |= {"held_as": _HELD, "spawn_limits": _SPAWN_LIMITS}
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.get_template("page.html")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _visible(value: object) -> str:
    """A value as text. Control characters become visible; characters that UTF-8 cannot encode become question marks."""
    if isinstance(value, Markup):
        return value
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value)).encode("utf-8", "replace").decode("utf-8")


def number(value: object) -> str:
    """A number for people: up to five significant digits. Any other value is returned as text."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    return f"{int(value):,}" if value == int(value) and abs(value) < 1e15 else f"{value:.5g}"


def seconds(value: float) -> str:
    """A duration for people."""
    if value < 10:
        return "0 s" if not value else f"{value * 1000:.2g} ms" if value < 0.1 else f"{value:.2f} s"
    if value < 120:
        return f"{value:.1f} s"
    minutes, rest = divmod(int(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def shown(value: Any) -> str:
    """A plain value as text, cut to the length of a cell."""
    if isinstance(value, float):
        return number(value) if abs(value) >= 1e-4 or value == 0 else f"{value:g}"
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))[: LIMITS["cell"]]


def _indented(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _charts(data: RunData) -> list[tuple[str, list[dict[str, Any]]]]:
    """(name, series) of each metric. A metric that several stages log is one chart with several series.

    Objectives come first, counters last.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    budget = max(MAX_POINTS_IN_ALL // max(sum(len(stage.curves) for stage in data.stages), 1), 50)
    for place, (label, stage) in enumerate(zip(data.labels, data.stages, strict=True)):
        for name, curve in stage.curves.items():
            curve.thin(budget)
            found.setdefault(name, []).append(_series(label, curve, f"s{place % _COLOURS}"))

    def order(name: str) -> tuple[bool, bool, bool]:
        return name in _LAST, not any(word in name for word in _FIRST), "/" in name

    return sorted(found.items(), key=lambda chart: order(chart[0]))


def _is_flat(series: list[dict[str, Any]]) -> bool:
    """Whether a metric had a single value in each stage, and so needs no curve."""
    return all(one["low"] == one["high"] and len(one["p"]) > 1 and not one["bad"] for one in series)


def _series(stage: str, curve: Curve, colour: str) -> dict[str, Any]:
    points = [
        [_rounded(p.step), round(p.seconds, 2), _rounded(p.mean)]
        + ([] if p.values == 1 else [_rounded(p.low), _rounded(p.high)])
        for p in curve.points
    ]
    low, high = (_rounded(curve.low), _rounded(curve.high)) if points else (0, 0)
    names = {"stage": stage, "colour": colour, "last": number(curve.last), "bad": curve.not_finite}
    return names | {"low": low, "high": high, "p": points}


def _rounded(value: float) -> float:
    value = float(f"{value:.6g}") if abs(value) < 1e6 else value
    return int(value) if value == int(value) and abs(value) < 2**53 else value


def shares(intervals: Sequence[Interval]) -> dict[str, float]:
    """Seconds of each phase, the longest first, then of waiting.

    When several phases are active, the time is shared equally among them, so that the sum is the time from the first
    start to the last end.
    """
    marks = sorted([(i.start, 1, i.name) for i in intervals] + [(i.end, -1, i.name) for i in intervals])
    found: dict[str, float] = {}
    on: dict[str, int] = {}
    before = marks[0][0] if marks else 0.0
    for moment, change, name in marks:
        names = list(on) or [WAITING]
        for each in names:
            found[each] = found.get(each, 0.0) + (moment - before) / len(names)
        before = moment
        on[name] = on.get(name, 0) + change
        if not on[name]:
            del on[name]
    return _in_order(found | {WAITING: found.get(WAITING, 0.0)}) if intervals else {}


def _in_order(found: dict[str, float]) -> dict[str, float]:
    """The longest first, waiting last."""
    return dict(sorted(found.items(), key=lambda entry: (entry[0] == WAITING, -entry[1])))


def with_optimizer(found: dict[str, float], ranks_seconds: float) -> dict[str, float]:
    """The same, with the optimizer's own time, as measured on the ranks, separated from training.

    `optim_step` also waits for the micro-batches that are queued on the ranks, so the driver counts most of a step's
    forward and backward time in it.
    """
    together = found.get(TRAINING, 0.0) + found.get(OPTIMIZER, 0.0)
    if not together or not ranks_seconds:
        return found
    apart = min(ranks_seconds, together)
    return _in_order({**found, TRAINING: together - apart, OPTIMIZER: apart})


def _pieces(found: object, direction: str) -> list[tuple[Any, str, str]]:
    """(text, class, title) of each piece of a turn; the class is "" where the text is not trained."""
    pieces = [p for p in found if isinstance(p, list) and len(p) >= 2] if isinstance(found, list) else []
    weights = [_finite(piece[1]) or 0.0 for piece in pieces]
    most = max(map(abs, weights), default=0.0)
    return [
        _token(piece, weight / most, direction + (" odd" if place % 2 else ""))
        if weight and place < MAX_TOKENS
        else (piece[0], "", "")
        for place, (piece, weight) in enumerate(zip(pieces, weights, strict=True))
    ]


def _token(piece: list[Any], share: float, marks: str) -> tuple[str, str, str]:
    text, title = str(piece[0]), f"weight {piece[1]}"
    if len(piece) > 2 and (logprob := _finite(piece[2])) is not None:
        title += f", log-prob {logprob:.3f}, probability {math.exp(min(logprob, 0.0)):.1%}"
    level = max(1, min(math.ceil(abs(share) * 4), 4))
    return text, f"t w{level}{marks}{' nl' if text.endswith(chr(10)) else ''}" if text else "", title


def _tables(tables: Iterable[tuple[str, Any]]) -> list[tuple[str, list[Any], list[list[str]]]]:
    """(title, headers, rows) of tables as they were logged, within a limit of characters."""
    blocks, room = [], MAX_TABLE_TEXT
    for name, found in tables:
        if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
            continue
        rows = []
        for row in found["rows"][: LIMITS["rows"]]:
            cells = [str(cell)[: LIMITS["cell"]] for cell in row] if isinstance(row, list) else []
            room -= sum(map(len, cells))
            rows += [cells] if isinstance(row, list) and room > 0 else []
        title = f"{name}: {len(rows)} of {len(found['rows'])} rows"
        blocks.append((title, list(found.get("headers") or ()), rows))
    return blocks


def _of_stages(data: RunData) -> Iterator[tuple[str, Any]]:
    """The last table logged under each name."""
    for stage in data.stages:
        yield from ((f"{name}, step {step}", found) for name, (step, found) in stage.tables.items())


def _of_artifacts(data: RunData) -> Iterator[tuple[str, Any]]:
    """The tables of the run's last evaluations."""
    for entry in data.kept["artifact"][-LIMITS["rows"] :]:
        found = entry.get("tables")
        for name, table in found.items() if isinstance(found, dict) else ():
            yield f"{entry.get('name')}, {name}", table


def _spawns(data: RunData) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each spawn as planned, with the recorded memory of its ranks; then the copies of models."""
    held: dict[str, dict[Any, list[dict[str, Any]]]] = {}
    for found in data.kept["spawn"]:
        held.setdefault(str(found.get("model")), {}).setdefault(found["rank"], []).append(found)
    planned = data.kept["spawn.planned"][: LIMITS["rows"]]
    spawns = [*planned, *({"name": name, "kind": "a frozen copy"} for name in held)]
    ranks = [[q.pop(0) for q in held.get(str(s.get("name")), {}).values() if q] for s in spawns]
    return [found for place, found in enumerate(zip(spawns, ranks, strict=True)) if found[1] or place < len(planned)]


def _size(count: object) -> str:
    """Bytes for people. Any other value is returned as text."""
    return format_size(count) if isinstance(count, int) else str(count)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not path):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
