"""Losses of constrained completions: the gradient of a masked softmax, however samples are cut and spread."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.training.trainer_cases import make_trainer, micro_batch, samples
from harmony_core.engine.models.allowed import AllowedTokens
from harmony_core.errors import InternalError
from harmony_core.rpc.wire import pack_ints
from ranks import RankPool
from tiny_models import build

PACKED, ALONE = [[0, 1, 2, 3, 4, 5]], [[4, 5], [0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("tp", "lora", "cuts"),
    [(1, False, PACKED), (1, True, ALONE), (2, False, ALONE), (2, True, PACKED)],
    ids=["packed", "in three, adapter", "tp2 in three", "tp2 packed, adapter"],
)
def test_gradients_are_those_of_a_masked_softmax(
    rank_pool: RankPool, tmp_path: Path, tp: int, lora: bool, cuts: list[list[int]]
) -> None:
    """67 tokens: neither words nor bytes end where the vocabulary or a rank's part of it does."""
    directory = str(build(tmp_path / "llama", "llama", layers=1))
    case = "engine.training.constrained_cases:against_a_dense_softmax"
    for errors in rank_pool.run(case, ranks=tp, directory=directory, tp=tp, lora=lora, cuts=cuts):
        assert errors.pop("scored") < 1e-6  # float32 on the wire
        assert max(errors.values()) < 1e-12, errors


def test_a_mask_of_everything_changes_no_bit(tmp_path: Path) -> None:
    directory = build(tmp_path / "llama", "llama", layers=1)
    found = []
    for masked in (False, True):
        trainer, chosen = make_trainer(directory, "float32"), samples(4)
        batch = micro_batch(chosen)
        if masked:
            batch.allowed, batch.masks = pack_ints([1] * (len(batch.tokens) // 4)), b"\xff" * 12
        found.append((trainer.accumulate(batch).numerator, trainer.gradients.buffer.clone()))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_messages_are_joined_and_checked() -> None:
    one, other = b"\x01\x00\x00\x00", b"\x02\x00\x00\x00"
    both = AllowedTokens.read([(2, pack_ints([0, 1]), one), (1, b"", b""), (2, pack_ints([2, 1]), one + other)])
    assert both is not None and both.index.tolist() == [0, 1, 0, 3, 2]
    logits = torch.zeros(5, 5)
    both.forbid_others(logits, 0)
    assert (logits == 0).sum(1).tolist() == [5, 1, 5, 1, 1] and logits[3, 1] == 0
    assert AllowedTokens.read([(3, b"", b"")]) is None
    with pytest.raises(InternalError, match="3 tokens and 1"):
        AllowedTokens.read([(3, pack_ints([1]), one)])
