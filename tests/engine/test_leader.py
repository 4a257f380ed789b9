"""What a leader does next: the driver's sequence, barriers, turns."""

from __future__ import annotations

from harmony_core.engine.inference.scheduler import Scheduler
from harmony_core.engine.leader import GenerateWork, GlobalWork, ModelQueue, Order, ReplicaQueue, ScoreWork, TrainWork
from harmony_core.rpc.protocol import Message, MicroBatch, OptimStep, Regroup, Sampling, Score
from harmony_core.rpc.wire import pack_doubles, pack_ints


def micro_batch(model: str, replica: int = 0) -> MicroBatch:
    ints = pack_ints([1, 2])
    return MicroBatch(
        model=model,
        replica=replica,
        tokens=ints,
        targets=ints,
        coefficients=pack_doubles([1, 1]),
        lengths=pack_ints([2]),
    )


def optim_step(model: str) -> OptimStep:
    return OptimStep(model=model, lr=0.1, weight_decay=0.0, max_grad_norm=1.0, skip_nan=False)


def scheduler() -> Scheduler:
    return Scheduler(kv_tokens=64, max_positions=64, vocab_size=10, version=lambda: 0, prefill_tokens=64)


def order(*models: str, replicas: int = 1) -> Order:
    made = Order()
    for name in models:
        made.add_model(ModelQueue(name, 8, {r: ReplicaQueue(scheduler()) for r in range(replicas)}))
    return made


def train(made: Order, call: int, model: str, replica: int = 0) -> None:
    queue = made.replica(model, replica)
    assert queue is not None
    queue.training.append((call, micro_batch(model, replica)))


def drained(made: Order) -> list[tuple[str, dict[int, list[int]]]]:
    steps = []
    while (step := made.next()) is not None:
        work = step.instruction
        name = work.method if isinstance(work, GlobalWork) else f"{type(work).__name__} {work.model}"
        steps.append((name, step.calls))
    return steps


def test_an_optimizer_step_waits_for_the_micro_batches_before_it_and_holds_back_those_after() -> None:
    made = order("a")
    train(made, 1, "a")
    train(made, 2, "a")
    made.add_global(3, 0, optim_step("a"))
    train(made, 4, "a")
    made.add_global(5, 1, optim_step("a"))
    assert drained(made) == [
        ("TrainWork a", {0: [1]}),
        ("TrainWork a", {0: [2]}),
        ("OptimStep", {0: [3]}),
        ("TrainWork a", {0: [4]}),
        ("OptimStep", {0: [5]}),
    ]


def test_global_requests_run_in_the_drivers_sequence_whatever_order_they_arrive_in() -> None:
    made = order("a", "b")
    made.add_global(2, 1, optim_step("b"))
    assert made.next() is None
    made.add_global(1, 0, Regroup(size=1))
    assert drained(made) == [("Regroup", {0: [1]}), ("OptimStep", {0: [2]})]


def test_every_replica_of_the_block_must_have_run_its_share() -> None:
    made = order("a", replicas=2)
    train(made, 1, "a", 0)
    train(made, 2, "a", 1)
    train(made, 3, "a", 1)
    made.add_global(4, 0, optim_step("a"))
    assert drained(made) == [
        ("TrainWork a", {0: [1], 1: [2]}),
        ("TrainWork a", {1: [3]}),
        ("OptimStep", {0: [4]}),
    ]


def test_models_take_turns_and_so_do_the_kinds_of_work() -> None:
    made = order("a", "b")
    for call in (1, 2):
        train(made, call, "a")
        train(made, call + 10, "b")
    queue = made.replica("a", 0)
    assert queue is not None and queue.scheduler is not None
    queue.scheduler.submit(20, [1, 2, 3], Sampling(max_tokens=4))
    queue.scoring.append((21, Score(model="a", replica=0, tokens=pack_ints([1]), targets=pack_ints([2]))))
    kinds: list[type] = []
    names = []
    for _ in range(6):
        step = made.next()
        assert step is not None
        work = step.instruction
        assert not isinstance(work, GlobalWork)
        names.append(work.model)
        kinds.append(type(work))
        if isinstance(work, GenerateWork):
            queue.scheduler.cancel(20)
            queue.scheduler.abort(work.plans[0], ValueError())  # type: ignore[arg-type]
    assert names[:4] == ["a", "b", "a", "b"]
    assert {GenerateWork, ScoreWork, TrainWork} == set(kinds)


def test_scoring_packs_requests_up_to_the_budget() -> None:
    made = order("a")
    queue = made.replica("a", 0)
    assert queue is not None
    for call in range(5):
        queue.scoring.append(
            (call, Score(model="a", replica=0, tokens=pack_ints([1, 2, 3]), targets=pack_ints([1, 2, 3])))
        )
    calls = [calls[0] for _, calls in drained(made)]
    assert calls == [[0, 1], [2, 3], [4]]


def test_a_request_for_a_model_that_is_gone_still_has_its_turn() -> None:
    made = order("a")
    made.remove_model("a")
    message: Message = optim_step("a")
    made.add_global(1, 0, message)
    assert drained(made) == [("OptimStep", {0: [1]})]
