"""Graders: coroutines that turn a thread into a score, and the logs of their scores."""

from harmony_core.errors import IgnoreGradeException
from harmony_core.graders.base import (
    BaseGrader,
    FailedJudgeLog,
    Grade,
    SuccessJudgeLog,
    grade_or_refuse,
    score_or_refuse,
)
from harmony_core.graders.binary_judge import (
    BaseTemplatedPromptJudgeOutput,
    BinaryJudgeGrader,
    BinaryJudgeOutput,
    BinaryJudgeShot,
    ScoresMap,
    SimpleReasonedFloatOutput,
)
from harmony_core.graders.combined import CombinedGrader
from harmony_core.graders.judges import (
    OPENAI_MODEL_FAMILIES_TEMPERATURE_1_ONLY,
    Judge,
    PromptBuildingBlocks,
    sample_score_distribution,
    separate_context_from_last_user_turn,
    validate_thread_last_assistant,
)
from harmony_core.graders.keys import Grader, GraderRegistry
from harmony_core.graders.range_judge import RangeJudgeGrader, RangeJudgeShot, ReasonedScore, SubrangeExpectations
from harmony_core.graders.relevancy import (
    AnswerRelevancyGrader,
    AnswerRelevancyResults,
    ContextRelevancyGrader,
    DocumentRelevancyResult,
    FaithfulnessGrader,
    FaithfulnessGraderOutput,
    SingleStatementFaithfulnessJudgeOutput,
    StatementRelevancy,
    SupportedLanguages,
    split_sentences,
)
from harmony_core.graders.reward_server import RewardClient, RewardServerGrader
from harmony_core.graders.templated_judge import TemplatedPromptJudgeGrader
from harmony_core.graders.verifiable import exact_match_grader, json_grader, math_grader, regex_grader

__all__ = [
    "OPENAI_MODEL_FAMILIES_TEMPERATURE_1_ONLY",
    "AnswerRelevancyGrader",
    "AnswerRelevancyResults",
    "BaseGrader",
    "BaseTemplatedPromptJudgeOutput",
    "BinaryJudgeGrader",
    "BinaryJudgeOutput",
    "BinaryJudgeShot",
    "CombinedGrader",
    "ContextRelevancyGrader",
    "DocumentRelevancyResult",
    "FailedJudgeLog",
    "FaithfulnessGrader",
    "FaithfulnessGraderOutput",
    "Grade",
    "Grader",
    "GraderRegistry",
    "IgnoreGradeException",
    "Judge",
    "PromptBuildingBlocks",
    "RangeJudgeGrader",
    "RangeJudgeShot",
    "ReasonedScore",
    "RewardClient",
    "RewardServerGrader",
    "ScoresMap",
    "SimpleReasonedFloatOutput",
    "SingleStatementFaithfulnessJudgeOutput",
    "StatementRelevancy",
    "SubrangeExpectations",
    "SuccessJudgeLog",
    "SupportedLanguages",
    "TemplatedPromptJudgeGrader",
    "exact_match_grader",
    "grade_or_refuse",
    "json_grader",
    "math_grader",
    "regex_grader",
    "sample_score_distribution",
    "score_or_refuse",
    "separate_context_from_last_user_turn",
    "split_sentences",
    "validate_thread_last_assistant",
]
