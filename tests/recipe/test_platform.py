"""Records of the platform, what stands in for its control plane, and its runner's flags."""

from __future__ import annotations

import sys
import time
import uuid

import pytest

from harmony_core.errors import UsageError
from harmony_core.recipe.platform import (
    DEFAULT_MAX_DRAFT_STEPS,
    CheckpointArtifactMetadata,
    ControlPlaneClient,
    ControlPlaneJobNotifier,
    ControlPlaneStageNotifier,
    DatasetConfigResponse,
    InferenceSettings,
    ModelConfigResponse,
    StatDuration,
    StatInstant,
    Thread,
    utils,
    uuid_v7,
)
from harmony_core.recipe.runner import INSTALL_TIMEOUT_SECS, RecipeConfigCli, RunnerArgs, main


def test_identifiers_sort_by_time() -> None:
    before = time.time_ns() // 1_000_000
    made = [uuid.UUID(uuid_v7()) for _ in range(50)]
    assert {one.version for one in made} == {7} and {one.variant for one in made} == {uuid.RFC_4122}
    assert len(set(made)) == 50
    assert all(before <= one.int >> 80 <= time.time_ns() // 1_000_000 for one in made)
    assert uuid.UUID(utils.uuid_v7()).version == 7


@pytest.mark.parametrize("refused", [ControlPlaneClient, ControlPlaneJobNotifier, ControlPlaneStageNotifier])
def test_there_is_no_control_plane(refused: type) -> None:
    with pytest.raises(UsageError, match=f"{refused.__name__} is not here: there is no control plane") as caught:
        refused("https://platform", api_token="t", project="p")
    assert caught.value.hint


def test_records() -> None:
    assert InferenceSettings(100, 10).to_python_dict() == {"kv_cache_len": 100, "tokens_to_generate": 10}
    model = ModelConfigResponse("id", "m", "model_registry://m", tp=2, kv_cache_len=8, max_seq_len=4, extra_params="{}")
    assert (model.model_id, model.model_key, model.harmony_url) == ("id", "m", "model_registry://m")
    assert (model.tp, model.kv_cache_len, model.max_seq_len, model.extra_params) == (2, 8, 4, "{}")
    data = DatasetConfigResponse("id", dataset_key="d", name="D", file_path="d.jsonl", kind="prompts")
    assert (data.dataset_id, data.dataset_key, data.name, data.file_path, data.kind) == (
        *("id", "d", "D", "d.jsonl", "prompts"),
    )
    saved = CheckpointArtifactMetadata(step=3, completion_percentage=50.0)
    assert saved.model_checkpoint_names == {} and saved.user_data is None
    assert [form.name for form in Thread] == ["StringThread", "TokenizedThread", "SerializedThread"]
    assert DEFAULT_MAX_DRAFT_STEPS == 1024


def test_statistics_add_up() -> None:
    since = StatInstant(12.0, 110, 55, 22).stats_since(StatInstant(10.0, 100, 50, 20))
    assert since == StatDuration(2.0, 10, 5, 2)
    both = since.combine(StatDuration(0.0, 1, 1, 1))
    assert both.duration_sec == 2.0 and both.num_input_tokens_per_s == 5.5
    assert (both.num_output_tokens_per_s, both.num_trained_tokens_per_s) == (3.0, 1.5)
    assert (both.num_input_tokens, both.num_output_tokens, both.num_trained_tokens) == (11, 6, 3)
    assert StatDuration(0.0, 1, 1, 1).num_input_tokens_per_s == 0.0


def test_flags_and_variables_of_the_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["runner", "--num-gpus", "2", "--recipe-key", "r.py", "--other", "x"])
    monkeypatch.setenv("ADAPTIVE_WORKING_DIR", "/w")
    monkeypatch.setenv("ADAPTIVE_NUM_GPUS", "4")
    args = RunnerArgs(name="n")
    assert (args.num_gpus, args.working_dir, args.name, args.recipe_key, args.entrypoint) == (
        *(2, "/w", "n", "r.py", "main.py"),
    )
    assert RecipeConfigCli(num_gpus=1).num_gpus == 1
    assert INSTALL_TIMEOUT_SECS == 300


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "hint: --recipe-key main.py, or adaptive run main.py"),
        (["--recipe-key", "r.py", "--resume-checkpoint-artifact-id", "a"], "hint: adaptive run RECIPE --resume RUN"),
    ],
)
def test_the_runner_says_what_to_do_instead(
    flags: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["runner", *flags])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert told in capsys.readouterr().err
