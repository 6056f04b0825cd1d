"""Rewards: functions, classifiers, entailment and similarity models, servers, and `score`, the only door to them."""

from bondlm.rewards.batching import map_micro_batches, micro_batches
from bondlm.rewards.calls import RewardFunction
from bondlm.rewards.classifier import SequenceClassifierReward
from bondlm.rewards.functions import load_function
from bondlm.rewards.http import HTTPReward
from bondlm.rewards.load import load_rewards, rewards_of_run
from bondlm.rewards.nli import NLIReward
from bondlm.rewards.scoring import NamedReward, Scores, applies_everywhere, score
from bondlm.rewards.similarity import SimilarityReward

__all__ = [
    "HTTPReward",
    "NLIReward",
    "NamedReward",
    "RewardFunction",
    "Scores",
    "SequenceClassifierReward",
    "SimilarityReward",
    "applies_everywhere",
    "load_function",
    "load_rewards",
    "map_micro_batches",
    "micro_batches",
    "rewards_of_run",
    "score",
]
