"""Whether reward models take rows as long as a run's: looked up when prompts and models are there."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from bondlm.data.columns import PROMPT_IDS
from bondlm.errors import ConfigError, DataError
from bondlm.rewards.classifier import SequenceClassifierReward
from bondlm.rewards.nli import NLIReward
from bondlm.rewards.scoring import NamedReward
from bondlm.rewards.similarity import SimilarityReward

LOOKED_AT = 32  # of the longest prompts: the reward model's own tokens may order them otherwise

_log = logging.getLogger(__name__)


def check_room(rewards: Sequence[NamedReward], rows: Sequence[Mapping[str, Any]], max_completion_length: int) -> None:
    """See that reward models that refuse long rows take the longest of these encoded prompts.

    A warning says where a long completion would be too much.

    Raises:
        ConfigError: a prompt is too long without any completion.
        DataError: a prompt that a reward model cannot score: its chat template refuses it, or it lacks a text.
    """
    longest = sorted(rows, key=lambda row: -len(row[PROMPT_IDS]))[:LOOKED_AT]
    for reward in rewards if longest else ():
        model = reward.function
        if not isinstance(model, SequenceClassifierReward | NLIReward | SimilarityReward):
            continue
        alone = max(_tokens(reward, row) for row in longest)
        if (limit := model.limit) is None:
            continue
        most = max(model.num_tokens(row, max_completion_length) for row in longest)
        cut = "let it cut what is too long with its option truncate (docs/rewards.md)"
        if alone > limit:
            raise ConfigError(
                f"reward {reward.name!r} takes {limit} tokens, and a prompt has {alone} without any completion: leave "
                f"out such prompts, or {cut}"
            )
        if most > limit:
            _log.warning(
                "reward %r takes %d tokens, but a prompt with a completion of max_completion_length=%d may have %d; "
                "such prompts are dropped: lower max_completion_length, or %s",
                *(reward.name, limit, max_completion_length, most, cut),
            )


def _tokens(reward: NamedReward, row: Mapping[str, Any]) -> int:
    """Of a prompt without any completion."""
    try:
        return int(reward.function.num_tokens(row, 0))  # type: ignore[attr-defined]
    except DataError as error:
        prompt = row["prompt"]
        text = prompt if isinstance(prompt, str) else prompt[-1].get("content")
        raise DataError(f"reward {reward.name!r} cannot score the prompt {str(text)[:80]!r}: {error}") from error
