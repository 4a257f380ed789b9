"""Models, datasets and graders in a configuration."""

from harmony_client.parameters import dataset_kinds as dataset_kinds, model_kinds as model_kinds
from harmony_core.config.parameters import Dataset as Dataset, Model as Model
from harmony_core.data.samples import SampleMetadata as SampleMetadata
from harmony_core.graders.keys import Grader as Grader
from harmony_core.recipe.context import RecipeContext as RecipeContext
from harmony_core.text.threads import StringThread as StringThread
