"""A replica's whole inference side on one rank: scheduler and runner, one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harmony_core.engine.inference.runner import Runner
from harmony_core.engine.inference.scheduler import Scheduler
from harmony_core.engine.inference.step import Finished, StepPlan, StepResult
from harmony_core.engine.models.model import CausalLM
from harmony_core.rpc.protocol import Sampling


class Generator:
    """Answers requests with one model, or one adapter of it. The leader plans and commits; every rank runs."""

    def __init__(
        self,
        model: CausalLM,
        kv_tokens: int,
        *,
        adapter: str | None = None,
        version: Callable[[], int] = lambda: 0,
        prefill_tokens: int = 8192,
        max_running: int = 256,
    ) -> None:
        self.runner = Runner(model, kv_tokens, adapter=adapter, max_running=max_running)
        self.scheduler = Scheduler(
            kv_tokens=kv_tokens,
            max_positions=model.max_positions,
            vocab_size=model.vocab_size,
            version=version,
            prefill_tokens=prefill_tokens,
            max_running=max_running,
        )

    def submit(self, id: int, tokens: Sequence[int], sampling: Sampling) -> None:
        """See `Scheduler.submit`."""
        self.scheduler.submit(id, tokens, sampling)

    def cancel(self, id: int) -> None:
        """See `Scheduler.cancel`."""
        self.scheduler.cancel(id)

    @property
    def has_work(self) -> bool:
        """Whether a step can be planned."""
        return self.scheduler.has_work

    def plan(self) -> StepPlan:
        """The next step, on the leader. Only while `has_work`, and after the last one was committed."""
        plan = self.scheduler.plan()
        assert plan is not None, "nothing can be planned"
        return plan

    def run(self, plan: StepPlan) -> StepResult:
        """Execute a step, on every rank of the replica."""
        return self.runner.run(plan)

    def commit(self, plan: StepPlan, result: StepResult) -> list[Finished]:
        """Take a step's tokens, on the leader; the requests that it ended."""
        return self.scheduler.commit(plan, result)

    def step(self) -> list[Finished]:
        """Plan, run, commit: the whole loop where one rank is the replica."""
        plan = self.plan()
        return self.commit(plan, self.run(plan))
