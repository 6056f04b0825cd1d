from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from bondlm.evaluation.card import write_card

NUMBERS = {"value": 1.5, "low": 1.0, "high": 2.0}


def result(**changes: Any) -> dict[str, Any]:
    return {
        "objective": {"name": "jbond", "n": 2, "beta": 0.5},
        "reference": "some/base",
        "rewards": ["letters"],
        "dataset": None,
        "num_prompts": 6,
        "steps": 2,
        "effective_n": NUMBERS | {"text": "1.5 [1.0, 2.0]"},
        **dict.fromkeys(("win_rate", "kl", "reward"), NUMBERS),
    } | changes


@pytest.mark.parametrize("adapter", [False, True])
def test_its_head_says_what_a_hub_reads(tmp_path: Path, adapter: bool) -> None:
    if adapter:
        (tmp_path / "adapter_config.json").write_text("{}")
    # A colon and a quote: what a hand-written head would not survive.
    config = {"model": "models/a: 'b'", "train_dataset": "train.jsonl", "eval_dataset": "data/held out.jsonl"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    write_card(tmp_path, result(dataset=config["eval_dataset"]))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "models/a: 'b'"
    assert card.data.library_name == ("peft" if adapter else "transformers")
    assert {"bondlm", "best-of-n"} <= set(card.data.tags)
    measured = {each.metric_type: each for each in card.data.eval_results}
    assert set(measured) == {"effective_n", "win_rate", "kl", "reward"}
    assert measured["kl"].metric_value == 1.5
    assert measured["kl"].metric_args == {"low": 1.0, "high": 2.0}
    assert measured["kl"].dataset_name == "data/held out.jsonl"
    assert "worth Best-of-1.5 [1.0, 2.0] of `some/base`" in card.text
    assert "held out: `data/held out.jsonl`" in card.text


def test_a_policy_below_its_reference_has_no_n(tmp_path: Path) -> None:
    write_card(tmp_path, result(win_rate={"value": 0.31, "low": 0.2, "high": 0.4}))
    card = ModelCard.load(tmp_path / "README.md")
    assert "measured to be below `some/base` (win rate 0.31, under 0.5)" in card.text
    assert "worth Best-of" not in card.text
    assert {each.metric_type for each in card.data.eval_results} == {"win_rate", "kl", "reward"}


def test_a_number_that_is_not_finite_is_in_the_text_alone(tmp_path: Path) -> None:
    beyond = {"value": float("inf"), "low": 12.0, "high": float("inf"), "text": "> 16"}
    write_card(tmp_path, result(effective_n=beyond, kl=NUMBERS | {"high": float("inf")}))
    card = ModelCard.load(tmp_path / "README.md")
    measured = {each.metric_type: each for each in card.data.eval_results}
    assert set(measured) == {"win_rate", "kl", "reward"}
    assert measured["kl"].metric_args == {"low": 1.0}
    assert measured["kl"].dataset_name == "held-out prompts"
    assert "> 16" in card.text


@pytest.mark.parametrize(("measured", "said"), [(8, False), (4, True), (None, False)])
def test_another_length_than_that_of_training_is_said(tmp_path: Path, measured: int | None, said: bool) -> None:
    (tmp_path / "config.yaml").write_text("max_completion_length: 8")
    write_card(tmp_path, result(max_completion_length=measured))
    text = ModelCard.load(tmp_path / "README.md").text
    assert ("and at most 8 tokens (measured with at most 4)." in text) == said
    assert ("and at most 8 tokens." in text) != said


def test_judges_that_compare_are_measured_numbers_too(tmp_path: Path) -> None:
    wins = {"reference": NUMBERS, "reference, best of 4": NUMBERS | {"high": 1.75}}
    write_card(tmp_path, result(pairwise={"small": {"win_rate": wins, "num_pairs": 9}}))
    text = ModelCard.load(tmp_path / "README.md").text
    assert "| win rate against reference, pairs judged by small | 1.500 [1.000, 2.000] |" in text
    assert "| win rate against reference, best of 4, pairs judged by small | 1.500 [1.000, 1.750] |" in text
