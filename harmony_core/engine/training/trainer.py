"""The interface of this package: a trainer accumulates gradients over micro-batches and takes one global step.

Gradients, numerators and counts are summed over micro-batches and replicas, and `optim_step` divides them once by the
step's denominator. So the step does not depend on how samples were cut, packed and spread.
"""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.models.heads import linear_logprob_loss, scores, token_logprobs, token_logprobs_and_entropies
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.training.loss_evaluation import MetricSums, evaluate, means
from harmony_core.engine.training.losses import wants_entropies
from harmony_core.engine.training.optimizer import AdamW, FlatGradients
from harmony_core.engine.training.packing import LARGE_BYTES, PackedBatch, kept_while_it_runs, unpack
from harmony_core.errors import EngineError, NothingToTrain, StepFailed, UsageError
from harmony_core.rpc.protocol import MicroBatch, MicroBatchDone, OptimStep

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Trainer:
    """Trains `adapter` of `model`. With None it trains all weights, which the model must not share.

    `dp_group`: the ranks that hold the same shard in every replica; None with one replica. Gradients and optimizer
    state are allocated here. All ranks of the model must make the same `optim_step` calls. `score`: the scalar head,
    one of the trained parameters; with it, losses are computed from values instead of log-probs.
    """

    def __init__(
        self,
        model: CausalLM,
        adapter: str | None,
        *,
        dp_group: ProcessGroup | None = None,
        seed: int = 0,
        score: nn.Parameter | None = None,
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.score = score
        self.dp_group = dp_group
        self.seed = seed
        self.gradients = FlatGradients(model.trainable_parameters(adapter), model.tp)
        self.optimizer = AdamW(self.gradients)
        # The head's gradient is as large as the embedding: it is added directly to the buffer, without a copy.
        self._head_gradient = self.gradients.of(model.head_weight) if score is None else None
        # The sampler has no dropout: with adapter dropout, the gap to its log-probs would only measure the dropout.
        self._drops = adapter is not None and bool(model.adapters[adapter].settings.dropout)
        self._reset()

    @property
    def step(self) -> int:
        """Optimizer steps so far, Adam's step counter."""
        return self.optimizer.step_count

    @step.setter
    def step(self, value: int) -> None:
        if value < 0:
            raise UsageError(f"an optimizer step cannot be {value}", hint="0 means before the first update")
        self.optimizer.step_count = value

    @property
    def num_trainable(self) -> int:
        """Number of trained elements on this rank."""
        return self.gradients.buffer.numel()

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state: moments and masters."""
        return self.optimizer.state_bytes

    @property
    def gradient_bytes(self) -> int:
        """Bytes of gradients."""
        return self.gradients.buffer.nbytes

    def accumulate(self, batch: MicroBatch) -> MicroBatchDone:
        """Run forward and backward, and add to the gradients of this step.

        After an exception, call `abandon` before the next step.
        """
        started = time.perf_counter()
        self._failed = True
        packed = unpack(batch, self.model.device)
        parts = packed.cut() if packed.parts else [packed]
        seeds = [self._dropout_seed(batch, number) for number in range(len(parts))]
        if len(parts) == 1:
            numerator = self._forward_backward(packed, seeds[0])
        else:
            numerator = self._in_parts(packed, parts, seeds)
        self._failed = False
        self._micro_batches += len(parts)
        self._numerator += numerator
        self._weighted += packed.targets.numel()
        self._samples += len(packed.lengths) // packed.group
        return MicroBatchDone(
            numerator=numerator,
            tokens=[part.tokens.numel() for part in parts],
            samples=len(packed.lengths) // packed.group,
            seconds=time.perf_counter() - started,
        )

    def optim_step(self, request: OptimStep) -> dict[str, float]:
        """Reduce over the replicas, divide, clip, update, clear. Returns the step's metrics.

        Raises NothingToTrain for a denominator of 0, and EngineError for gradients with a NaN or an infinity, naming
        the first such tensor and the first rank that computed one (with `skip_nan` the step is skipped and counted
        instead). In these cases only the gradients have changed.
        """
        started = time.perf_counter()
        if self._failed:
            raise StepFailed(f"step {self.step + 1} of {request.model!r} cannot be taken: a micro-batch failed")
        try:
            self.gradients.check_attached()
            # Sum this rank's gradients first: after the reduction, a bad value of one rank is on every rank.
            own = None if self.dp_group is None and self.model.tp.silent else self.gradients.buffer.sum()
            self.gradients.reduce(self.dp_group)
            numerator, weighted, samples, squares, reported = self._totals()
            denominator = self._denominator(request, samples)
            norm = math.sqrt(squares) / denominator
            skipped = not math.isfinite(norm) and self._refuse_or_skip(request, own)
            clip = min(1.0, request.max_grad_norm / (norm + 1e-6))
            if not skipped:
                self.optimizer.update(
                    request.lr, request.weight_decay, request.beta1, request.beta2, request.eps, clip / denominator
                )
        finally:
            self.abandon()
        return {
            "loss": numerator / denominator,
            "grad_norm": norm,
            "num_tokens": weighted,
            "num_samples": samples,
            "lr": request.lr,
            "clipped": float(clip < 1.0 and not skipped),
            "skipped": float(skipped),
            "step": float(self.step),
            "seconds": time.perf_counter() - started,
            **reported,
        }

    def abandon(self) -> None:
        """Discard the gradients and sums since the last step."""
        self.gradients.clear()
        self._reset()

    def close(self) -> None:
        """Detach from the parameters; the trainer cannot be used afterwards."""
        self.gradients.detach()

    def weights_changed(self) -> None:
        """Call this after the parameters were written from outside."""
        self.optimizer.refresh_masters()

    def save_optimizer(self, directory: Path, write: bool) -> None:
        """Write the full-size optimizer state into `directory`. All ranks call this; the one with `write` writes."""
        self.optimizer.save(directory, write)

    def load_optimizer(self, directory: Path) -> None:
        """Read the optimizer state and step. Raises VerificationError without changing the state if it does not fit."""
        self.optimizer.load(directory)

    def rehearse(self, max_batch_tokens: int) -> None:
        """Run a worst-case micro-batch without collectives; RNG, gradients and moments stay unchanged.

        Raises the errors of a real micro-batch, such as out of memory.
        """
        device = self.model.device
        kept = self.gradients.buffer.clone() if self._samples else None
        reported = self._metrics.sums.clone()
        ids = torch.arange(max_batch_tokens, device=device)
        packed = PackedBatch(
            tokens=ids % self.model.vocab_size,
            positions=ids,
            rows=None,
            targets=ids % self.model.vocab_size,
            coefficients=torch.ones(max_batch_tokens, dtype=torch.float64, device=device),
            lengths=(max_batch_tokens,),
            loss="linear" if self.score is None else "mse_per_token",
            fields={"targets": torch.zeros(max_batch_tokens, dtype=torch.float64, device=device)},
        )
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), self.model.tp.without_collectives():
                self._forward_backward(packed, seed=0)
        finally:
            self._metrics.sums.copy_(reported)
            if kept is None:
                self.gradients.clear()
            else:
                self.gradients.buffer.copy_(kept)

    def _in_parts(self, packed: PackedBatch, parts: list[PackedBatch], seeds: list[int]) -> float:
        """`_forward_backward` for a group of samples that does not fit into memory at once.

        A first pass computes log-probs or values part by part, and the loss is evaluated on all of them. Then each part
        runs again with its part of the loss's gradient. Dropout draws the same mask in both passes.
        """
        found = [self._values_of(part, seed) for part, seed in zip(parts, seeds, strict=True)]
        numerator, directions = self._evaluate(packed, *map(torch.cat, zip(*found, strict=True)))
        ends = [sum(part.counts) for part in parts]
        for part, seed, *known in zip(parts, seeds, *(torch.split(d, ends) for d in directions), strict=True):
            self._forward_backward(part, seed, known)
        return numerator

    @torch.no_grad()
    def _values_of(self, packed: PackedBatch, seed: int) -> list[Tensor]:
        """Log-probs (and entropies if the loss needs them), or values, `[N]` each."""
        with forward_context(self._context(packed, seed)):
            return self._head_of(packed.scored(self.model.hidden_states(packed.tokens, packed.positions)), packed)

    def _context(self, packed: PackedBatch, seed: int) -> ForwardContext:
        return ForwardContext(PackedAttention(packed.lengths), self.adapter, seed, packed.dropout)

    def _head_of(self, scored: Tensor, packed: PackedBatch) -> list[Tensor]:
        if self.score is not None:
            return [scores(self.model, scored, self.score)]
        if wants_entropies(packed.settings):
            return [*token_logprobs_and_entropies(self.model, scored, packed.targets, allowed=packed.allowed)]
        return [token_logprobs(self.model, scored, packed.targets, allowed=packed.allowed)]

    def _forward_backward(self, packed: PackedBatch, seed: int, known: list[Tensor] | None = None) -> float:
        """Add the gradient of the micro-batch's loss; return the loss, in float64.

        A loss that is not linear takes two passes over the head: the first computes log-probs and the loss's gradient
        with respect to them, the second the linear loss with this gradient. `known`: that gradient, if it depends on
        more than this micro-batch; then the caller has the loss, and 0 is returned.
        """
        if not packed.targets.numel():
            return 0.0
        # An adapter's micro-batch keeps few tensors: holes of freed memory would be most of what it holds.
        large = packed.tokens.numel() * self.model.hidden_size * self.model.dtype.itemsize >= LARGE_BYTES
        keep = large and self.adapter is None and self.model.device.type == "cpu"
        # Checkpointed layers run again in the backward pass, so the context must cover it.
        with kept_while_it_runs(keep) as give_back, forward_context(self._context(packed, seed)):
            hidden = self.model.hidden_states(packed.tokens, packed.positions)
            give_back()
            scored = packed.scored(hidden)
            if self.score is not None:
                return self._train_values(scored, self.score, packed, known)
            numerator, directions = None, [packed.coefficients]
            if known is not None:
                numerator, directions = 0.0, known
            elif packed.loss != "linear":
                numerator, directions = self._evaluate(packed, *self._head_of(scored, packed))
            loss, logprobs = linear_logprob_loss(
                self.model,
                scored,
                packed.targets,
                directions[0],
                into=self._head_gradient,
                entropy=directions[1] if len(directions) > 1 else None,
                allowed=packed.allowed,
            )
            # The loss holds its gradients already; free the memory for the backward pass.
            del hidden, scored
            give_back()
            loss.backward()  # type: ignore[no-untyped-call]
        if packed.sampled is not None and not (packed.dropout and self._drops):
            self._metrics.compare(logprobs, *packed.sampled)
        return -float((packed.coefficients * logprobs.double()).sum().item()) if numerator is None else numerator

    def _evaluate(self, packed: PackedBatch, *given: Tensor) -> tuple[float, list[Tensor]]:
        """Evaluate the loss; return it with the coefficients of the linear loss that has the same gradient."""
        numerator, directions, sums = evaluate(packed.loss, packed.given(*given), packed.custom)
        self._metrics.add(sums)
        return numerator, directions

    def _train_values(
        self, hidden: Tensor, head: nn.Parameter, packed: PackedBatch, known: list[Tensor] | None
    ) -> float:
        """`_forward_backward` from the hidden states of the scored positions, through the scalar head.

        Every tensor-parallel rank holds all these states and the whole head, so all compute the same gradients.
        """
        values = scores(self.model, hidden, head)
        if known is not None:
            numerator, direction = 0.0, known[0]
        else:
            numerator, (direction,) = self._evaluate(packed, values)
        values.backward(-direction.to(values.dtype))  # type: ignore[no-untyped-call]
        return numerator

    def _dropout_seed(self, batch: MicroBatch, part: int) -> int:
        """Equal on the tensor-parallel ranks of a replica, different for every micro-batch and part of one."""
        text = f"{self.seed}/{self.step}/{batch.replica}/{self._micro_batches + part}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")

    def _reset(self) -> None:
        """Set the sums of a step to zero."""
        self._failed = False
        self._micro_batches = 0
        self._numerator = 0.0
        self._weighted = 0
        self._samples = 0
        self._metrics = MetricSums(self.model.device)

    def _denominator(self, request: OptimStep, samples: float) -> float:
        if samples and request.normalise == "sum":
            return 1.0
        if not samples or request.denominator == 0:
            raise NothingToTrain(
                f"step {self.step + 1} of {request.model!r} has nothing to train on",
                hint="call train_* with a weighted token before optim_step",
            )
        return request.denominator

    def _totals(self) -> tuple[float, float, float, float, dict[str, float]]:
        """Numerator, weighted tokens, samples, the reduced gradients' sum of squares, and the other metrics.

        Over all replicas. This is the only place in a step where the host waits for the device.
        """
        counts = torch.tensor([self._numerator, self._weighted, self._samples], dtype=torch.float64)
        sums = torch.cat([counts.to(self.model.device), self._metrics.sums])
        if self.dp_group is not None:
            dist.all_reduce(sums, group=self.dp_group)
            dist.all_reduce(self._metrics.largest_gap, dist.ReduceOp.MAX, group=self.dp_group)
        found = torch.cat([self.gradients.squared_norm()[None], self._metrics.largest_gap, sums]).tolist()
        squares, largest_gap, numerator, weighted, samples, *others = found
        return numerator, weighted, samples, squares, means(others, largest_gap)

    def _refuse_or_skip(self, request: OptimStep, own: Tensor | None) -> bool:
        """Raise EngineError for a norm that is not finite, or return True to skip the step. `own`: this rank's sum."""
        name = self.gradients.first_bad()
        if request.skip_nan:
            return True
        rank = self._first_rank(own)
        where = f"the first in {name}, computed on rank {rank}" if name else "in their sum of squares"
        raise EngineError(
            f"step {self.step + 1} of {request.model!r}: the gradients hold NaN or infinite values, {where};"
            " weights and optimizer are unchanged",
            hint="look at the last losses and advantages, lower the learning rate, or pass skip_nan_gradients=True",
            step=self.step + 1,
            tensor=name or "",
            rank=rank,
        )

    def _first_rank(self, own: Tensor | None) -> int:
        """The first rank whose own gradients were not finite."""
        if own is None:
            return dist.get_rank() if dist.is_initialized() else 0
        last = dist.get_world_size() - 1
        place = torch.tensor(last if own.isfinite() else dist.get_rank(), device=self.model.device)
        for group in (self.dp_group, None if self.model.tp.silent else self.model.tp.group):
            if group is not None:
                dist.all_reduce(place, dist.ReduceOp.MIN, group=group)
        return int(place.item())
