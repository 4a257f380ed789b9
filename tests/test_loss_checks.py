"""The check that a user's test calls: it passes what is one loss, and names the fault of what is not."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from harmony_core.client import get_client
from harmony_core.errors import DataError, LossFailed, NotFoundError, UsageError, VerificationError
from harmony_core.loss_checks import check_loss

LOGPROBS = [[-1.0, -0.5, -2.0], [-0.1], [-0.7, -0.9], [-3.0, -0.2, -0.4, -1.1], [-0.6, -0.8], [-1.5]]
ADVANTAGES = [1.0, -0.5, 0.25, 2.0, -1.0, 0.5]


def reinforce(logprobs: Tensor, samples: list[slice], *, advantages: Tensor) -> Tensor:
    return -(advantages * logprobs).sum()


def sequence_means(logprobs: Tensor, samples: list[slice], *, advantages: Tensor) -> Tensor:
    return -torch.stack([(advantages[s] * logprobs[s]).mean() for s in samples]).sum()


def pairwise(logprobs: Tensor, samples: list[slice]) -> Tensor:
    sums = torch.stack([logprobs[s].sum() for s in samples])
    return -F.logsigmoid(sums[::2] - sums[1::2]).sum()


def with_entropies(logprobs: Tensor, samples: list[slice], *, entropies: Tensor) -> Tensor:
    return -(logprobs + 0.1 * entropies).sum()


def entropies_of_the_micro_batch(logprobs: Tensor, samples: list[slice], *, entropies: Tensor) -> Tensor:
    return -logprobs.sum() - (entropies - entropies.detach()).mean()


def with_noise(logprobs: Tensor, samples: list[slice]) -> Tensor:
    return -(logprobs * torch.rand(len(logprobs))).sum()


def mean_over_the_micro_batch(logprobs: Tensor, samples: list[slice], *, advantages: Tensor) -> Tensor:
    return -(advantages * logprobs).mean()


def whitened_in_the_micro_batch(logprobs: Tensor, samples: list[slice], *, advantages: Tensor) -> Tensor:
    return -((advantages - advantages.mean()) * logprobs).sum()


def by_place(logprobs: Tensor, samples: list[slice], *, advantages: Tensor) -> Tensor:
    return -(torch.arange(1, len(logprobs) + 1) * logprobs).sum()


def unlike_in_gradient_alone(logprobs: Tensor, samples: list[slice], *, advantages: Tensor) -> Tensor:
    return -(advantages * logprobs).sum() + (logprobs - logprobs.detach()).sum() / len(samples)


@pytest.mark.parametrize("loss", [reinforce, sequence_means])
def test_a_sum_over_samples_passes(loss: Callable[..., Any]) -> None:
    check_loss(loss, LOGPROBS, advantages=ADVANTAGES)
    check_loss(loss, LOGPROBS, advantages=[[a] * len(row) for a, row in zip(ADVANTAGES, LOGPROBS, strict=True)])


def test_groups_stay_together() -> None:
    check_loss(pairwise, LOGPROBS, group=2)


def test_entropies_are_compared_too() -> None:
    entropies = [[0.5 - x for x in row] for row in LOGPROBS]
    check_loss(with_entropies, LOGPROBS, entropies=entropies)
    with pytest.raises(VerificationError, match="entropies_of_the_micro_batch depends"):
        check_loss(entropies_of_the_micro_batch, LOGPROBS, entropies=entropies)
    with pytest.raises(UsageError, match="same lengths"):
        check_loss(with_entropies, LOGPROBS, entropies=entropies[:2])


@pytest.mark.parametrize(
    "loss", [mean_over_the_micro_batch, whitened_in_the_micro_batch, by_place, unlike_in_gradient_alone]
)
def test_what_depends_on_the_micro_batch_is_found(loss: Callable[..., Any]) -> None:
    with pytest.raises(VerificationError, match=f"{loss.__name__} depends on how samples are batched") as error:
        check_loss(loss, LOGPROBS, advantages=ADVANTAGES)
    assert error.value.details["layout"]


def test_random_numbers_are_found_by_the_place_of_a_sample() -> None:
    with pytest.raises(VerificationError, match="in micro-batches of one"):
        check_loss(with_noise, LOGPROBS)
    assert torch.rand(1) != torch.rand(1), "a loss leaves the generator as it was"


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda logprobs, samples: -logprobs.detach().sum(), VerificationError, "no gradient"),
        (lambda logprobs, samples: logprobs.sum() * float("nan"), VerificationError, "not finite"),
        (lambda logprobs, samples: -logprobs, LossFailed, r"returned a tensor \[13\]"),
        (lambda logprobs, samples: -logprobs.sum().item(), LossFailed, "returned 1"),
    ],
)
def test_what_is_no_loss_is_refused(loss: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_loss(loss, LOGPROBS)


def test_the_inputs_are_checked() -> None:
    with pytest.raises(UsageError, match="1 samples are not two groups of 1"):
        check_loss(reinforce, LOGPROBS[:1], advantages=[1.0])
    with pytest.raises(UsageError, match="advantages: 2 entries for 6 samples"):
        check_loss(reinforce, LOGPROBS, advantages=[1.0, 2.0])
    with pytest.raises(DataError, match=r"advantages\[1\]: 2 values for 1 "):
        check_loss(reinforce, LOGPROBS, advantages=[1.0, [1.0, 2.0], *ADVANTAGES[2:]])


USERS_LOSSES = """
def reinforce(logprobs, samples, *, advantages):
    return -(advantages * logprobs).sum()


def mean_of_the_batch(logprobs, samples, *, advantages):
    return -(advantages * logprobs).mean()
"""

USERS_TEST = """
import asyncio

import pytest

import my_losses
from adaptive_harmony import StringThread, get_client
from harmony_core.errors import VerificationError
from harmony_core.loss_checks import check_loss_on_ranks


async def check(loss):
    async with await get_client(num_gpus=2, recipe=my_losses.__file__) as client:
        builder = client.model("builtin:tiny-lm", kv_cache_len=512)
        models = [await builder.tp(tp).spawn_train(f"tp-{tp}", 128) for tp in (1, 2)]
        threads = [StringThread([("user", "say"), ("assistant", "ab" * n)]) for n in (1, 3, 2, 4)]
        await check_loss_on_ranks(loss, models, threads, advantages=[1.0, -0.5, 2.0, 0.25])


def test_a_sum_is_one_loss():
    asyncio.run(check(my_losses.reinforce))


def test_a_mean_is_not():
    with pytest.raises(VerificationError, match="mean_of_the_batch"):
        asyncio.run(check(my_losses.mean_of_the_batch))
"""


@pytest.mark.slow
def test_a_test_of_a_user_s_own_finds_it_on_ranks(tmp_path: Path) -> None:
    (tmp_path / "my_losses.py").write_text(USERS_LOSSES, "utf-8")
    (tmp_path / "test_my_losses.py").write_text(USERS_TEST, "utf-8")
    environment = {**os.environ, "ADAPTIVE_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_losses.py"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=840)
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_the_file_of_the_losses_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no file"):
        asyncio.run(get_client(recipe=tmp_path / "losses.py"))
