"""The documented import path: every name is there, is the one of harmony_core, and nothing else is in it."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import adaptive_harmony

FOLDER = Path(adaptive_harmony.__file__).parent

DOCUMENTED = {
    "adaptive_harmony": """
        CombinedSchedule CosineScheduler CosineSchedulerWithoutWarmup DataSet Grade HarmonyClient InferenceModel
        JobNotifier Logger ModelBuilder Scheduler StageNotifier StdoutJobNotifier StdoutStageNotifier StringThread
        StringTurn TokenizedThread TrainingModel WandbLogger get_client parameters runtime
    """,
    "adaptive_harmony.parameters": "Dataset Grader Model dataset_kinds model_kinds",
    "adaptive_harmony.runtime": """
        InputConfig JobNotifier RecipeConfig RecipeContext SimpleProgressNotifier StageNotifier StdoutJobNotifier
        StdoutStageNotifier recipe_main
    """,
    "adaptive_harmony.runtime.context": "RecipeConfig RecipeContext RecipeContextManager",
    "adaptive_harmony.runtime.data": "InputConfig",
    "adaptive_harmony.runtime.decorators": "recipe_main",
    "adaptive_harmony.runtime.simple_notifier": "SimpleProgressNotifier",
    "adaptive_harmony.graders": "BaseGrader Grade",
    "adaptive_harmony.graders.base_grader": "BaseGrader",
    "adaptive_harmony.graders.exceptions": "IgnoreGradeException",
    "adaptive_harmony.graders.utils": "FailedJudgeLog SuccessJudgeLog",
    "adaptive_harmony.common": """
        CheckpointCallback DPO GRPO GSPO GenerateSamplesCallback GraderEvalCallback PPO RecipeCallback RewardModelling
        SFT ValidationLossCallback
    """,
    "adaptive_harmony.common.dpo": "DPO",
    "adaptive_harmony.common.grpo": "GRPO",
    "adaptive_harmony.common.gspo": "GSPO",
    "adaptive_harmony.common.ppo": "PPO",
    "adaptive_harmony.common.rm": "RewardModelling",
    "adaptive_harmony.common.sft": "SFT",
    "adaptive_harmony.common.callbacks": """
        CheckpointCallback GenerateSamplesCallback GraderEvalCallback RecipeCallback ValidationLossCallback
        invoke_callbacks
    """,
    "adaptive_harmony.metric_logger": """
        CompositeLogger Logger MLFlowLogger StdoutLogger TBMetricsLogger WandbLogger get_prod_logger
    """,
    "adaptive_harmony.logging_table": "Table",
    "adaptive_harmony.core": "",
    "adaptive_harmony.core.schedulers": "CombinedSchedule CosineScheduler CosineSchedulerWithoutWarmup Scheduler",
    "adaptive_harmony.core.dataset": "DataSet convert_sample_dict load_from_hf",
    "adaptive_harmony.core.losses": "train_dpo_tangents train_grpo_tangents train_sft_tangents",
    "adaptive_harmony.core.rl_utils": "discounted_cumulative_rewards gae_advantages gae_td_returns",
    "adaptive_harmony.core.utils": """
        async_map async_map_batch async_map_fallible get_minibatches override_system_prompt repeat_thread sample_data
        stringify_thread weighted_mean
    """,
}


def module_names() -> set[str]:
    files = (file.relative_to(FOLDER.parent).with_suffix("") for file in FOLDER.rglob("*.py"))
    return {".".join(file.parts).removesuffix(".__init__") for file in files}


def test_every_module_is_listed_here() -> None:
    assert module_names() == set(DOCUMENTED)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_names_are_there(name: str) -> None:
    module = importlib.import_module(name)
    expected = set(DOCUMENTED[name].split())
    exported = set(getattr(module, "__all__", ()))
    assert expected <= exported
    for attribute in exported:
        found = getattr(module, attribute)
        home = getattr(found, "__module__", None) or getattr(found, "__name__", "")
        assert home.startswith(("harmony_core.", "adaptive_harmony.", "collections.abc")), attribute


def test_it_only_imports() -> None:
    for file in FOLDER.rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            assert is_docstring or is_all or isinstance(node, ast.ImportFrom), f"{file.name}: {ast.unparse(node)[:60]}"


def test_importing_all_of_it_is_light() -> None:
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {sorted(DOCUMENTED)}]; "
        "print(sorted({'torch', 'transformers', 'accelerate', 'peft', 'rich', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
