"""Rewards: functions, classifiers, entailment and similarity models, servers, and `score`, which calls all of them."""

from bondlm.rewards.aggregation import SUM, Aggregation, aggregation_of
from bondlm.rewards.batching import map_micro_batches, micro_batches
from bondlm.rewards.calls import RewardFunction
from bondlm.rewards.classifier import SequenceClassifierReward
from bondlm.rewards.functions import load_function
from bondlm.rewards.http import HTTPReward
from bondlm.rewards.judge import JudgeReward
from bondlm.rewards.load import load_rewards, rewards_of_run
from bondlm.rewards.nli import NLIReward
from bondlm.rewards.ranking import RankReward, by_pairs, is_ranking
from bondlm.rewards.room import check_room
from bondlm.rewards.scoring import NamedReward, Scores, applies_everywhere, score
from bondlm.rewards.similarity import SimilarityReward

__all__ = [
    "SUM",
    "Aggregation",
    "HTTPReward",
    "JudgeReward",
    "NLIReward",
    "NamedReward",
    "RankReward",
    "RewardFunction",
    "Scores",
    "SequenceClassifierReward",
    "SimilarityReward",
    "aggregation_of",
    "applies_everywhere",
    "by_pairs",
    "check_room",
    "is_ranking",
    "load_function",
    "load_rewards",
    "map_micro_batches",
    "micro_batches",
    "rewards_of_run",
    "score",
]
