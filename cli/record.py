"""What a run was given, written into its directory before it starts."""

from __future__ import annotations

from typing import Any

from harmony_core.config.snapshot import as_data, as_yaml, sources_of
from harmony_core.recipe import InputConfig, Recipe
from harmony_core.run import Run

from .configuration import Configured


def record_inputs(
    run: Run, recipe: Recipe, configured: Configured, config: InputConfig | None, models: dict[str, dict[str, str]]
) -> None:
    """The configuration with its sources, the files that it came from, the recipe, and the models by digest."""
    data = as_data(config)
    run.redactor = run.events.redactor = run.redactor.knowing(data)
    run.write_text("config.yaml", as_yaml(run.redactor.data(data)))
    sources = sources_of(data, configured.resolved)
    run.write_json("sources.json", sources)
    run.write_json("models.json", models)
    run.keep_inputs([recipe.path, *configured.files])
    details: dict[str, Any] = {"recipe": str(recipe.path), "sha256": recipe.sha256, "models": models}
    run.events.write("config.resolved", details | {"config": run.redactor.data(data)})
