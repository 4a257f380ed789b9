"""A recipe's subclasses of training classes: what they override is called, or refused when they are constructed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engines import pair
from fake_policy import FakeModel, length_grader, prompts
from harmony_core.algorithms import DPO, GRPO, GSPO, PPO, SFT, RewardModelling
from harmony_core.errors import UsageError
from harmony_core.loggers import EventLogger
from harmony_core.text.threads import StringThread

PAIRS = [(pair("q", f"good{i}"), pair("q", f"bad{i}")) for i in range(6)]
GROUPS: dict[str, Any] = {"completions_per_sample": 2, "samples_per_batch": 4}


class Built:
    """A training of a class on fake models, with its metrics."""

    def __init__(self, cls: type[Any], **options: Any) -> None:
        self.metrics: list[dict[str, Any]] = []
        self.model, self.value = FakeModel(scalar=issubclass(cls, RewardModelling)), FakeModel(scalar=True)
        logger = EventLogger(lambda type, data: self.metrics.append(data["metrics"]) if type == "metrics" else None)
        policy, more = self.model.as_model(), {"logger": logger, **options}
        if issubclass(cls, GRPO):
            steps = {"max_num_gspo_steps" if issubclass(cls, GSPO) else "max_num_grpo_steps": 1}
            self.training = cls(prompts(4), policy, length_grader(), **{**steps, **GROUPS, **more})
        elif issubclass(cls, PPO):
            more = {"max_num_ppo_steps": 1, "value_only_fraction": 0.0, "samples_per_batch": 4, **more}
            self.training = cls(prompts(4), policy, self.value.as_model(), length_grader(), **more)
        else:
            self.training = cls([x for x, _ in PAIRS] if issubclass(cls, SFT) else PAIRS, policy, **more)

    def go(self) -> dict[str, Any]:
        metrics: dict[str, Any] = asyncio.run(self.training.run())
        return metrics


CLASSES = {"SFT": SFT, "DPO": DPO, "RewardModelling": RewardModelling, "GRPO": GRPO, "GSPO": GSPO, "PPO": PPO}


def overriding(cls: type[Any], calls: list[str]) -> type[Any]:
    """A subclass of which every hook notes that it was called, and does what it did before."""

    def noting(name: str) -> Any:
        def hook(self: Any, argument: Any) -> Any:
            calls.append(name)
            return getattr(super(made, self), name)(argument)

        return hook

    made = type(f"My{cls.__name__}", (cls,), {name: noting(name) for name in cls._hooks})
    return made


@pytest.mark.parametrize("name", CLASSES)
def test_every_hook_is_called_and_changes_nothing_by_itself(name: str) -> None:
    calls: list[str] = []
    cls = CLASSES[name]
    plain, mine = Built(cls), Built(overriding(cls, calls))
    assert plain.go() == mine.go() and plain.metrics == mine.metrics
    assert plain.model.trained == mine.model.trained and len(plain.model.trained) >= 4
    assert set(calls) == set(cls._hooks)


def test_documented_overrides_of_grpo() -> None:
    """Samples have the documented fields, what is returned of them becomes means, and a batch's logs are one's own."""

    class Mine(GRPO):
        async def gen_data(self, sample: StringThread) -> Any:
            group = await super().gen_data(sample)
            for member in group:
                assert len(member.kl_div) == len(member.logprobs) == member.gen_len == member.score
                assert member.sample.len_last_turn() == member.gen_len
                member.advantage = 2.0
            return None if sample.last_content() == "short-0" else group

        async def train_sample(self, sample: Any) -> Any:
            await super().train_sample(sample)
            return {"length": sample.gen_len, "note": "text"}

        def get_train_batch_logs(self, data: Any) -> dict[str, Any]:
            return {"groups": len(data), "size": len(data[0])}

    run = Built(Mine, samples_per_batch=8)
    run.go()
    assert len(run.model.trained) == 6, "a prompt for which gen_data gives nothing is left out"
    assert all(set(advantages) == {2.0} for _, (_, _, advantages, *_) in run.model.trained)
    (step,) = run.metrics
    assert (step["groups"], step["size"]) == (3, 2) and "score_mean" not in step
    assert step["policy/length"] == sum(len(args[0]) for _, args in run.model.trained) / 6
    assert "policy/note" not in step and step["rewards/score/count"] == 8


def test_a_hook_need_not_be_a_coroutine_function() -> None:
    class Mine(RewardModelling):
        def train_rm(self, sample: Any) -> Any:
            return super().train_rm(sample[::-1])

    run = Built(Mine, samples_per_batch=6)
    run.go()
    assert {text[:3] for text, _ in run.model.trained} == {"bad"}


def test_a_step_for_which_a_hook_trained_nothing_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Mine(DPO):
        async def process_sample(self, sample: Any) -> Any:
            return {"seen": 1.0}

    last = Built(Mine, samples_per_batch=3).go()
    assert last == {"policy/seen": 1.0, "completion_percentage": 1.0}
    assert caplog.text.count("a step is left out: ") == 2


async def unused(self: Any, sample: Any) -> None: ...


async def without_argument(self: Any) -> None: ...


@pytest.mark.parametrize(
    ("name", "methods", "complaint"),
    [
        ("SFT", {"train_sample": unused}, "MySFT overrides train_sample, which SFT never calls"),
        ("PPO", {"gen_data": unused}, "MyPPO overrides gen_data, which PPO never calls"),
        ("GSPO", {"process_sample": unused}, "MyGSPO overrides process_sample, which GSPO never calls"),
        ("DPO", {"training_completion_percentage": property(lambda self: 1.0)}, "training_completion_percentage"),
        ("GRPO", {"gen_data": without_argument}, "MyGRPO.gen_data cannot be called with one argument: too many"),
        ("GRPO", {"get_train_batch_logs": {}}, r"MyGRPO.get_train_batch_logs cannot be called .*: it is \{\}"),
    ],
)
def test_what_would_not_be_called_is_refused(name: str, methods: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        Built(type(f"My{name}", (CLASSES[name],), methods))
    assert caught.value.hint


def test_other_methods_and_constructors_are_the_subclasss_own() -> None:
    class Mine(GRPO):
        def __init__(self, *args: Any, bonus: float = 0.5, **more: Any) -> None:
            self.bonus = bonus
            super().__init__(*args, **more)

        def shaped(self, score: float) -> float:
            return score + self.bonus

        async def run(self) -> dict[str, float]:
            return {**await super().run(), "bonus": self.shaped(0.0)}

    assert Built(Mine).go()["bonus"] == 0.5
