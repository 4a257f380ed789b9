"""Code as recipes of the platform write it: only documented import paths, on a real engine where a model is needed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adaptive_harmony import StdoutStageNotifier, spawn_inference, spawn_train
from adaptive_harmony.artifacts import DatasetSampleType
from adaptive_harmony.common import DPO, GRPO, PPO, EnvironmentValidationCallback
from adaptive_harmony.common.env_grpo import ENVGRPO, ENVGRPO_HYPERPARAMS
from adaptive_harmony.common.env_gspo import ENVGSPO_HYPERPARAMS
from adaptive_harmony.common.env_ppo import ENVPPO
from adaptive_harmony.common.grpo import GRPO_HYPERPARAMS, FloatArray
from adaptive_harmony.common.ppo import PPO_HYPERPARAMS
from adaptive_harmony.common.sft import SFT_HYPERPARAMS
from adaptive_harmony.core.reward_client import MetadataValidationResponse, Response, ServerInfo
from adaptive_harmony.core.reward_client.client import INFO_PATH, METADATA_SCHEMA_PATH, SCORE_PATH
from adaptive_harmony.core.reward_client.reward_types import MetadataType
from adaptive_harmony.environment.environment import Environment, GradeAggregator
from adaptive_harmony.graders import BaseGrader, CombinedGrader, Grade
from adaptive_harmony.graders.answer_relevancy_judge import AnswerRelevancyResults, StatementRelevancy
from adaptive_harmony.graders.base_grader import get_model
from adaptive_harmony.graders.binary_judge import OPENAI_MODEL_FAMILIES_TEMPERATURE_1_ONLY, BinaryJudgeOutput, ScoresMap
from adaptive_harmony.graders.context_relevancy_judge import DocumentRelevancyResult
from adaptive_harmony.graders.exceptions import IgnoreGradeException
from adaptive_harmony.graders.faithfulness_judge import (
    FaithfulnessGraderOutput,
    SingleStatementFaithfulnessJudgeOutput,
    SupportedLanguages,
)
from adaptive_harmony.graders.range_judge import PromptBuildingBlocks, RangeJudgeGrader, ReasonedScore
from adaptive_harmony.graders.templated_prompt_judge import SimpleReasonedFloatOutput, TemplatedPromptJudgeGrader
from adaptive_harmony.graders.utils import FailedJudgeLog
from adaptive_harmony.metric_logger import AdaptiveLogger, TBMetricsLogger
from adaptive_harmony.runtime import JobNotifier, RecipeConfig, RecipeContextManager
from engines import LiveEngine, pair
from harmony_client import StringThread, TokenizedTurn
from harmony_client.artifacts import BaseArtifact
from harmony_client.harmony_client import (
    Fragment,
    FunctionCallFragment,
    HarmonyError,
    ImageFragment,
    ReasoningFragment,
    TextFragment,
    Timings,
)
from harmony_client.parameters import Dataset, Grader, Model, SampleMetadata, model_kinds
from harmony_client.runtime.decorators import IN
from harmony_client.runtime.dto import AdaptiveGrader, CustomJudge, PrebuiltJudge, RemoteRewardEndpoint
from harmony_client.runtime.job_notifiers import PendingArtifact
from harmony_core.journal import kept
from worlds import Factory, Scripted, answers

TINY = "builtin:tiny-lm"
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def test_fragments_are_plain_dicts() -> None:
    fragments: list[Fragment] = [
        dict(ReasoningFragment(type="reasoning", text="hm")),
        dict(TextFragment(type="text", text="hi")),
        dict(FunctionCallFragment(type="function_call", call_id="1", name="add", arguments="{}")),
    ]
    image = dict(ImageFragment(type="image", url=PIXEL))
    thread = asyncio.run(StringThread.from_fragments([("user", [image]), ("assistant", fragments)]))
    assert thread.last_turn_fragments() == fragments and thread.last_content() == "hi"
    parsed = dict(TextFragment(type="text", text="{}", parsed_json="{}"))
    assert asyncio.run(StringThread.from_fragments([("user", [parsed])])).messages() == [("user", "{}")]


def test_the_settings_that_a_checkpoint_compares() -> None:
    common = {
        "lr",
        "lr_scheduler",
        "samples_per_batch",
        "max_grad_norm",
        "epochs",
        "weight_decay",
        "skip_nan_gradients",
    }
    assert {*common, "use_tangents"} <= SFT_HYPERPARAMS
    assert {*common, "clip_range", "kl_beta", "completions_per_sample"} <= GRPO_HYPERPARAMS
    assert {"lr_policy", "lr_value", "gae_lambda", "value_only_fraction"} <= PPO_HYPERPARAMS
    assert {"clip_range", "weight_decays"} <= ENVGRPO_HYPERPARAMS & ENVGSPO_HYPERPARAMS
    for names in (SFT_HYPERPARAMS, GRPO_HYPERPARAMS, PPO_HYPERPARAMS, ENVGRPO_HYPERPARAMS):
        assert not names & {"dataset", "model", "logger", "callbacks", "checkpoint_frequency"}
    assert "float32" in FloatArray


def test_the_samples_of_the_training_classes(one_rank: LiveEngine) -> None:
    prompts = [StringThread([("user", f"say {i}")]) for i in range(2)]
    seen: dict[str, list[Any]] = {"grpo": [], "ppo": [], "env": [], "dpo": [], "value": [], "env_value": []}

    class MyGRPO(GRPO):
        def get_train_batch_logs(self, data: Any) -> dict[str, Any]:
            seen["grpo"] += [sample for group in data for sample in group]
            return super().get_train_batch_logs(data)

    class MyPPO(PPO):
        async def generate_sample(self, prompt: StringThread) -> Any:
            seen["ppo"].append(await super().generate_sample(prompt))
            return seen["ppo"][-1]

        async def train_value(self, sample: Any) -> Any:
            seen["value"].append(sample)
            return await super().train_value(sample)

    class MyENVGRPO(ENVGRPO):
        def get_train_batch_logs(self, data: Any) -> dict[str, Any]:
            seen["env"] += data
            return super().get_train_batch_logs(data)

    class MyENVPPO(ENVPPO):
        async def train_value(self, sample: Any) -> Any:
            seen["env_value"].append(sample)
            return await super().train_value(sample)

    class MyDPO(DPO):
        async def process_sample(self, sample: Any) -> Any:
            seen["dpo"].append(sample)
            return await super().process_sample(sample)

    async def score(thread: StringThread) -> float:
        return float(len(thread.completion() or ""))

    async def work() -> None:
        builder = one_rank.client.model(TINY, kv_cache_len=4096, tokens_to_generate=4)
        policy = await spawn_train(builder, "policy", 256)
        value = await builder.into_scoring_model().spawn_train("value", 256)
        grader = BaseGrader.from_function("length", score)
        sizes = {"samples_per_batch": 4, "samples_per_mini_batch": 4}
        await MyGRPO(prompts, policy, grader, max_num_grpo_steps=1, completions_per_sample=2, **sizes).run()
        await MyPPO(prompts, policy, value, grader, max_num_ppo_steps=1, kl_beta=0.1, **sizes).run()
        steps = {"max_num_grpo_steps": 1, "completions_per_sample": 2}
        await MyENVGRPO(prompts, policy, Factory(answers(2)), **steps, **sizes).run()
        await MyENVPPO(prompts, policy, value, Factory(answers(2)), True, max_num_ppo_steps=1, **sizes).run()
        await MyDPO([(pair("a", "b"), pair("a", "c"))], policy, samples_per_batch=1).run()
        await asyncio.gather(policy.dealloc(), value.dealloc())

    one_rank.run(work())
    assert len(seen["grpo"]) == len(seen["env"]) == 4 and len(seen["dpo"]) == 1
    for sample in seen["grpo"]:
        assert len(sample.ref_logprobs) == len(sample.logprobs) == len(sample.kl_div) == sample.gen_len
    assert {id(sample) for sample in seen["value"]} == {id(sample) for sample in seen["ppo"]}
    for sample in seen["ppo"]:
        assert sample.string_sample.completion() is not None and len(sample.returns) == len(sample.values)
        assert sample.cumulative_reward == pytest.approx(sample.score + sample.kl_pen, abs=1e-4)
    for sample in [*seen["env"], *seen["env_value"]]:
        assert sample.cumulative_score == 1.0 and 2 <= sample.cumulative_gen_len <= 8
        assert len(sample.threads) == len(sample.ref_logprobs) == 1


def test_judges_of_records_on_an_engine(one_rank: LiveEngine) -> None:
    ctx: Any = SimpleNamespace(client=one_rank.client)
    limits = {"kv_cache_len": 16384, "max_tokens": 256}
    thread = StringThread([("user", "What is blue?"), ("assistant", "The sky.")], {"documents": ["The sky is blue."]})
    judge = CustomJudge(model_key=TINY, criteria="short", user_template="{{completion}} {{output_schema}}")
    prebuilt = PrebuiltJudge(model_key=TINY, prebuilt_config_key="ContextRelevancy")

    async def work() -> list[Any]:
        graders = [
            await BaseGrader.from_templated_judge("j", "j-id", judge, ctx, **limits),
            await BaseGrader.from_prebuilt_judge("p", "p-id", prebuilt, ctx, **limits),
            await BaseGrader.from_config(AdaptiveGrader(key="c", config=prebuilt), ctx, **limits),
        ]
        assert isinstance(graders[0], TemplatedPromptJudgeGrader)
        found: list[Any] = await asyncio.gather(*(grader.grade(thread) for grader in graders), return_exceptions=True)
        model = await get_model(ctx, "own", TINY, 16384, 128, None)
        steps = await RangeJudgeGrader("r", model, "short").generate_evaluation_steps()
        await model.dealloc()
        for grader in graders:
            grader.clear_logs()
            assert grader.get_logs() == {}
        return [*found, steps]

    *grades, steps = one_rank.run(work())
    # The verdict NA leaves the sample without a grade.
    assert all(isinstance(grade, IgnoreGradeException) or 0 <= grade.value <= 1 for grade in grades)
    assert all(isinstance(step, str) for step in steps)
    remote = BaseGrader.from_remote_reward_endpoint("s", "s-id", RemoteRewardEndpoint(url="http://127.0.0.1:9"))
    assert remote.grader_key == "s"


def test_an_environment_with_a_state_of_its_own_is_validated(one_rank: LiveEngine) -> None:
    class Stateful(Scripted):
        async def initialize_state(self, thread: StringThread) -> StringThread:
            return thread.user(f"state {self.metadata['n']}")

    class States(Factory):
        def create_environment(self, metadata: Any) -> Environment:
            return Stateful(self.add_log, self.react, metadata)

    async def work() -> None:
        model = await one_rank.client.model(TINY, kv_cache_len=4096, tokens_to_generate=4).spawn_inference("v")
        callback = EnvironmentValidationCallback([], model, States(answers(2)), 0.5)
        threads, score, turns = await callback.generate_trajectory(StringThread([("user", "q")], {"n": 7}))
        assert [turn.content for turn in threads[0].get_turns()[:2]] == ["q", "state 7"]
        assert (score, turns) == (1.0, 2)
        await model.dealloc()

    one_rank.run(work())


def test_what_judges_read_and_answer() -> None:
    thread = StringThread([("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "q2"), ("assistant", "a2")])
    blocks = PromptBuildingBlocks.of(thread)
    assert (blocks.last_user_turn, blocks.last_assistant_turn) == ("q2", "a2") and "a" in blocks.context
    context = TemplatedPromptJudgeGrader.extract_template_context(thread, SimpleReasonedFloatOutput, {"extra": 1})
    assert context["last_user_turn_content"] == "q2" and context["extra"] == 1 and "score" in context["output_schema"]
    scores: ScoresMap = BinaryJudgeOutput.SCORES_MAP
    assert (scores["PASS"], scores["FAIL"]) == (1.0, 0.0) and ScoresMap(PASS=1.0, FAIL=0.0) == scores
    passed = BinaryJudgeOutput(reasoning="r", score="PASS")
    assert passed.get_score() == 1.0 and passed.get_reasoning() == "r"
    plain = SimpleReasonedFloatOutput(score=0.5, reasoning="half")
    assert plain.get_score() == 0.5 and plain.get_reasoning() == "half"
    assert ReasonedScore(reasoning="r", score=3).score == 3
    faithful = SingleStatementFaithfulnessJudgeOutput(statement_idx=0, reasoning="r", score="1")
    assert FaithfulnessGraderOutput(all_statements_scoring=[faithful]).all_statements_scoring[0].statement_idx == 0
    assert AnswerRelevancyResults(results=[StatementRelevancy(reason="r", score=1)]).results[0].score == 1
    assert DocumentRelevancyResult(reason="r", score=0).score == 0
    assert "gpt-5" in OPENAI_MODEL_FAMILIES_TEMPERATURE_1_ONLY and "en" in SupportedLanguages.__args__
    failed: FailedJudgeLog = {"prompt": "p", "error": None}
    assert failed["error"] is None


def test_a_combined_grader_forgets_its_logs() -> None:
    async def one(thread: StringThread) -> float:
        return 1.0

    combined = CombinedGrader("both", [BaseGrader.from_function("a", one), BaseGrader.from_function("b", one)])
    assert asyncio.run(combined.grade(pair("q", "a"))).value == 1.0
    assert combined.get_logs()["score/count"] == 1
    combined.clear_logs()
    assert "score/count" not in combined.get_logs()
    mean: GradeAggregator = lambda grades: grades[0].value  # noqa: E731
    assert mean([Grade(2.0, "k")]) == 2.0


def test_messages_of_reward_servers() -> None:
    assert (SCORE_PATH, INFO_PATH, METADATA_SCHEMA_PATH) == ("/score", "/info", "/metadata_schema")
    assert Response(reward=1.0).metadata == {} and ServerInfo(version="1", name="n", description="").name == "n"
    refused = MetadataValidationResponse(is_valid=False, error_message="no")
    assert not refused.is_valid and refused.error_message == "no"
    assert MetadataType.__bound__.__name__ == "BaseModel" and IN.__bound__.__name__ == "InputConfig"


def test_the_logger_of_the_platform() -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    with kept(lambda type, data: events.append((type, data))):
        logger = AdaptiveLogger("project", "run", {"lr": 1.0}, api_url="https://platform", api_key="k")
        logger({"loss": 0.5})
    assert events == [("metrics.config", {"lr": 1.0}), ("metrics", {"step": 1, "metrics": {"loss": 0.5}})]
    assert not AdaptiveLogger.is_available() and logger.training_monitoring_link is None
    AdaptiveLogger("project", "run")({"loss": 1.0})  # outside of a run it is dropped


@pytest.mark.slow  # tensorboard is installed for these
def test_tensorboard_takes_the_documented_arguments(tmp_path: Path) -> None:
    board = TBMetricsLogger("run", str(tmp_path))
    board(logs={"loss": 1.0})
    board.create_index_page(str(tmp_path))
    board.close()
    assert list(tmp_path.rglob("*.html"))


def test_parameters_validate_and_serialise() -> None:
    model = Model[model_kinds.Trainable].validate_from_json("m")
    assert (model.model_key, model.serialize_model()) == ("m", "m")
    assert Grader.validate_from_json({"grader_key": "g"}).serialize_model() == "g"
    assert Dataset.validate_from_json("rows.jsonl").local_file_path == "rows.jsonl"
    assert issubclass(model_kinds.Inferable, model_kinds.ModelKind) and model_kinds.ModelKind("all").kind == "all"
    sample = SampleMetadata(id="0b0e3b52-6b1c-4d2c-9a4e-6f3b6f0f8a11", created_at=1)
    assert sample.created_at == 1 and DatasetSampleType.__args__


def test_a_session_and_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTIVE_HOME", str(tmp_path))
    config = RecipeConfig(
        harmony_url="local",
        recipe_name="named",
        control_plane_url="https://platform",
        control_plane_internal_url="https://platform",
        control_plane_api_token="t",
        compute_pool="pool",
        user_input_file=None,
        resume_checkpoint_artifact_id=None,
        num_gpus=1,
    )

    async def work() -> None:
        async with RecipeContextManager(config) as ctx:
            assert ctx.config.compute_pool == "pool" and ctx.control_plane is None
            assert len(ctx.client.session_id()) == 36
            stage = StdoutStageNotifier(ctx.job, "s")
            stage.report_progress(1, 1)
            model = await spawn_inference(ctx.client.model(TINY, kv_cache_len=512), "a")
            thread, timings = await model.max_gen_len(2).generate(StringThread([("user", "q")]), return_timings=True)
            assert isinstance(timings, Timings) and await model.thread_with_tools(thread, []) is thread
            drawn = await model.max_gen_len(2).generate_tokens(StringThread([("user", "q")]))
            assert isinstance(drawn.get_turns()[-1], TokenizedTurn)
            with pytest.raises(HarmonyError, match="a model appends the assistant's tokens"):
                drawn.assistant([1])

    asyncio.run(work())


def test_a_job_keeps_artifacts_until_it_ends(tmp_path: Path) -> None:
    job = JobNotifier()
    job.artifacts_dir = tmp_path
    artifact = BaseArtifact(SimpleNamespace(job=job), "id", "name", "custom", "file")
    job.add_pending_artifact(artifact, str(tmp_path / "file"))
    job.remove_pending_artifact("id")
    job.add_pending_artifact(artifact, str(tmp_path / "file"))
    job.finalize_artifact(artifact, str(tmp_path / "file"))
    job.register_artifact(artifact)
    job.finalize_pending_artifacts()
    pending = PendingArtifact(artifact, "file")
    assert (pending.artifact, pending.file_path) == (artifact, "file")
    with job:
        job.start_heartbeat(1.0)
        job.heartbeat()
        job.stop_heartbeat()
    error = HarmonyError("m")
    error.add_note(json.dumps("n"))
    assert error.__notes__ == ['"n"']
