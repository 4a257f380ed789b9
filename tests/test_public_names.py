"""`__all__` is the promise: it is true, whole and in order. Of documented names see test_api_surface.py."""

from __future__ import annotations

import ast
import importlib
import inspect

import pytest

from source_tree import modules

MODULES = modules()
PUBLIC = {
    module: file
    for module, file in MODULES.items()
    if "__all__" in file.read_text(encoding="utf-8") and not module.startswith("harmony_core.engine")
}


def in_order(names: list[str]) -> list[str]:
    """CONSTANTS, then Classes, then functions, each by the alphabet."""
    return sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))


def own_imports(module: str) -> set[str]:
    """Public names that a module takes from the distribution with unindented imports."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "harmony_core":
            found |= {alias.asname or alias.name for alias in node.names}
    return {name for name in found if not name.startswith("_")}


@pytest.mark.parametrize("module", PUBLIC)
def test_all_is_true_and_in_order(module: str) -> None:
    loaded = importlib.import_module(module)
    names = list(loaded.__all__)
    assert names == in_order(names)
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(loaded, name)] == []


@pytest.mark.parametrize("module", [m for m in PUBLIC if PUBLIC[m].name == "__init__.py"])
def test_a_package_offers_all_that_it_imports(module: str) -> None:
    assert set(importlib.import_module(module).__all__) == own_imports(module)


def has_code(module: str) -> bool:
    """Whether the module defines something itself, instead of only collecting names of others."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    return any(isinstance(node, ast.ClassDef | ast.FunctionDef) for node in tree.body)


def test_every_package_with_a_public_face_says_so() -> None:
    ours = {module: file for module, file in MODULES.items() if module.startswith("harmony_core")}  # no aliases
    packages = [module for module, file in ours.items() if file.name == "__init__.py" and not has_code(module)]
    silent = [
        module
        for module in packages
        if own_imports(module) and module not in PUBLIC and not module.startswith("harmony_core.engine")
    ]
    assert silent == []


def find(dotted: str) -> object:
    """An object by `module.Class`; raises when there is none."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(dotted)


ARGUMENTS = """
adaptive_harmony.InferenceModel.generate: thread response_model return_timings
adaptive_harmony.InferenceModel.tokenize: data
adaptive_harmony.InferenceModel.detokenize: data
adaptive_harmony.InferenceModel.raw_string_create: prompt
adaptive_harmony.InferenceModel.raw_logprobs: tokens
adaptive_harmony.InferenceModel.top_p: top_p
adaptive_harmony.InferenceModel.temperature: temperature
adaptive_harmony.InferenceModel.max_gen_len: max_num_tokens
adaptive_harmony.InferenceModel.min_gen_len: min_num_tokens
adaptive_harmony.ModelBuilder.max_seqlen: max_seqlen
adaptive_harmony.ModelBuilder.spawn_train: name max_batch_size
adaptive_harmony.ModelBuilder.with_adapter: use_adapter
adaptive_harmony.TrainingModel.optim_step: lr wd max_grad_norm skip_nan_gradients
adaptive_harmony.TrainingModel.save: model_name inference_only draft_target num_draft_steps ctx
adaptive_harmony.TrainingModel.set_optim_step: step
adaptive_harmony.TrainingModel.train_ppo: thread trajectory_logprobs advantages clip_range
adaptive_harmony.TrainingModel.train_grpo: thread trajectory_logprobs reference_logprobs advantages clip_range kl_beta
adaptive_harmony.TrainingModel.train_gspo: thread trajectory_logprobs reference_logprobs advantage left_clip right_clip
adaptive_harmony.TrainingModel.train_trust_region_mse: thread targets clip_center clip_range
adaptive_harmony.TrainingModel.train_mse_per_token: thread targets
adaptive_harmony.TrainingModel.train_ranking: pos_thread neg_thread
adaptive_harmony.TrainingModel.train_dpo: sample_pos sample_neg ref_logprobs_pos ref_logprobs_neg beta
adaptive_harmony.TrainingModel.train_tangents: inp_tokens image_patches tangents tgt_tokens
adaptive_harmony.common.DPO.process_sample: sample
adaptive_harmony.common.RewardModelling.train_rm: sample
adaptive_harmony.common.GRPO.gen_data: sample
adaptive_harmony.common.GRPO.train_sample: sample
adaptive_harmony.common.GRPO.get_train_batch_logs: data
adaptive_harmony.common.GSPO.train_sample: sample
adaptive_harmony.common.PPO.generate_sample: prompt
adaptive_harmony.common.PPO.train_ppo: sample
adaptive_harmony.common.PPO.train_value: sample
adaptive_harmony.common.PPO.get_train_batch_logs: data
adaptive_harmony.core.losses.train_grpo_tangents: model sample trajectory_logprobs ref_logprobs advantages clip_range
adaptive_harmony.core.losses.train_dpo_tangents: model pos neg ref_logprobs_pos ref_logprobs_neg beta
adaptive_harmony.core.rl_utils.gae_advantages: values rewards gae_lambda gae_gamma
adaptive_harmony.graders.BaseGrader.from_function: grader_key async_fn
"""
"""The documented names of the first arguments, in order: calls may use them as keywords."""


@pytest.mark.parametrize("line", ARGUMENTS.strip().splitlines())
def test_arguments_have_their_documented_names(line: str) -> None:
    dotted, _, names = line.partition(": ")
    found = find(dotted)
    assert callable(found)
    parameters = [name for name in inspect.signature(found).parameters if name != "self"]
    assert parameters[: len(names.split())] == names.split()
