"""Every training class and callback has the documented arguments, in the documented order, with those defaults."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from harmony_core import algorithms

REQUIRED = inspect.Parameter.empty
SHARED = {"logger": None, "stage_notifier": None, "callbacks": ()}
"""Made anew for each object: the documented defaults are shared between all of them."""
CHECKPOINTS = {"checkpoint_restore_data": None, "checkpoint_frequency": 0.2}
GROUPS = {
    "epochs": None,
    "completions_per_sample": 8,
    "lr": 7.5e-7,
    "lr_scheduler": None,
    "samples_per_batch": 128,
    "samples_per_mini_batch": 128,
    "mini_epochs_per_batch": 1,
    "max_grad_norm": 1.0,
}

ENVIRONMENTS = {
    "dataset": REQUIRED,
    "model": REQUIRED,
    "environment_factory": REQUIRED,
    **SHARED,
    "max_num_grpo_steps": None,
    **GROUPS,
    "clip_range": 0.1,
    "kl_beta": 0.1,
    "weight_decays": 0.0,
    "skip_nan_gradients": False,
    **CHECKPOINTS,
    "data_seed": 42,
    "use_tangents": False,
}

DOCUMENTED: dict[str, dict[str, Any]] = {
    "SFT": {
        "dataset": REQUIRED,
        "model": REQUIRED,
        **SHARED,
        "lr": 1e-5,
        "lr_scheduler": None,
        "samples_per_batch": 512,
        "max_grad_norm": 1.0,
        "epochs": 1,
        "weight_decay": 0,
        "skip_nan_gradients": False,
        **CHECKPOINTS,
        "data_seed": 42,
        "use_tangents": False,
    },
    "DPO": {
        "dataset": REQUIRED,
        "model": REQUIRED,
        **SHARED,
        "lr": 1e-6,
        "lr_scheduler": None,
        "samples_per_batch": 32,
        "max_grad_norm": 1.0,
        "kl_beta": 0.1,
        "epochs": 1.0,
        "skip_nan_gradients": False,
        "data_seed": 42,
        "use_tangents": False,
    },
    "RewardModelling": {
        "dataset": REQUIRED,
        "model": REQUIRED,
        "logger": None,
        "job_notifier": None,
        "callbacks": (),
        "lr": 1e-6,
        "lr_scheduler": None,
        "samples_per_batch": 64,
        "max_grad_norm": 1.0,
        "epochs": 1,
        "skip_nan_gradients": False,
        "data_seed": 42,
    },
    "GRPO": {
        "dataset": REQUIRED,
        "model": REQUIRED,
        "grader": REQUIRED,
        **SHARED,
        "max_num_grpo_steps": None,
        **GROUPS,
        "clip_range": 0.1,
        "kl_beta": 0.01,
        "weight_decay": 0.0,
        "skip_nan_gradients": False,
        **CHECKPOINTS,
        "data_seed": 42,
        "use_tangents": False,
    },
    "GSPO": {
        "dataset": REQUIRED,
        "model": REQUIRED,
        "grader": REQUIRED,
        **SHARED,
        "max_num_gspo_steps": None,
        **GROUPS,
        "clip_range": 0.01,
        "kl_beta": 0.01,
        "weight_decay": 0.0,
        **CHECKPOINTS,
        "data_seed": 42,
    },
    "PPO": {
        "dataset": REQUIRED,
        "model": REQUIRED,
        "value_model": REQUIRED,
        "grader": REQUIRED,
        **SHARED,
        "max_num_ppo_steps": None,
        "epochs": None,
        "value_only_fraction": 0.25,
        "lr_policy": 0.75e-6,
        "lr_scheduler_policy": None,
        "lr_scheduler_value": None,
        "lr_value": 1e-6,
        "samples_per_batch": 128,
        "samples_per_mini_batch": 128,
        "mini_epochs_per_batch": 1,
        "max_grad_norm": 1.0,
        "clip_range": 0.1,
        "kl_beta": 0.1,
        "gae_lambda": 0.95,
        "gae_gamma": 1.0,
        "weight_decay": 0,
        "skip_nan_gradients": False,
        **CHECKPOINTS,
        "data_seed": 42,
    },
    "ENVGRPO": ENVIRONMENTS,
    "ENVGSPO": {**ENVIRONMENTS, "clip_range": 0.01},
    "ENVPPO": {
        "dataset": REQUIRED,
        "model": REQUIRED,
        "value_model": REQUIRED,
        "environment_factory": REQUIRED,
        "use_kl_in_loss": REQUIRED,
        **SHARED,
        "max_num_ppo_steps": None,
        "epochs": None,
        "value_only_fraction": 0.25,
        "lr_policy": 0.75e-6,
        "lr_scheduler_policy": None,
        "lr_scheduler_value": None,
        "lr_value": 1e-6,
        "samples_per_batch": 128,
        "samples_per_mini_batch": 128,
        "mini_epochs_per_batch": 1,
        "max_grad_norm": 1.0,
        "clip_range": 0.1,
        "kl_beta": 0.1,
        "gae_lambda": 0.95,
        "gae_gamma": 1.0,
        "weight_decay": 0,
        "skip_nan_gradients": False,
        **CHECKPOINTS,
        "data_seed": 42,
    },
    "RecipeCallback": {"frequency": REQUIRED, "force_run_on_exit": True, "log_key_prefix": None},
    "GenerateSamplesCallback": {
        "thread_set": REQUIRED,
        "model": REQUIRED,
        "frequency": REQUIRED,
        "log_key": "samples",
    },
    "ValidationLossCallback": {"validation_set": REQUIRED, "model": REQUIRED, "frequency": 0.1, "log_key": "loss"},
    "GraderEvalCallback": {
        "validation_set": REQUIRED,
        "model": REQUIRED,
        "grader": REQUIRED,
        "frequency": REQUIRED,
        "log_key": "validation",
        "clear_grader_logs": True,
        "temperature": 0.0,
    },
    "EnvironmentValidationCallback": {
        "validation_set": REQUIRED,
        "model": REQUIRED,
        "env_factory": REQUIRED,
        "frequency": REQUIRED,
        "log_key": "validation",
        "clear_env_logs": True,
        "temperature": 0.0,
        "num_samples_log": 0,
    },
    "CheckpointCallback": {"model": REQUIRED, "checkpoint_name": REQUIRED, "frequency": 0.2},
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_arguments_and_defaults(name: str) -> None:
    parameters = inspect.signature(getattr(algorithms, name)).parameters.values()
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == list(DOCUMENTED[name].items())


def test_the_table_names_every_public_class() -> None:
    classes = {name for name in algorithms.__all__ if inspect.isclass(getattr(algorithms, name))}
    assert classes == set(DOCUMENTED)
