"""`__all__` is the promise: it is true, whole, in order, and what the documentation lists is there."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator

import pytest

from source_tree import ROOT, modules

MODULES = modules()
PUBLIC = {
    module: file
    for module, file in MODULES.items()
    if "__all__" in file.read_text(encoding="utf-8") and not module.startswith("harmony_core.engine")
}
ALIASES = sorted(module for module in MODULES if module.startswith("adaptive_harmony"))
COMPATIBILITY = ROOT / "docs" / "compatibility.md"


def in_order(names: list[str]) -> list[str]:
    """CONSTANTS, then Classes, then functions, each by the alphabet."""
    return sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))


def own_imports(module: str) -> set[str]:
    """Public names that a module takes from the distribution with unindented imports."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (
            "adaptive_harmony",
            "harmony_core",
        ):
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
    packages = [module for module, file in MODULES.items() if file.name == "__init__.py" and not has_code(module)]
    silent = [
        module
        for module in packages
        if own_imports(module) and module not in PUBLIC and not module.startswith("harmony_core.engine")
    ]
    assert silent == []


@pytest.mark.parametrize("module", ALIASES)
def test_an_alias_defines_nothing(module: str) -> None:
    """Docstring, imports and `__all__`: whatever a recipe imports by the documented name is the thing itself."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body[1:]:
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert is_all or isinstance(node, ast.ImportFrom), f"line {node.lineno}"


def section(title: str) -> str:
    """The text of docs/compatibility.md under one heading."""
    parts = re.split(r"^## (.+)$", COMPATIBILITY.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[title]


def rows(text: str) -> Iterator[tuple[str, list[str]]]:
    """(owner, names) of each table row whose first cell is one name in backticks."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        owner = re.fullmatch(r"`([\w.]+)`", cells[0])
        if line.startswith("|") and owner and len(cells) > 1:
            yield owner[1], re.findall(r"`([\w.]+)`", cells[1])


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


def has(owner: str, name: str) -> bool:
    try:
        found = find(owner)
    except (ModuleNotFoundError, AttributeError):
        return False
    fields = {**getattr(found, "__annotations__", {}), **getattr(found, "model_fields", {})}
    return hasattr(found, name) or name in fields


def test_everything_in_the_table_is_there() -> None:
    listed = list(rows(section("What is there")))
    assert len(listed) > 15 and sum(len(names) for _, names in listed) > 120
    assert [f"{owner}.{name}" for owner, names in listed for name in names if not has(owner, name)] == []


def test_every_public_alias_is_in_the_table() -> None:
    """A module that re-exports one listed elsewhere needs no row of its own."""
    listed = dict(rows(section("What is there")))
    named = {name for names in listed.values() for name in names}
    for module in ALIASES:
        names = set(getattr(importlib.import_module(module), "__all__", []))
        assert names <= (set(listed[module]) if module in listed else named), module


def test_nothing_is_listed_as_missing_that_is_there() -> None:
    listed = list(rows(section("What is not there")))
    assert len(listed) > 5
    assert [f"{owner}.{name}" for owner, names in listed for name in names if has(owner, name)] == []


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
