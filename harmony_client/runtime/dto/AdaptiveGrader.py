"""Records of graders."""

from harmony_core.graders.records import (
    AdaptiveGrader as AdaptiveGrader,
    CustomJudge as CustomJudge,
    PrebuiltJudge as PrebuiltJudge,
    RemoteRewardEndpoint as RemoteRewardEndpoint,
)
