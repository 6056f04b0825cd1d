"""Scored samples as the data of a run: which fit, which are refused, and where."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import CHATML, PROMPTS, prompt_rows, tiny_causal, tiny_tokenizer
from trainer.helpers import TOKENIZER, config, logged, low_ids, trainer

from bondlm import BONDTrainer
from bondlm.data.columns import LOGGED_IDS, LOGGED_REWARDS, PROMPT_IDS
from bondlm.data.fingerprints import model_fingerprint
from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.data.scored import group_scored, samples_per_prompt
from bondlm.errors import ConfigError, DataError


def scored_rows(num_prompts: int, num_samples: int = 4) -> list[dict[str, Any]]:
    """What `bondlm score` writes, with the rewards of `low_ids`."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(num_prompts):
        for _ in range(num_samples):
            ids = torch.randint(35, 290, (3,), generator=generator).tolist()
            text = TOKENIZER.decode(ids)
            back = TOKENIZER(text, add_special_tokens=False).input_ids
            rows.append({"prompt": PROMPTS[i], "completion": text, "reward": low_ids([back])[0]})
    return rows


def logged_trainer(tmp_path: Path, rows: Any, **settings: Any) -> BONDTrainer:
    wanted = {"objective": "best_of_n_regression", "n": 3, "anchor": "fixed", "max_completion_length": 12}
    return trainer(tmp_path, train_dataset=rows, **(wanted | settings))


def test_a_completion_that_was_cut_is_not_taught_to_end(tmp_path: Path) -> None:
    rows = [row | {"finished": i % 2 == 0} for i, row in enumerate(scored_rows(2))]
    made = logged_trainer(tmp_path, rows, model=tiny_causal(TOKENIZER), anchor=None, eta=0.02)  # the defaults
    assert made.args.anchor == "fixed"
    eos = made.encoder.eos_ids[0]
    made_ids = made.train_dataset["logged_ids"][0]
    assert [ids[-1] == eos for ids in made_ids] == [True, False, True, False]
    assert TOKENIZER.decode(made_ids[0][:-1]) == rows[0]["completion"]
    made.train()
    assert {row["completions/clipped_ratio"] for row in logged(tmp_path) if "loss" in row} == {0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": None}, "row 5: .*reward.*None.*'Why do cats"),
        ({"reward": float("nan")}, "row 5: .*reward.*nan"),
        ({"completion": None}, "row 5: .*completion.*None"),
        (
            {"completion": "a much longer completion than any that would fit"},
            r"row 5: .*\d+ tokens.*'Why do.*max_completion_length.*\b12\b",
        ),
    ],
)
def test_bad_scored_rows_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = scored_rows(3)
    rows[5] |= change
    with pytest.raises(DataError, match=message) as caught:
        logged_trainer(tmp_path, rows)
    assert caught.value.exit_code == 3


def test_too_few_scored_samples_are_counted(tmp_path: Path) -> None:
    rows = scored_rows(3)
    with pytest.raises(DataError, match=r"row 4: .*'Why do cats sleep so much\?'.*\b2 scored.*\b3\b"):
        logged_trainer(tmp_path, [row for i, row in enumerate(rows) if i not in (5, 7)])
    with pytest.raises(DataError, match=r"\b4 scored.*\b5\b"):
        logged_trainer(tmp_path, rows, num_samples=5)


def test_scored_samples_and_settings_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="objective='jbond'"):
        logged_trainer(tmp_path, scored_rows(2), objective="jbond", n=2)
    with pytest.raises(ConfigError, match=r"anchor='ema'.*the anchor is fixed"):
        logged_trainer(tmp_path, scored_rows(2), anchor="ema")
    with pytest.raises(ConfigError, match="missing_eos='worst'"):
        logged_trainer(tmp_path, scored_rows(2), missing_eos="worst")
    with pytest.raises(ConfigError, match="truncate_prompt='left'"):
        logged_trainer(tmp_path, scored_rows(2), truncate_prompt="left")
    with pytest.raises(ConfigError, match=r"^reward_funcs"):
        trainer(tmp_path, reward=None)
    with pytest.raises(ConfigError, match=r"^eval_dataset.*reward_funcs"):
        logged_trainer(tmp_path, scored_rows(2), reward=None, eval_dataset=prompt_rows(2))


