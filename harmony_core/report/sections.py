"""The parts of the page that are text and tables."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from harmony_core.report.markup import (
    Markup,
    details,
    element,
    escaped,
    joined,
    number,
    seconds,
    section,
    shown,
    size,
    table,
)
from harmony_core.report.reading import RunData
from harmony_core.report.times import WAITING, shares, with_optimizer

_STATUS = {"succeeded": "good", "failed": "bad", "crashed": "bad", "stopped": "fair", "running": "fair"}
_PHASES = {
    "rollout": "p0",
    "training": "p1",
    "grading": "p2",
    "optimizer": "p3",
    "reference": "p4",
    "values": "p5",
    "callbacks": "p6",
    WAITING: "p-wait",
}
"""The same colour for a phase in every stage."""

MAX_ROWS = 50
MAX_CELL = 2000
MAX_TABLE_TEXT = 1_000_000
"""Characters of all tables together."""
MAX_TEXT = 20_000


def header(data: RunData) -> Markup:
    """Name, status and the figures that one looks for first."""
    run, result = data.run, data.result
    gates_failed = any(not gate.get("passed") for gate in data.gates)
    status = data.status
    tone = "bad" if gates_failed else _STATUS.get(status, "fair")
    words = f"{status}, a gate does not hold" if gates_failed and status == "succeeded" else status
    line = [run.get("id"), run.get("started"), run.get("host")]
    figures = [("exit code", shown(run["exit"]))] if "exit" in run else []
    if data.began is not None and data.ended is not None:
        figures.insert(0, ("duration", seconds(data.ended - data.began)))
    if data.optimizer_steps:
        figures.append(("optimizer steps", number(data.optimizer_steps)))
    if data.dropped:
        figures.append(("samples dropped", number(data.dropped.total())))
    if data.ranks:
        figures.append(("ranks", f"{len(data.ranks)} × {data.ranks[0].get('device', '?')}"))
    tiles = [element("div", element("dt", name), element("dd", value)) for name, value in figures]
    saved = [element("span", f"saved {model.get('ref')}", class_="chip plain") for model in data.saved[-6:]]
    title = element("h1", run.get("name", "run"), " ", element("span", words, class_=f"status {tone}"))
    sub = element("p", " · ".join(str(part) for part in line if part), class_="muted")
    found = result.get("result")
    outcome = ""
    if found is not None:
        text = found if isinstance(found, str) else json.dumps(found, indent=2, ensure_ascii=False)
        outcome = details("Result", element("pre", text[:MAX_TEXT]), open=len(text) < 160)
    return element(
        "header", title, sub, element("dl", *tiles, class_="tiles"), joined(saved), outcome, class_="top", id="top"
    )


def failure(data: RunData) -> Markup:
    """Errors with their hints; empty for a run without any."""
    found = data.result.get("errors")
    errors = [error for error in found if isinstance(error, dict)] if isinstance(found, list) else []
    if not errors and data.status != "crashed":
        return Markup("")
    blocks = [element("pre", "\n".join(_lines(error))[:MAX_TEXT]) for error in errors]
    if data.status == "crashed":
        blocks.append(element("p", "The process ended without recording how: it was killed, or the machine went down."))
    return section("What went wrong", *blocks, *logs(data, open=not errors), id="failure")


def _lines(error: Mapping[str, Any]) -> list[str]:
    lines = error.get("lines")
    return [str(line) for line in lines] if isinstance(lines, list) else [str(error.get("message"))]


def logs(data: RunData, open: bool) -> list[Markup]:
    """The ends of the run's logs."""
    return [
        details(
            f"{name}: the last {len(lines)} lines" if len(lines) > 1 else f"{name}: the last line",
            element("pre", "\n".join(lines)),
            open=open,
        )
        for name, lines in data.logs.items()
    ]


def gates(data: RunData) -> Markup:
    """Conditions that the recipe declared."""
    if not data.gates:
        return Markup("")
    rows = [
        (
            element(
                "span",
                "holds" if gate.get("passed") else "does not hold",
                class_="chip " + ("r4" if gate.get("passed") else "r0"),
            ),
            gate.get("name"),
            f"{shown(gate.get('value'))} {gate.get('op')} {shown(gate.get('threshold'))}",
        )
        for gate in data.gates[:MAX_ROWS]
    ]
    return section("Gates", table(("", "name", "condition"), rows), id="gates")


