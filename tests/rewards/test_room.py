"""Reward models and the longest rows of a run."""

import logging
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from datasets import Dataset
from trainer.helpers import trainer
from transformers import MPNetConfig, MPNetForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from bondlm.data.columns import LOGGED_IDS, PROMPT_IDS
from bondlm.errors import ConfigError
from bondlm.rewards import (
    NamedReward,
    NLIReward,
    RankReward,
    SequenceClassifierReward,
    SimilarityReward,
    by_pairs,
    check_room,
)
from bondlm.rollout.samples import longest_rows

from .small_models import PROMPTS, bert_classifier, bert_encoder, bert_tokenizer

ROWS = [{"prompt": prompt, PROMPT_IDS: prompt.split()} for prompt in PROMPTS]
LONGEST = max(len(bert_tokenizer()(prompt)["input_ids"]) for prompt in PROMPTS)


def classifier(limit: int, **options: Any) -> SequenceClassifierReward:
    tokenizer = bert_tokenizer(max_length=limit)
    return SequenceClassifierReward(bert_classifier(tokenizer), tokenizer, **options)


def nli(limit: int) -> NLIReward:
    tokenizer = bert_tokenizer(max_length=limit)
    labels = {"id2label": {0: "entailment", 1: "neutral"}, "label2id": {"entailment": 0, "neutral": 1}}
    return NLIReward(bert_classifier(tokenizer, **labels), tokenizer)


def similarity(limit: int) -> SimilarityReward:
    tokenizer = bert_tokenizer(max_length=limit)
    return SimilarityReward(bert_encoder(tokenizer), tokenizer)


# Most tokens of a prompt with a completion of 3: NLI has one separator more, similarity embeds each text alone.
@pytest.mark.parametrize(
    ("make", "alone", "most"),
    [(classifier, LONGEST, LONGEST + 3), (nli, LONGEST + 1, LONGEST + 4), (similarity, LONGEST, LONGEST)],
)
def test_prompts_that_cannot_be_scored_are_refused_and_completions_warned_of(
    make: Any, alone: int, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    for limit in range(alone - 2, most + 2):
        caplog.clear()
        if limit < alone:
            with pytest.raises(ConfigError, match=rf"'rm' takes {limit} tokens.* {alone} without"):
                check_room([NamedReward("rm", make(limit))], ROWS, 3)
            continue
        with caplog.at_level(logging.WARNING, logger="bondlm.rewards"):
            check_room([NamedReward("rm", make(limit))], ROWS, 3)
        assert ("max_completion_length=3" in caplog.text) == (limit < most)


def test_what_is_cut_and_what_is_no_model_has_room(caplog: pytest.LogCaptureFixture) -> None:
    others = [NamedReward("f", lambda completions: []), NamedReward("m", Mock())]
    check_room([NamedReward("rm", classifier(5, truncate="left", prompt_format="plain")), *others], ROWS, 100)
    check_room([NamedReward("rm", classifier(5, prompt_format="plain"))], [], 100)
    assert not caplog.records


@pytest.mark.parametrize(
    ("model_class", "config_class"),
    [(RobertaForSequenceClassification, RobertaConfig), (MPNetForSequenceClassification, MPNetConfig)],
)
def test_positions_that_count_from_behind_the_padding_are_fewer(model_class: Any, config_class: Any) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    tokenizer = bert_tokenizer(max_length=int(1e30))
    config = config_class(vocab_size=len(tokenizer), max_position_embeddings=12, pad_token_id=1, num_labels=1, **sizes)
    model = model_class(config).eval()
    limit = SequenceClassifierReward(model, tokenizer).limit
    assert limit == 10
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))


def test_the_longest_rows_are_found_in_every_data_set() -> None:
    first, second = (Dataset.from_list([{PROMPT_IDS: [0] * n} for n in sizes]) for sizes in ((3, 9, 5), (2, 7)))
    assert [len(row[PROMPT_IDS]) for row in longest_rows(first, {"a": second, "b": None}, count=2)] == [9, 5, 7, 2]


def test_a_run_is_refused_before_its_first_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes 5 tokens"):
        trainer(tmp_path, reward=classifier(5))


def test_columns_that_a_signature_wants_are_looked_up() -> None:
    def by_rank(prompt: Any, completions: Any, answer: Any, log_metric: Any) -> Any: ...
    def by_value(completions: Any, answer: Any, truncated: Any, log_extra: Any, other: Any = None) -> Any: ...

    def of_pairs(prompt: Any, first: Any, second: Any, answer: Any, trainer_state: Any) -> Any: ...

    rows = [ROWS[0] | {"answer": "a"}, ROWS[1] | {"answer": "b"}]
    for function in (RankReward(by_rank), by_pairs(of_pairs), by_value):
        check_room([NamedReward("r", function)], rows, 3)
        check_room([NamedReward("r", function)], [], 3)
        check_room([NamedReward("r", function)], [ROWS[0] | {LOGGED_IDS: [[1]]}], 3)
        said = rf"^reward 'r' has the signature .*: missing a required argument: 'answer'.* prompt '{PROMPTS[2]}'"
        with pytest.raises(ConfigError, match=said):
            check_room([NamedReward("r", function)], [*rows, ROWS[2]], 3)