@pytest.mark.parametrize("change", [{"reward": None}, {"completion": None}, {"prompt": "once"}])
def test_bad_scored_rows_are_refused_before_a_model_is_loaded(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("bondlm.trainer.prepare_policy", loaded)
    rows = scored_rows(3)
    rows[5] |= change
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"scored\.jsonl:6: "):
        logged_trainer(tmp_path, str(path))
    for settings, name in (
        ({"anchor": "ema"}, "anchor='ema'"),
        ({"eta": 0.3}, "eta=0.3"),
        ({"objective": "rloo", "n": 2}, "objective='rloo'"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "eval_strategy='steps'.*eval_dataset"),
    ):
        with pytest.raises(ConfigError, match=name):
            logged_trainer(tmp_path, scored_rows(3), **settings)


def test_scored_rows_may_come_in_any_order(tmp_path: Path) -> None:
    rows = scored_rows(4)
    mixed = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()]
    one, other = (logged_trainer(tmp_path, r).train_dataset.to_list() for r in (rows, mixed))
    key = {json.dumps(row["prompt"]): sorted(row["logged_rewards"]) for row in one}
    assert {json.dumps(row["prompt"]): sorted(row["logged_rewards"]) for row in other} == key


def test_what_the_template_looks_at_goes_with_its_prompt(tmp_path: Path) -> None:
    """Two prompts are the same if the template makes the same of them; an answer ends as the template ends a turn."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML + "{{ mood }}"
    model = tiny_causal(tokenizer)
    model.generation_config.eos_token_id = [5, 2]
    encoder = PromptEncoder.of_model(model, tokenizer, max_completion_length=8)
    rows = [
        {"prompt": "Hi", "completion": "a", "reward": float(i), "chat_template_kwargs": {"mood": mood}}
        for i, mood in enumerate(("good", "bad", "good", "bad"))
    ]
    assert samples_per_prompt(Dataset.from_list(rows)) == 2
    settings = config(tmp_path, objective="listwise", n=2, anchor="fixed")
    grouped = group_scored(Dataset.from_list(rows), encoder, settings, [f"row {i}" for i in range(4)])
    assert grouped[LOGGED_REWARDS][:] == [[0.0, 2.0], [1.0, 3.0]]
    assert {ids[-1] for group in grouped[LOGGED_IDS] for ids in group} == {2}
    texts = [tokenizer.decode(ids) for ids in encoder.with_ids(grouped)[PROMPT_IDS]]
    assert [text.rpartition("\n")[2] for text in texts] == ["good", "bad"]


def with_ids(rows: list[dict[str, Any]], cut: int = 0) -> list[dict[str, Any]]:
    """The rows as they would be drawn, a letter a token: not what the tokenizer makes of their text."""
    drawn = []
    for i, row in enumerate(rows):
        ids = [i for letter in row["completion"] for i in TOKENIZER(letter, add_special_tokens=False).input_ids]
        drawn.append(row | {"finished": i != cut, "token_ids": ids + [2] * (i != cut)})
    return drawn


WORDS = [{"prompt": PROMPTS[i // 3], "completion": f"the dog {i}", "reward": float(i)} for i in range(6)]


def test_samples_are_learned_as_they_were_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = with_ids(WORDS)
    assert max(len(row["token_ids"]) for row in rows) == 10
    assert any(TOKENIZER(row["completion"]).input_ids != row["token_ids"][:-1] for row in rows)
    made = logged_trainer(tmp_path, rows, max_completion_length=10, model=tiny_causal(TOKENIZER))
    drawn = [ids for group in made.train_dataset[LOGGED_IDS] for ids in group]
    assert drawn == [row["token_ids"] for row in rows]
    assert "token_ids" not in caplog.text
    rows[1] |= {"completion": "the cat"}  # by hand, and of another vocabulary, and without its end
    rows[2] |= {"token_ids": [5000, 2]}
    rows[3] |= {"token_ids": rows[3]["token_ids"][:-1]}
    made = logged_trainer(tmp_path, rows, max_completion_length=16, model=tiny_causal(TOKENIZER))
    again = [ids for group in made.train_dataset[LOGGED_IDS] for ids in group]
    eos = made.encoder.eos_ids[0]
    assert [i for i in range(6) if again[i] != drawn[i]] == [1, 2, 3]
    assert again[1] == [*TOKENIZER("the cat").input_ids, eos]
    assert "token_ids of 3 of 6 samples" in caplog.text


def test_bad_scored_rows_are_skipped_with_prompts_that_are_short_then(tmp_path: Path) -> None:
    rows = scored_rows(6)
    rows[1] |= {"reward": None}
    rows[5] |= {"completion": None}
    rows[6] |= {"completion": "a much longer completion than any that would fit"}
    made = logged_trainer(tmp_path, rows, on_bad_row="skip", max_skipped_frac=0.5)
    assert made.train_dataset["prompt"][:] == [PROMPTS[i] for i in (0, 2, 3, 4, 5)]
    assert [sorted(group) for group in made.train_dataset[LOGGED_REWARDS][:1]] == [
        sorted(row["reward"] for row in (rows[0], rows[2], rows[3]))
    ]
    places = [reason.split(": ")[0] for reason in made.drops.skipped_rows]
    assert len(places) == 5  # rows 1 and 5, then 6, and the two that are left of their prompt
    with pytest.raises(DataError, match=r"of 24 rows.*max_skipped_frac=0\.01"):
        logged_trainer(tmp_path, rows, on_bad_row="skip")
    with pytest.raises(DataError, match="no scored sample"):
        logged_trainer(tmp_path, rows[:2], on_bad_row="skip", max_skipped_frac=1.0)


def test_samples_that_a_prompt_with_fewer_leaves_unused_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"question {p}", "completion": f"{j}", "reward": float(j)} for p in range(8) for j in range(8)]
    uneven = [row for i, row in enumerate(rows) if not 26 <= i < 32]
    made = logged_trainer(tmp_path, uneven, n=2)
    assert made.objective.plan.total == 2
    assert "16 of 58 scored samples are learned from, 2 of each prompt: the prompt 'question 3' has" in caplog.text
    assert "fewer than 8, 56 would be: remove these, or set num_samples=8" in caplog.text
    caplog.clear()
    more = {"num_samples": 8, "on_bad_row": "skip", "max_skipped_frac": 0.1}
    made = logged_trainer(tmp_path, uneven, n=2, **more)
    assert [len(group) for group in made.train_dataset[LOGGED_REWARDS]] == [8] * 7
    assert made.objective.plan.total == 8
    logged_trainer(tmp_path, rows, n=2)
    logged_trainer(tmp_path, uneven, n=2, objective="best_of_n_sft")
    logged_trainer(tmp_path, uneven, n=2, num_samples=2)
    assert "learned from" not in caplog.text


def test_a_sample_too_long_costs_that_sample_and_not_its_prompt(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"question {p}", "completion": "long " * 9 if j == p else f"{j}", "reward": float(j)}
        for p in range(4)
        for j in range(8)
    ]
    made = logged_trainer(tmp_path, rows, on_bad_row="skip", max_skipped_frac=0.2)
    assert len(made.drops.skipped_rows) == 4
    assert made.objective.plan.total == 7
    assert made.train_dataset[LOGGED_REWARDS][1] == [0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    made.train()


def write_scored(folder: Path, prompting: dict[str, Any] | None, name: str = "scored.jsonl") -> Path:
    rows = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in WORDS]
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    origin = {"model": model_fingerprint("", None), "rewards": []}
    beside = origin | ({} if prompting is None else {"prompting": prompting})
    path.with_name(f"{name}.meta.json").write_text(json.dumps(beside))
    return path


PROMPTING = {"prompt_format": "auto", "chat_template_kwargs": {}, "now": "2026-01-02T03:04:05"}


def dated(folder: Path, source: Any, **settings: Any) -> BONDTrainer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML + "{{ strftime_now('%Y-%m-%d') }}{{ mood }}"
    return logged_trainer(folder, source, processing_class=tokenizer, max_completion_length=16, **settings)


def test_a_scored_file_is_learned_behind_the_prompts_that_it_was_drawn_behind(tmp_path: Path) -> None:
    path = write_scored(tmp_path, PROMPTING)
    made = dated(tmp_path / "run", str(path))
    assert made.encoder.tokenizer.decode(made.train_dataset[PROMPT_IDS][0]).endswith("2026-01-02")
    write_scored(tmp_path, PROMPTING | {"now": "2026-02-02T00:00:00"}, "other.jsonl")
    with pytest.raises(ConfigError, match=r"date.*2026-02-02.*2026-01-02"):
        dated(tmp_path / "two", [str(path), str(tmp_path / "other.jsonl")])
    with pytest.raises(ConfigError, match="chat_template_kwargs"):
        dated(tmp_path / "three", str(path), chat_template_kwargs={"mood": "good"})
    text = tmp_path / "text.jsonl"
    write_scored(tmp_path, PROMPTING | {"prompt_format": "plain"}, "text.jsonl")
    text.write_text("".join(json.dumps(row) + "\n" for row in WORDS))
    with pytest.raises(ConfigError, match=r"prompt_format='auto'.*'plain'"):
        dated(tmp_path / "four", str(text))
    assert dated(tmp_path / "five", str(text), prompt_format="plain").train_dataset is not None
    assert dated(tmp_path / "six", str(write_scored(tmp_path, None))).train_dataset is not None