def times(data: RunData) -> Markup:
    """The wall time of each stage by phase, and what starting and the rest took."""
    blocks, total = [], 0.0
    for label, stage in zip(data.labels, data.stages, strict=True):
        found = with_optimizer(shares(stage.intervals), stage.optimizer_seconds)
        spent = sum(found.values())
        if spent > 0:
            total += spent
            blocks.append(_stage_times(label if len(data.stages) > 1 else "", found, spent, stage.optimizer_steps))
    if not blocks:
        return Markup("")
    outside = (data.ended or 0.0) - (data.began or 0.0) - total
    note = f"{seconds(total)} of training; starting, loading and saving took {seconds(max(outside, 0.0))} beside it"
    more = "Where phases overlap, they share the time. The optimizer's is the time that the ranks measured."
    return section("Time", *blocks, element("p", more, class_="muted"), id="time", note=note)


def _stage_times(label: str, found: Mapping[str, float], total: float, steps: int) -> Markup:
    place, bars, rows = 0.0, [], []
    for index, (name, spent) in enumerate(found.items()):
        share = spent / total
        colour = _PHASES.get(name, f"p{4 + index % 3}")
        title = element("title", f"{name}: {seconds(spent)}, {share:.1%}")
        bars.append(
            element("rect", title, x=f"{place * 1000:.2f}", width=f"{share * 1000:.2f}", height=26, y=0, class_=colour)
        )
        place += share
        key = joined([element("span", class_=f"swatch {colour}"), escaped(name)])
        rows.append((key, seconds(spent), f"{share:.1%}", seconds(spent / steps) if steps else "–"))
    bar = element("svg", *bars, viewBox="0 0 1000 26", preserveAspectRatio="none", class_="bar", role="img")
    head = (
        element("h3", label, " ", element("small", f"{seconds(total)}, {number(steps)} steps")) if label else Markup("")
    )
    return joined([head, bar, table(("phase", "seconds", "share", "per step"), rows, "numbers")])


def dropped(data: RunData) -> Markup:
    """Samples that were not trained, by reason."""
    if not data.dropped:
        return Markup("")
    rows = [
        (
            element("code", reason),
            number(count),
            f"{count / data.taken:.2%}" if data.taken else "–",
            data.dropped_last.get(reason, "")[:MAX_CELL],
        )
        for reason, count in data.dropped.most_common(MAX_ROWS)
    ]
    taken = f" of {number(data.taken)} taken" if data.taken else ""
    head = ("reason", "samples", "share", "the last one")
    return section("Dropped samples", table(head, rows), id="dropped", note=f"{number(data.dropped.total())}{taken}")


def tables(data: RunData) -> Markup:
    """The last table that was logged under each name."""
    blocks: list[Markup] = []
    room = MAX_TABLE_TEXT
    for stage in data.stages:
        for name, (step, found) in stage.tables.items():
            cells = [
                [str(cell)[:MAX_CELL] for cell in row] for row in found["rows"][:MAX_ROWS] if isinstance(row, list)
            ]
            rows = []
            for row in cells:
                room -= sum(map(len, row))
                rows += [row] if room > 0 else []
            title = f"{name}, step {step}: {len(rows)} of {len(found['rows'])} rows"
            blocks.append(details(title, table(list(found.get("headers") or ()), rows, "texts"), open=not blocks))
    texts = [(name, text[:MAX_CELL]) for stage in data.stages for name, text in stage.texts.items()]
    if texts:
        blocks.append(details("Logged texts, each the last one", table(("name", "text"), texts[:MAX_ROWS], "texts")))
    return section("Tables", *blocks, id="tables") if blocks else Markup("")


_HELD = {"weights": "parameter_bytes", "gradients": "gradient_bytes", "optimizer": "optimizer_bytes", "kv": "kv_bytes"}


