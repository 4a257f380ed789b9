"""The grades of a trajectory, turn by turn, and the advantages that they give to the tokens of its turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

from harmony_core.errors import DataError
from harmony_core.graders import Grade
from harmony_core.returns import discounted_cumulative_rewards, gae_advantages
from harmony_core.text.threads import TokenizedThread

if TYPE_CHECKING:
    from harmony_core.client import InferenceModel
    from harmony_core.environments.environment import Environment

GradeAggregator = Callable[[list[Grade]], float]
"""A function from the grades of one turn to its reward."""


def sum_of_grade_values(grades: list[Grade]) -> float:
    """The sum of the values, 0 without grades."""
    return float(sum(grade.value for grade in grades))


def mean_of_grade_values(grades: list[Grade]) -> float:
    """The mean of the values, 0 without grades."""
    return fmean(grade.value for grade in grades) if grades else 0.0


class ThreadScore:
    """The grades of the turns that a model generated in one thread; None for a turn that was not graded."""

    def __init__(self) -> None:
        self.turns: list[list[Grade] | None] = []
        self.environment_snapshots: list[Environment] = []

    def add_turn(self, grades: list[Grade] | None) -> None:
        """Note the grades of the next turn."""
        self.turns.append(grades)

    def get_all_grades(self) -> list[list[Grade]]:
        """The grades of each turn; empty for a turn without."""
        return [grades or [] for grades in self.turns]

    def get_all_rewards(self, aggregator: GradeAggregator) -> list[float]:
        """The reward of each turn; 0 for a turn without grades."""
        return [0.0 if grades is None else aggregator(grades) for grades in self.turns]

    def store_environment_snapshot(self, environment: Environment) -> None:
        """Keep an environment; it is not used."""
        self.environment_snapshots.append(environment)


class TrajectoryHistory:
    """The grades of a trajectory: of several threads, each with one or more turns of the model.

    `sampled` holds the threads with the tokens as they were drawn, if the environment is one of ours. `truncated` names
    the limit that ended the trajectory, "" if its environment did.
    """

    def __init__(self, aggregator: GradeAggregator = mean_of_grade_values) -> None:
        self.aggregator = aggregator
        self.threads: list[ThreadScore] = []
        self.sampled: list[TokenizedThread] = []
        self.truncated = ""

    def add_new_thread(self) -> None:
        """Begin a thread."""
        self.threads.append(ThreadScore())

    def add_turn(self, grades: list[Grade] | None) -> None:
        """Note the grades of the next turn of the present thread."""
        self.threads[-1].add_turn(grades)

    @property
    def total_number_of_turns_generated(self) -> int:
        """The number of turns of the model, in all threads."""
        return len(self.get_grades_per_turn())

    def get_grades_per_turn(self) -> list[list[Grade] | None]:
        """The grades of each turn of all threads; None for a turn that was not graded."""
        return [grades for thread in self.threads for grades in thread.turns]

    def get_raw_rewards_for_stats(self) -> list[float]:
        """The rewards of the turns that were graded."""
        return [self.aggregator(grades) for grades in self.get_grades_per_turn() if grades is not None]

    def get_cumulative_reward(self) -> float:
        """The sum of the rewards."""
        return float(sum(self.get_raw_rewards_for_stats()))

    def get_all_grades_flat(self) -> list[Grade]:
        """All grades in order."""
        return [grade for grades in self.get_grades_per_turn() for grade in grades or ()]

    def get_grades_by_grader_key(self) -> dict[str, list[Grade]]:
        """All grades in order, by the key of their grader."""
        found: dict[str, list[Grade]] = {}
        for grade in self.get_all_grades_flat():
            found.setdefault(grade.grader_key, []).append(grade)
        return found

    def get_mean_score_per_grader(self) -> dict[str, float]:
        """The mean value of each grader's grades."""
        return {key: mean_of_grade_values(grades) for key, grades in self.get_grades_by_grader_key().items()}

    def get_averaged_grades(self) -> list[Grade]:
        """One grade for each grader: the mean of its grades."""
        return [Grade(value, key) for key, value in self.get_mean_score_per_grader().items()]

    async def count_weighted_tokens_per_turn(self, thread: TokenizedThread, model: InferenceModel) -> list[int]:
        """The number of weighted tokens of each turn that has any."""
        return [turn.end - turn.start for turn in thread.token_turns if turn.weight > 0]

    async def _counts(self, threads: Sequence[TokenizedThread], model: InferenceModel) -> list[list[int]]:
        """The weighted tokens of each turn of each thread. Raises DataError unless there are as many as graded."""
        counts = [await self.count_weighted_tokens_per_turn(thread, model) for thread in threads]
        turns = [len(thread.turns) for thread in self.threads]
        if [len(found) for found in counts] != turns:
            raise DataError(
                f"threads with {[len(found) for found in counts]} weighted turns, but {turns} were recorded"
            )
        return counts

    async def get_advantage_for_grpo(
        self, reward_mean: float, reward_std: float, tokenized_threads: list[TokenizedThread], model: InferenceModel
    ) -> list[list[float]]:
        """For each thread, one advantage for each weighted token.

        It is (reward - mean) / std, summed from the token's turn to the trajectory's end. A turn without grades
        adds nothing. Raises DataError unless each weighted turn was recorded.
        """
        counts = await self._counts(tokenized_threads, model)
        graded = self.get_grades_per_turn()
        rewards = [0.0 if g is None else (self.aggregator(g) - reward_mean) / reward_std for g in graded]
        credit = iter([*accumulate(reversed(rewards))][::-1])
        return [[one for count, one in zip(turns, credit) for _ in range(count)] for turns in counts]  # noqa: B905

    async def get_advantage_for_gspo(self, reward_mean: float, reward_std: float) -> float:
        """(reward - mean) / std of the trajectory's only reward. Raises DataError if it has another number of them."""
        rewards = self.get_raw_rewards_for_stats()
        if len(rewards) != 1:
            hint = "grade one turn, the last, or train with ENVGRPO or ENVPPO"
            raise DataError(f"GSPO needs one reward for each trajectory, not {len(rewards)}", hint=hint)
        return (rewards[0] - reward_mean) / reward_std

    async def get_advantage_for_ppo(
        self,
        model: InferenceModel,
        tokenized_threads: list[TokenizedThread],
        value_preds: list[list[float]],
        kl_divs: list[list[float]],
        kl_beta: float,
        gae_lambda: float,
        gae_gamma: float,
    ) -> tuple[list[list[float]], list[list[float]]]:
        """Advantages and returns: for each thread, one number for each weighted token.

        The reward of a token is -kl_beta times its divergence; the reward of a turn is added at its last token. All
        threads are one sequence: returns and advantages flow back from each into the one before. Raises DataError
        unless each weighted turn was recorded.
        """
        counts = await self._counts(tokenized_threads, model)
        rewards = [-kl_beta * divergence for divergence in chain.from_iterable(kl_divs)]
        ends = accumulate(chain.from_iterable(counts))
        for end, grades in zip(ends, self.get_grades_per_turn(), strict=True):
            rewards[end - 1] += 0.0 if grades is None else self.aggregator(grades)
        advantages = iter(gae_advantages([*chain.from_iterable(value_preds)], rewards, gae_lambda, gae_gamma))
        returns = iter(discounted_cumulative_rewards(rewards, gae_gamma))
        lengths = [sum(turns) for turns in counts]
        return [[next(advantages) for _ in range(n)] for n in lengths], [
            [next(returns) for _ in range(n)] for n in lengths
        ]


def get_reward_statistics(scores: list[TrajectoryHistory]) -> tuple[float, float]:
    """The mean and the population's standard deviation + 1e-8 of the rewards of all graded turns; 0 without any."""
    rewards = [reward for history in scores for reward in history.get_raw_rewards_for_stats()]
    if not rewards or min(rewards) == max(rewards):  # exactly 0 apart, which rounding would not give
        return (rewards or [0.0])[0], 1e-8
    return fmean(rewards), pstdev(rewards) + 1e-8
