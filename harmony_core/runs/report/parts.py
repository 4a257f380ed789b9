"""What the page's larger parts show, as plain data for its template: times, samples, tables, models, configuration."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from harmony_core.runs.report.figures import WAITING, number, seconds, shares, shown, size, with_optimizer
from harmony_core.runs.report.reading import RunData, Stage

MAX_ROWS = 50
MAX_CELL = 2000
MAX_TABLE_TEXT = 1_000_000
"""Characters of all tables together."""
MAX_TOKENS = 800
"""Trained tokens of one sample that are coloured one by one; the rest of it is one piece."""

_PHASES = {"rollout": "p0", "training": "p1", "grading": "p2", "optimizer": "p3", "reference": "p4", "values": "p5"}
_PHASES |= {"callbacks": "p6", WAITING: "p-wait"}
"""The same colour for a phase in every stage."""

_HELD = {"weights": "parameter_bytes", "gradients": "gradient_bytes", "optimizer": "optimizer_bytes", "kv": "kv_bytes"}
_LIMITS = ("tp", "replicas", "max_batch_size", "kv_cache_len", "tokens_to_generate", "checkpointed_layers")


def times(data: RunData) -> dict[str, Any]:
    """The wall time of each stage by phase, and what starting and the rest took."""
    found = [_stage_times(label, stage) for label, stage in zip(data.labels, data.stages, strict=True)]
    stages = [stage | {"label": len(data.stages) > 1 and stage["label"]} for stage in found if stage["total"] > 0]
    total = sum(stage["total"] for stage in stages)
    outside = max((data.ended or 0.0) - (data.began or 0.0) - total, 0.0)
    note = f"{seconds(total)} of training; starting, loading and saving took {seconds(outside)} beside it"
    return {"stages": stages, "times_note": note}


def _stage_times(label: str, stage: Stage) -> dict[str, Any]:
    found = with_optimizer(shares(stage.intervals), stage.optimizer_seconds)
    total, place, phases = sum(found.values()), 0.0, []
    for index, (name, spent) in enumerate(found.items() if total > 0 else ()):
        colour = _PHASES.get(name, f"p{4 + index % 3}")
        phases.append({"name": name, "seconds": spent, "share": spent / total, "place": place, "colour": colour})
        place += spent / total
    return {"label": label, "total": total, "steps": stage.optimizer_steps, "phases": phases}


def samples(data: RunData) -> dict[str, Any]:
    """Every sample as a card: rewards as chips, trained tokens coloured."""
    found = data.samples
    rewards = [value for sample in found if (value := _number(sample.get("reward"))) is not None]
    low, high = min(rewards, default=0.0), max(rewards, default=0.0)
    return {
        "cards": [_card(sample, low, high, data.labels) for sample in found],
        "with_advantages": any("advantage" in sample for sample in found),
    }


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _card(sample: dict[str, Any], low: float, high: float, stages: list[str]) -> dict[str, Any]:
    where = f"{stages[sample['stage']]} step {sample['step']}" if len(stages) > 1 else f"step {sample['step']}"
    reward, advantage, grades = sample.get("reward"), sample.get("advantage"), sample.get("grades")
    chips = [("reward", reward, _level(_number(reward), low, high))] if "reward" in sample else []
    chips += [("advantage", advantage, "plain")] if "advantage" in sample else []
    chips += [(name, value, "plain") for name, value in (grades.items() if isinstance(grades, dict) else ())]
    sign = _number(advantage) or 0.0
    direction = " up" if sign > 0 else " down" if sign < 0 else ""
    return {
        "where": where,
        "reward": reward,
        "places": [where, sample.get("source", ""), *([f"group {sample['group']}"] if "group" in sample else ())],
        "chips": [(name, value if _number(value) is None else number(value), level) for name, value, level in chips],
        "turns": [
            (turn.get("role", "?"), _pieces(turn.get("pieces"), direction))
            for turn in sample["turns"]
            if isinstance(turn, dict)
        ],
        "cut": sample.get("cut"),
    }


def _level(reward: float | None, low: float, high: float) -> str:
    return "plain" if reward is None or high <= low else f"r{min(int((reward - low) / (high - low) * 5), 4)}"


def _pieces(found: object, direction: str) -> list[tuple[Any, str, str]]:
    """(text, class, title) of each piece of a turn; what is not trained has no class."""
    pieces = (
        [piece for piece in found if isinstance(piece, list) and len(piece) >= 2] if isinstance(found, list) else []
    )
    most = max((abs(_number(piece[1]) or 0.0) for piece in pieces), default=0.0)
    shown = []
    for place, piece in enumerate(pieces):
        weight = _number(piece[1]) or 0.0
        trained = weight and place < MAX_TOKENS
        shown.append(_token(piece, weight / most, direction, bool(place % 2)) if trained else (piece[0], "", ""))
    return shown


def _token(piece: list[Any], share: float, direction: str, odd: bool) -> tuple[str, str, str]:
    text, title = str(piece[0]), f"weight {piece[1]}"
    logprob = _number(piece[2]) if len(piece) > 2 else None
    if logprob is not None:
        title += f", log-prob {logprob:.3f}, probability {math.exp(min(logprob, 0.0)):.1%}"
    level = max(1, min(math.ceil(abs(share) * 4), 4))
    marks = f"{' odd' if odd else ''}{' nl' if text.endswith(chr(10)) else ''}"
    return text, f"t w{level}{direction}{marks}" if text else "", title


def tables(data: RunData) -> dict[str, Any]:
    """The last table and the last text that was logged under each name."""
    blocks, room = [], MAX_TABLE_TEXT
    for stage in data.stages:
        for name, (step, found) in stage.tables.items():
            rows = []
            for row in found["rows"][:MAX_ROWS]:
                cells = [str(cell)[:MAX_CELL] for cell in row] if isinstance(row, list) else []
                room -= sum(map(len, cells))
                rows += [cells] if isinstance(row, list) and room > 0 else []
            title = f"{name}, step {step}: {len(rows)} of {len(found['rows'])} rows"
            blocks.append((title, list(found.get("headers") or ()), rows))
    texts = [(name, text[:MAX_CELL]) for stage in data.stages for name, text in stage.texts.items()]
    return {"tables": blocks, "texts": texts[:MAX_ROWS]}


def spawns(data: RunData) -> list[dict[str, Any]]:
    """Each spawn with what it was promised and what its ranks hold."""
    held: dict[str, dict[Any, list[dict[str, Any]]]] = {}
    for found in data.held:
        held.setdefault(str(found.get("model")), {}).setdefault(found["rank"], []).append(found)
    blocks = []
    for spawn in data.planned[:MAX_ROWS]:
        queues = held.get(str(spawn.get("name")), {})
        blocks.append(_spawn(spawn, [queue.pop(0) for queue in queues.values() if queue]))
    for name, queues in held.items():
        if copies := [queue.pop(0) for queue in queues.values() if queue]:
            blocks.append(_spawn({"name": name, "kind": "a frozen copy"}, copies))
    return blocks


def _spawn(spawn: Mapping[str, Any], ranks: list[dict[str, Any]]) -> dict[str, Any]:
    words = [f"{name} {number(spawn[name])}" for name in _LIMITS if spawn.get(name)]
    if ranks and ranks[0].get("num_parameters"):
        trained = number(ranks[0].get("trainable_parameters", 0))
        words = [f"{number(ranks[0]['num_parameters'])} parameters", f"{trained} trained", *words]
    kind = f"{spawn.get('kind', '')}{' with adapter' if spawn.get('adapter') else ''}"
    found = spawn.get("bytes")
    planned = found if isinstance(found, dict) and found else dict.fromkeys(_HELD)
    rows = []
    for part, count in planned.items():
        amounts = [rank[_HELD[part]] for rank in ranks if part in _HELD and _HELD[part] in rank]
        if count or any(amounts):
            rows.append((part, "–" if count is None else size(count), _range(amounts)))
    kind = f"{spawn['model']} for {kind}" if "model" in spawn else kind
    return {"name": spawn.get("name"), "kind": kind, "words": words, "rows": rows, "ranks": len(ranks)}


def _range(amounts: list[Any]) -> str:
    numbers = [amount for amount in amounts if isinstance(amount, int | float)] or [0]
    low, high = size(min(numbers)), size(max(numbers))
    return "" if not amounts else low if low == high else f"{low} to {high}"


def configuration(data: RunData) -> dict[str, Any]:
    """Every value of the configuration and where it came from, what training classes were made with, and the start."""
    run = data.run
    settings = [(path, shown(value)[:MAX_CELL], data.sources.get(path, "")) for path, value in _leaves(data.config)]
    facts = {
        "command": f"adaptive {shlex.join(str(word) for word in data.argv)}" if data.argv else None,
        "folder": run.get("cwd"),
        **{name: run.get(name) for name in ("host", "started", "ended")},
        **{
            f"model of {field}": f"{m.get('ref')} ({str(m.get('digest'))[:19]})"
            for field, m in data.models.items()
            if isinstance(m, dict)
        },
        **{name: version for name, version in data.versions.items() if version},
    }
    return {
        "settings": [s for s in settings if (s[0], s[2]) != ("union_variant", "default")][:500],
        "made_with": [
            (stage.name, [(name, shown(value)[:MAX_CELL]) for name, value in stage.config.items()])
            for stage in data.stages
            if stage.config
        ],
        "facts": list(facts.items()),
    }


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not path):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
