"""What a run leaves on the terminal: its result or its plan on stdout, the rest on stderr."""

from __future__ import annotations

from typing import Any

from harmony_core.ledger import format_size
from harmony_core.recipe import Recipe

from . import output


def print_result(data: dict[str, Any], recipe: Recipe, models: dict[str, Any], quiet: bool, as_json: bool) -> None:
    """The result of a finished run."""
    output.tell_errors(data["errors"])
    for gate in data["gates"]:
        held = "holds" if gate["passed"] else "does not hold"
        if not quiet or not gate["passed"]:
            output.tell(f"gate {gate['name']}: {gate['value']} {gate['op']} {gate['threshold']} {held}")
    if not quiet:
        for model in data["models"]:
            output.tell(f"saved {model.get('ref')}")
    if not as_json and data["result"] is not None:
        result = data["result"]
        output.data(result if isinstance(result, str) else output.dumped(result))


def print_plan(data: dict[str, Any], recipe: Recipe, models: dict[str, Any], quiet: bool, as_json: bool) -> None:
    """The plan that a dry run made."""
    output.tell_errors(data["errors"])
    if as_json:
        return
    output.data(f"recipe   {recipe.path}")
    for field, model in models.items():
        output.data(f"model    {field}: {model['ref']} ({model['digest'][:19]})")
    for spawn in data.get("plan", ()):
        output.data(_spawn(spawn))
    if data["exit"] == 0:
        where = data.get("planned_until")
        output.data(f"planned  {'up to ' + where if where else 'to the end of the recipe'}; nothing was started")


def _spawn(spawn: dict[str, Any]) -> str:
    limits = [f"tp={spawn['tp']}", f"replicas={spawn['replicas']}"]
    limits += [f"{name}={spawn[name]}" for name in ("max_batch_size", "kv_cache_len") if spawn.get(name)]
    sizes = spawn.get("bytes", {})
    parts = ", ".join(f"{name} {format_size(size)}" for name, size in sizes.items() if size and name != "total")
    kind = f"{spawn['kind']}{' with adapter' if spawn.get('adapter') else ''}"
    return (
        f"spawn    {spawn['name']}: {spawn['model']} for {kind}, {' '.join(limits)}\n"
        f"         {format_size(sizes.get('total', 0))} per rank: {parts}"
    )
