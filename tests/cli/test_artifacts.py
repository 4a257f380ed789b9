"""`adaptive runs show`: the artifacts of a run."""

from __future__ import annotations

from typing import Any

from harmony_core.home import Home
from harmony_core.runs.run import Run

RECIPE = """
from adaptive_harmony.runtime import RecipeContext, recipe_main
from harmony_core.artifacts import CustomArtifact, ModelArtifact

@recipe_main
async def main(ctx: RecipeContext) -> None:
    ModelArtifact("mine@1", ctx)
    CustomArtifact("notes", ctx, file="notes.txt").write("x" * 2048)
    raise ValueError("after all")
"""


def test_they_are_listed_also_of_a_failed_run(adaptive: Any) -> None:
    with open("leaves.py", "w") as file:
        file.write(RECIPE)
    assert adaptive("run", "leaves.py", "--device", "cpu").code == 1
    done = adaptive("runs", "show")
    lines = [line for line in done.out.splitlines() if line.startswith("artifact")]
    assert lines[0] == "artifact   mine@1: model"
    assert lines[1].startswith("artifact   notes: custom, 2.0 KiB, ") and lines[1].endswith("/artifacts/notes.txt")
    found = adaptive("runs", "show", "--json").json
    assert [entry["kind"] for entry in found["artifacts"]] == ["model", "custom"]
    assert found["artifacts"][1]["path"].startswith(f"job_{found['run']['id']}/")


def test_entries_of_another_shape_are_left_out(adaptive: Any) -> None:
    run = Run.create(Home.open(), "odd")
    fields = {"id": "1", "name": ["n"], "kind": "eval", "path": None, "bytes": "many", "metadata": 3}
    for data in ({}, {"path": 3}, {**fields, "path": ["a"]}, fields):
        run.events.write("artifact", data)
    run.finish("succeeded", 0, {}, report=False)
    with (run.directory / "events.jsonl").open("a") as file:
        file.write('{"type": "artifact", "da')
    done = adaptive("runs", "show")
    assert [line for line in done.out.splitlines() if line.startswith("artifact")] == ["artifact   ['n']: eval"]