def models(data: RunData) -> Markup:
    """Each spawn with what it was promised and what its ranks hold."""
    held: dict[str, dict[Any, list[dict[str, Any]]]] = {}
    for found in data.held:
        held.setdefault(str(found.get("model")), {}).setdefault(found.get("rank"), []).append(found)
    blocks = []
    for spawn in data.planned[:MAX_ROWS]:
        name = str(spawn.get("name"))
        ranks = [queue.pop(0) for queue in held.get(name, {}).values() if queue]
        blocks.append(_spawn(spawn, ranks))
    for name, queues in held.items():
        copies = [queue.pop(0) for queue in queues.values() if queue]
        if copies:
            blocks.append(_spawn({"name": name, "kind": "a frozen copy"}, copies))
    return section("Models", *blocks, id="models") if blocks else Markup("")


def _spawn(spawn: Mapping[str, Any], ranks: list[dict[str, Any]]) -> Markup:
    limits = ("tp", "replicas", "max_batch_size", "kv_cache_len", "tokens_to_generate", "checkpointed_layers")
    words = [f"{name} {number(spawn[name])}" for name in limits if spawn.get(name)]
    if ranks and ranks[0].get("num_parameters"):
        words.insert(0, f"{number(ranks[0]['num_parameters'])} parameters")
        words.insert(1, f"{number(ranks[0].get('trainable_parameters', 0))} trained")
    kind = f"{spawn.get('kind', '')}{' with adapter' if spawn.get('adapter') else ''}"
    found = spawn.get("bytes")
    planned = found if isinstance(found, dict) and found else dict.fromkeys(_HELD)
    rows = []
    for part, count in planned.items():
        amounts = [rank[_HELD[part]] for rank in ranks if part in _HELD and _HELD[part] in rank]
        if count or any(amounts):
            rows.append((part, "–" if count is None else size(count), _range(amounts)))
    title = element(
        "h3", spawn.get("name"), " ", element("small", f"{spawn['model']} for {kind}" if "model" in spawn else kind)
    )
    head = ("per rank", "planned", f"held by {len(ranks)} ranks" if len(ranks) > 1 else "held")
    return element(
        "div", title, element("p", " · ".join(words), class_="muted"), table(head, rows, "numbers"), class_="spawn"
    )


def _range(amounts: list[Any]) -> str:
    if not amounts:
        return ""
    numbers = [amount for amount in amounts if isinstance(amount, int | float)] or [0]
    low, high = size(min(numbers)), size(max(numbers))
    return low if low == high else f"{low} to {high}"


def configuration(data: RunData) -> Markup:
    """Every value of the configuration and where it came from, and what the training classes were made with."""
    rows = []
    for path, value in _leaves(data.config):
        source = data.sources.get(path, "")
        if path == "union_variant" and source == "default":
            continue
        given = source not in ("default", "")
        text = shown(value)[:MAX_CELL]
        rows.append(
            (element("code", path), element("code", text), element("span", source, class_="" if given else "muted"))
        )
    blocks = [table(("name", "value", "from"), rows[:500], "config")] if rows else []
    for stage in data.stages:
        if stage.config:
            pairs = [
                (element("code", name), element("code", shown(value)[:MAX_CELL]))
                for name, value in stage.config.items()
            ]
            blocks.append(details(f"What {stage.name} was made with", table(("name", "value"), pairs, "config")))
    return section("Configuration", *blocks, id="config") if blocks else Markup("")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not path):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def environment(data: RunData) -> Markup:
    """How the run was started, with which versions, and the ends of its logs."""
    run = data.run
    facts = {
        "command": f"adaptive {shlex.join(str(word) for word in data.argv)}" if data.argv else None,
        "folder": run.get("cwd"),
        "host": run.get("host"),
        "started": run.get("started"),
        "ended": run.get("ended"),
        **{
            f"model of {field}": f"{m.get('ref')} ({str(m.get('digest'))[:19]})"
            for field, m in data.models.items()
            if isinstance(m, dict)
        },
        **{name: version for name, version in data.versions.items() if version},
    }
    rows = [(name, element("code", value)) for name, value in facts.items() if value]
    ends = [] if failure(data) else logs(data, open=False)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return section(
        "Environment and logs", table(("", ""), rows, "config"), *ends, id="environment", note=f"report of {made}"
    )
