"""`python -m adaptive_harmony.runtime.runner --recipe-key FILE`."""

from harmony_client.runtime.runner import (
    INSTALL_TIMEOUT_SECS as INSTALL_TIMEOUT_SECS,
    RecipeConfig as RecipeConfig,
    RecipeContext as RecipeContext,
    RunnerArgs as RunnerArgs,
    main as main,
)

if __name__ == "__main__":
    main()
