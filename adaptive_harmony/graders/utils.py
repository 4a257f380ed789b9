"""Records of judges, and parts of threads."""

from harmony_core.graders import (
    FailedJudgeLog as FailedJudgeLog,
    SuccessJudgeLog as SuccessJudgeLog,
    sample_score_distribution as sample_score_distribution,
    separate_context_from_last_user_turn as separate_context_from_last_user_turn,
    validate_thread_last_assistant as validate_thread_last_assistant,
)
