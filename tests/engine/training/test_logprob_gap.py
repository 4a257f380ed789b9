"""Log-probs of the sampler beside the trainer's: what a step reports of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from engine.training.trainer_cases import make_trainer, micro_batch, optim_step, samples, with_sampler
from harmony_core.engine.models.adapters import add_lora
from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.models.heads import token_logprobs
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.engine.training.trainer import Trainer
from harmony_core.errors import InternalError, StepFailed
from harmony_core.rpc.protocol import LoraSettings
from ranks import RankPool
from tiny_models import build

NAMES = {"sampler_logprob_diff_mean", "sampler_logprob_diff_max", "sampler_tokens"}
NAMES |= {f"sampler_kl_k{i}" for i in (1, 2, 3)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("llama"), "llama")


def test_the_difference_is_that_of_known_and_scored_tokens(llama: Path) -> None:
    trainer = make_trainer(llama, "float64")
    batches = [samples(4, seed=1), samples(3, seed=2)]
    expected = []
    generator = torch.Generator().manual_seed(0)
    for chosen in batches:
        lengths = tuple(len(ids) - 1 for ids, _ in chosen)
        tokens = torch.tensor([t for ids, _ in chosen for t in ids[:-1]])
        targets = torch.tensor([t for ids, _ in chosen for t in ids[1:]])
        weights = torch.tensor([w for _, ws in chosen for w in ws[1:]])
        with torch.no_grad(), forward_context(ForwardContext(PackedAttention(lengths))):
            positions = torch.cat([torch.arange(n) for n in lengths])
            exact = token_logprobs(trainer.model, trainer.model.hidden_states(tokens, positions), targets)
        noise = 0.2 * torch.randn(len(tokens), generator=generator, dtype=torch.float64)
        sampled = (exact - noise).float()
        sampled[::3] = math.nan
        trainer.accumulate(with_sampler(micro_batch(chosen), sampled.tolist()))
        known = (weights != 0) & sampled.isfinite()
        expected.append((exact - sampled.double())[known])
    found = trainer.optim_step(optim_step(10.0))
    difference = torch.cat(expected)
    assert found["sampler_tokens"] == len(difference) > 10
    assert found["sampler_logprob_diff_mean"] == pytest.approx(difference.abs().mean().item())
    assert found["sampler_logprob_diff_max"] == pytest.approx(difference.abs().max().item())
    assert found["sampler_kl_k1"] == pytest.approx(-difference.mean().item())
    assert found["sampler_kl_k2"] == pytest.approx(difference.square().mean().item() / 2)
    k3 = (difference.exp() - 1 - difference).mean().item()
    assert found["sampler_kl_k3"] == pytest.approx(k3) and k3 > 0


def test_nothing_is_reported_where_nothing_was_compared(llama: Path) -> None:
    trainer = make_trainer(llama)
    chosen = samples(3)
    tokens = sum(len(ids) - 1 for ids, _ in chosen)
    for batch in (micro_batch(chosen), with_sampler(micro_batch(chosen), [math.nan] * tokens)):
        trainer.accumulate(batch)
        assert not NAMES & trainer.optim_step(optim_step(10.0)).keys()
    trainer.accumulate(with_sampler(micro_batch(chosen), [-1.0] * tokens))
    assert trainer.optim_step(optim_step(10.0)).keys() >= NAMES
    trainer.accumulate(micro_batch(chosen))
    assert not NAMES & trainer.optim_step(optim_step(10.0)).keys(), "what was compared belongs to its own step"


def test_an_abandoned_step_is_forgotten(llama: Path) -> None:
    trainer = make_trainer(llama)
    chosen = samples(3)
    trainer.accumulate(with_sampler(micro_batch(chosen), [-1.0] * sum(len(ids) - 1 for ids, _ in chosen)))
    with pytest.raises(InternalError, match="1 log-probs of the sampler"):
        trainer.accumulate(with_sampler(micro_batch(chosen), [-1.0]))
    with pytest.raises(StepFailed):
        trainer.optim_step(optim_step(10.0))
    trainer.abandon()
    trainer.accumulate(micro_batch(chosen))
    assert not NAMES & trainer.optim_step(optim_step(10.0)).keys()


def test_an_adapter_with_dropout_is_not_compared(llama: Path) -> None:
    model = load_model(llama, TensorParallel.single(), torch.device("cpu"), torch.float32)
    add_lora(model, "policy", LoraSettings(rank=2, dropout=0.5))
    trainer = Trainer(model, "policy")
    chosen = samples(3)
    trainer.accumulate(with_sampler(micro_batch(chosen), [-1.0] * sum(len(ids) - 1 for ids, _ in chosen)))
    assert not NAMES & trainer.optim_step(optim_step(10.0)).keys()


def test_replicas_are_counted_together(rank_pool: RankPool, llama: Path) -> None:
    results = rank_pool.run("engine.training.trainer_cases:agreement", ranks=2, directory=str(llama))
    assert results[0] == results[1]
    known, unknown = results[0]
    assert known["sampler_tokens"] == 2 and known["sampler_logprob_diff_max"] > 20 and unknown == {}
