"""A model that a recipe saves is an artifact of its run."""

from __future__ import annotations

from pathlib import Path

from engines import LiveEngine, pair
from harmony_core.artifacts import save_with_artifact
from harmony_core.home import Home
from harmony_core.notifiers import JobNotifier
from harmony_core.recipe.context import RecipeContext
from harmony_core.runs.records import find_run
from harmony_core.runs.run import Run


def test_saving_registers(one_rank: LiveEngine, tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    run = Run.create(home)
    job = JobNotifier(run.id, events=run.events.write)

    async def save() -> list[str]:
        ctx = RecipeContext.create(one_rank.client, run, one_rank.registry, run.directory, job)
        model = await one_rank.client.model("builtin:tiny-lm").with_adapter().spawn_train("saved", max_batch_size=64)
        await model.train_language_modelling(pair("ping", "pong"))
        await model.optim_step(1e-3, 0.0, 1.0)
        refs = [await model.save("artifact/mine", ctx=ctx), await save_with_artifact(model, "artifact/mine", ctx=ctx)]
        await model.save("artifact/other")
        await model.dealloc()
        return refs

    refs = one_rank.run(save())
    run.finish("succeeded", 0, {}, report=False)
    found = find_run(home, run.id).artifacts()
    assert [(entry["kind"], entry["name"]) for entry in found] == [("model", ref) for ref in refs]
    assert refs == ["artifact/mine@1", "artifact/mine@2"]
