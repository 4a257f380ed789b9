"""What a run was given, written into its directory before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harmony_core.config.snapshot import as_data, as_yaml, sources_of
from harmony_core.recipe import Recipe
from harmony_core.run import Run

from .resume import Resumption, spec_of

if TYPE_CHECKING:
    from .run import Prepared


def record_inputs(run: Run, recipe: Recipe, prepared: Prepared) -> None:
    """The configuration with its sources, the files that it came from, the recipe, and the models by digest."""
    data = as_data(prepared.config)
    run.redactor = run.events.redactor = run.redactor.knowing(data)
    run.write_text("config.yaml", as_yaml(run.redactor.data(data)))
    run.write_json("sources.json", sources_of(data, prepared.configured.resolved))
    run.write_json("models.json", prepared.models)
    run.keep_inputs([recipe.path, *prepared.configured.files])
    run.note(recipe=spec_of(recipe), recipe_sha256=recipe.sha256)
    details: dict[str, Any] = {"recipe": str(recipe.path), "sha256": recipe.sha256, "models": prepared.models}
    run.events.write("config.resolved", details | {"config": run.redactor.data(data)})


def record_resumption(run: Run, resumption: Resumption, prepared: Prepared) -> None:
    """From where the run goes on, and with what that is not as before."""
    run.redactor = run.events.redactor = run.redactor.knowing(as_data(prepared.config))
    run.events.write("resumed", {"checkpoint": resumption.checkpoint.name, "changes": prepared.changes})
