"""Public calls given the wrong kind of object say what they take; nothing that is right is refused."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fake_policy import FakeModel, length_grader, prompts
from harmony_core.algorithms import DPO, GRPO, GSPO, PPO, SFT, GraderEvalCallback, RewardModelling
from harmony_core.client import InferenceModel, ModelBuilder, TrainingModel, get_client
from harmony_core.config.argument_kinds import checked, is_of
from harmony_core.config.parameters import Dataset
from harmony_core.errors import UsageError
from harmony_core.graders import BaseGrader
from harmony_core.loggers import StdoutLogger
from harmony_core.text.threads import StringThread

THREAD = StringThread([("user", "Hello")])


def methods() -> list[Any]:
    owners = (InferenceModel, TrainingModel)
    found = [m for owner in owners for n, m in vars(owner).items() if inspect.isfunction(m) and not n.startswith("_")]
    return [*found, ModelBuilder.spawn_inference, ModelBuilder.spawn_train]


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.__qualname__)
def test_every_public_method_refuses_what_is_none_of_its_kinds(method: Callable[..., Any]) -> None:
    """Before it touches anything: there is no model behind these calls."""
    parameters = list(inspect.signature(method).parameters.values())[1:]
    takes = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if not takes:
        return
    wrong: dict[str, Any] = {name: object() for name in takes}
    with pytest.raises(UsageError, match=f"^{method.__qualname__}: {takes[0]} must be .*, not <object"):
        asyncio.run(method(object(), **wrong))
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        with pytest.raises(UsageError, match=f"^{method.__qualname__}: got an unexpected keyword argument 'nonsense'"):
            asyncio.run(method(object(), **wrong, nonsense=1))


def test_what_is_said_names_the_kind_the_value_and_the_way_out() -> None:
    model: Any = object.__new__(TrainingModel)
    with pytest.raises(
        UsageError, match=r"generate: thread must be StringThread or TokenizedThread, not 'text' \(str\)"
    ) as refused:
        model.generate("text")
    assert 'StringThread([("user", text)])' in refused.value.hint
    with pytest.raises(UsageError, match=r"per_token: thread must be TokenizedThread, not .*StringThread") as refused:
        asyncio.run(model.logprobs_per_token(THREAD))
    assert "tokenize_thread" in refused.value.hint
    with pytest.raises(UsageError, match="generate: thread must be StringThread or TokenizedThread, not None"):
        model.generate(None)
    with pytest.raises(UsageError, match=r"train_dpo: sample_pos must be StringThread or TokenizedThread, not \["):
        model.train_dpo([("user", "a")], THREAD, 0.0, 0.0, 0.1)
    with pytest.raises(UsageError, match="missing a required argument: 'max_batch_size'") as refused:
        asyncio.run(ModelBuilder.spawn_train(model, "policy"))  # type: ignore[call-arg]
    assert refused.value.hint == "it takes name, max_batch_size"
    with pytest.raises(UsageError, match="get_client: num_gpus must be a whole number, not '2'"):
        asyncio.run(get_client(num_gpus="2"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"from_function: async_fn must be a function, not 0\.5"):
        BaseGrader.from_function("half", 0.5)  # type: ignore[arg-type]


def reward(thread: StringThread) -> float:
    return 1.0


@pytest.mark.parametrize("name", ["dataset", "model", "grader", "logger", "stage_notifier", "callbacks", "lr"])
@pytest.mark.parametrize(
    "wrong",
    ["builtin:tiny-lm", Dataset("rows.jsonl"), reward, [THREAD, "text"]],
    ids=["key", "dataset", "function", "list"],
)
@pytest.mark.parametrize("training", [SFT, DPO, GRPO, GSPO])
def test_training_classes_refuse_at_construction(training: Any, name: str, wrong: Any) -> None:
    parameters = inspect.signature(training).parameters
    if name not in parameters:
        return
    model, thread = FakeModel().as_model(), prompts(1)
    given: dict[str, Any] = {"dataset": [(thread[0], thread[0])] if training is DPO else thread, "model": model}
    if "grader" in parameters:
        given |= {"grader": length_grader()}
    with pytest.raises(UsageError, match=f"{training.__name__}: {name} must be .*, not ".replace("GSPO", "G[RS]PO")):
        training(**{**given, name: wrong})


def test_a_function_is_no_logger_and_a_model_key_is_no_value_model() -> None:
    policy, value = FakeModel().as_model(), FakeModel(scalar=True).as_model()
    with pytest.raises(UsageError, match="RewardModelling: logger must be Logger, not <built-in") as refused:
        RewardModelling(prompts(1), value, print)  # type: ignore[arg-type]
    assert "subclass of Logger" in refused.value.hint
    with pytest.raises(UsageError, match="PPO: value_model must be TrainingModel, not 'key'"):
        PPO(prompts(1), policy, "key", length_grader())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="grader must be BaseGrader, not <function reward"):
        GraderEvalCallback(prompts(1), policy, reward, 0.5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="RewardModelling: missing a required argument: 'model'"):
        RewardModelling(prompts(1))  # type: ignore[call-arg]
    SFT([THREAD], policy, StdoutLogger(), None, (), 1)


def test_numbers_and_sequences_may_be_anyones() -> None:
    for number in (1, 1.0, True, np.float32(1), np.int64(1), torch.tensor(1.0)):
        assert is_of(number, float)
    for row in ([1.0], (1.0,), np.ones(2), torch.ones(2), range(3), []):
        assert is_of(row, Sequence[float])
    assert (
        not is_of("1", float)
        and not is_of(1.5, int)
        and not is_of("12", Sequence[int])
        and not is_of({1: 2}, Sequence[int])
    )
    assert is_of([THREAD, THREAD], tuple[StringThread, StringThread]) and not is_of(
        [THREAD], tuple[StringThread, StringThread]
    )


def test_an_error_from_inside_is_left_as_it_is() -> None:
    @checked
    def fails(number: int) -> int:
        raise TypeError("its own")

    with pytest.raises(TypeError, match="its own"):
        fails(3)
