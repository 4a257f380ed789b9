"""`python -m harmony_client.runtime.runner --recipe-key FILE`."""

from harmony_core.recipe.context import RecipeConfig as RecipeConfig, RecipeContext as RecipeContext
from harmony_core.recipe.runner import (
    INSTALL_TIMEOUT_SECS as INSTALL_TIMEOUT_SECS,
    RunnerArgs as RunnerArgs,
    main as main,
)

if __name__ == "__main__":
    main()
