"""Check that rewards can take a run's rows (length and columns), once prompts and models are loaded."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from bondlm.data.columns import LOGGED_IDS, PROMPT_IDS, PROMPT_ROW
from bondlm.errors import ConfigError, DataError
from bondlm.rewards.calls import accepted_arguments
from bondlm.rewards.classifier import SequenceClassifierReward
from bondlm.rewards.extras import NAMES
from bondlm.rewards.http import HTTPReward, refuse_no_json
from bondlm.rewards.nli import NLIReward
from bondlm.rewards.ranking import RankReward
from bondlm.rewards.scoring import NamedReward
from bondlm.rewards.similarity import SimilarityReward

LOOKED_AT = 32  # of the longest prompts, since the reward model's tokenizer may order them differently

OWN = ("prompt", PROMPT_IDS, PROMPT_ROW)  # the other columns are the data set's

_log = logging.getLogger(__name__)


def check_room(rewards: Sequence[NamedReward], rows: Sequence[Mapping[str, Any]], max_completion_length: int) -> None:
    """Check that reward models that refuse long rows accept the longest of these prompts, and find their columns.

    It warns if a long completion would exceed the limit.

    Raises:
        ConfigError: a prompt is too long even without a completion, a reward needs a column that the rows lack, or a
            server cannot be sent one that they have.
        DataError: a reward model cannot score a prompt, because its chat template refuses it or a text is missing.
    """
    for row in {tuple(row): row for row in rows if LOGGED_IDS not in row}.values():  # scored rows need no reward
        for reward in rewards:
            _check_columns(reward, row)
    for reward in rewards:
        if isinstance(reward.function, HTTPReward):
            _check_json(reward, rows)
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
                f"reward {reward.name!r} takes {limit} tokens, but a prompt has {alone} without any completion: leave "
                f"out such prompts, or {cut}"
            )
        if most > limit:
            _log.warning(
                "reward %r takes %d tokens, but a prompt with a completion of max_completion_length=%d may have %d; "
                "such prompts are dropped: lower max_completion_length, or %s",
                reward.name,
                limit,
                max_completion_length,
                most,
                cut,
            )


def _check_columns(reward: NamedReward, row: Mapping[str, Any]) -> None:
    """Check that what a row's data set offers satisfies the signature of a user's function (`score_samples`)."""
    columns = [name for name in row if name not in OWN]
    try:
        if isinstance(reward.function, RankReward):
            single = dict.fromkeys([*columns, "prompt", "trainer_state", "log_metric"])
            function, names = reward.function.asked
            accepted_arguments(reward.name, function, {name: [] for name in names}, single)
        elif not reward.ranks:
            names = ("prompts", "completions", "truncated", "completion_ids", *columns)
            accepted_arguments(reward.name, reward.function, {name: [] for name in names}, dict.fromkeys(NAMES))
    except ConfigError as error:
        raise ConfigError(f"{error} (In the data set that contains the prompt {_shown(row)!r}.)") from error


def _check_json(reward: NamedReward, rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        try:
            if LOGGED_IDS not in row:
                refuse_no_json({name: value for name, value in row.items() if name not in OWN})
        except ConfigError as error:
            raise ConfigError(f"reward {reward.name!r}: {error}. It is that of the prompt {_shown(row)!r}.") from error


def _shown(row: Mapping[str, Any]) -> str:
    """The beginning of a row's prompt."""
    prompt = row["prompt"]
    text = prompt if isinstance(prompt, str) else prompt[-1].get("content")
    return str(text)[:80]


def _tokens(reward: NamedReward, row: Mapping[str, Any]) -> int:
    """Tokens of a prompt without a completion."""
    try:
        return int(reward.function.num_tokens(row, 0))  # type: ignore[attr-defined]
    except DataError as error:
        raise DataError(f"reward {reward.name!r} cannot score the prompt {_shown(row)!r}: {error}") from error
