"""`bondlm reward-model` on tiny models: what it learns, and that it is a reward later."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rewards.small_models import bert_tokenizer, saved, unmasked
from safetensors.torch import load_file, save_file
from transformers import AutoModel, TrainingArguments

from bondlm.cli import main
from bondlm.errors import ConfigError, DataError
from bondlm.rewards import load_rewards, score
from bondlm.stages.reward_model import load_base, preference_trainer
from stages.helpers import CHEAP, preferences, save, write


@pytest.mark.parametrize(("chat", "extra"), [(False, []), (True, []), (False, ["--use_peft"])])
def test_a_reward_model_learns_the_preference_and_loads_as_a_reward(
    tmp_path: Path, chat: bool, extra: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data, model = write(tmp_path / "p.jsonl", preferences(40, chat=chat)), save(tmp_path / "model", "causal")
    command = ["reward-model", "--model", model, "--train_dataset", data, "--output_dir", str(tmp_path / "rm")]
    assert main([*command, "--num_train_epochs", "4", "--learning_rate", "5e-3", *CHEAP, *extra]) == 0
    facts = json.loads((tmp_path / "rm" / "reward.json").read_text())
    assert facts["accuracy"]["value"] > 0.9
    assert (facts["held_out_pairs"], facts["train_pairs"]) == (4, 36)
    assert "held-out accuracy" in capsys.readouterr().out
    row = preferences(1, chat=chat)[0]
    answers = [row["chosen"], row["rejected"]]
    completions = [[{"role": "assistant", "content": a}] for a in answers] if chat else answers
    scores = score(load_rewards(str(tmp_path / "rm"), dtype=torch.float32), [row["prompt"]] * 2, completions, {}).total
    assert scores[0] > scores[1]


def test_the_margin_in_training_is_the_difference_of_the_rewards_later(tmp_path: Path) -> None:
    from bondlm.rewards.classifier import SequenceClassifierReward
    from bondlm.stages.reward_model import Pairs, accuracy_of, margins, margins_of

    model, tokenizer = load_base(save(tmp_path / "model", "causal"))
    rows, pairs = preferences(5), Pairs(model, tokenizer)
    model.eval()
    with torch.no_grad():
        together = margins(model, pairs.collate(pairs.encode(rows)))
    assert any(parameter.requires_grad for parameter in model.parameters())
    reward = SequenceClassifierReward(model, tokenizer)
    prompts = [row["prompt"] for row in rows]
    better, worse = (reward(prompts, [row[name] for row in rows]) for name in ("chosen", "rejected"))
    assert together.tolist() == pytest.approx([a - b for a, b in zip(better, worse, strict=True)], abs=1e-5)
    wins = sum(a > b for a, b in zip(better, worse, strict=True)) / 5
    assert accuracy_of(margins_of(model, pairs, rows, batch_size=2), rows).accuracy.value == pytest.approx(wins)


@pytest.mark.parametrize("chat", [False, True])
def test_an_answer_that_ends_with_its_end_token_is_learned_as_a_reward_gets_it(
    tmp_path: Path, chat: bool, caplog: pytest.LogCaptureFixture
) -> None:
    from bondlm.stages.reward_model import Pairs

    model, tokenizer = load_base(save(tmp_path / "model", "causal"))
    rows, pairs = preferences(3, chat=chat), Pairs(model, tokenizer)
    ended = [row | {"chosen": f"{row['chosen']}{tokenizer.eos_token}\n"} for row in rows]
    assert pairs.encode(ended) == pairs.encode(rows)
    assert [record.getMessage() for record in caplog.records if "left out" in record.getMessage()] == [
        f"the text of answers ends with {tokenizer.eos_token!r}: it is left out, as no reward gets it"
    ]
    for answers in ({"rejected": rows[0]["chosen"] + tokenizer.eos_token}, {"chosen": tokenizer.eos_token}):
        with pytest.raises(DataError, match="row 1: without end tokens an answer is empty, or both are equal"):
            pairs.encode([rows[1], rows[0] | answers])


@pytest.mark.parametrize("margin", [1.0, -1.0])
def test_an_accuracy_of_few_pairs_has_a_wide_interval_also_where_all_are_right(margin: float) -> None:
    from bondlm.stages.reward_model import accuracy_of

    rows = preferences(2)
    value, low, high = accuracy_of(torch.tensor([margin] * 2, dtype=torch.float64), rows).accuracy
    assert value == (margin > 0)
    assert high - low == pytest.approx(1 - 0.025**0.5)  # two right of two: the chance is at least sqrt(0.025)
    assert low <= value <= high
    mixed = accuracy_of(torch.tensor([1.0, -1.0], dtype=torch.float64), rows).accuracy
    assert mixed == (0.5, 0.0, 1.0)
    (alone,) = preferences(1)
    assert accuracy_of(torch.tensor([margin], dtype=torch.float64), [alone]).accuracy.low == -float("inf")


def test_only_the_head_of_a_reward_model_may_be_random(tmp_path: Path) -> None:
    from bondlm.stages.reward_model import load_base

    path = tmp_path / "model" / "model.safetensors"
    save(path.parent, "causal")
    save_file({k: v for k, v in load_file(path).items() if "layers.1.mlp" not in k}, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.down_proj.*random numbers"):
        load_base(str(path.parent))


def test_a_base_whose_scores_depend_on_padding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"convbert.*padding"):
        load_base(saved(tmp_path, unmasked(AutoModel, "convbert", bert_tokenizer()), bert_tokenizer()))


def test_a_model_that_is_trained_here_gets_one_text(tmp_path: Path) -> None:
    from bondlm.stages.reward_model import Pairs

    model, tokenizer = load_base(save(tmp_path / "model", "causal"))
    with pytest.raises(ConfigError, match=r"prompt_format.*'pair'"):
        Pairs(model, tokenizer, prompt_format="pair")  # type: ignore[arg-type]


def test_a_step_is_the_mean_over_its_pairs_however_it_is_divided(tmp_path: Path) -> None:
    name = save(tmp_path / "model", "causal")
    rows = [row | {"margin": float(i)} for i, row in enumerate(preferences(8))]

    def weights(batch: int, parts: int) -> torch.Tensor:
        model, tokenizer = load_base(name)
        args: dict[str, Any] = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": parts}
        args |= {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 1.0, "max_grad_norm": 0.0}
        args |= {"max_steps": 1, "save_strategy": "no", "remove_unused_columns": False, "use_cpu": True}
        trainer, _ = preference_trainer(model, tokenizer, rows, TrainingArguments(str(tmp_path), **args))
        trainer.train()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    start = torch.cat([p.detach().flatten() for p in load_base(name)[0].parameters()])
    whole, parts = weights(8, 1) - start, weights(2, 4) - start
    assert whole.norm() > 1e-3
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)


def test_a_margin_is_subtracted_in_the_loss_and_not_in_the_accuracy(tmp_path: Path) -> None:
    """As in Llama 2 (section 3.2.2) and TRL's RewardTrainer; a pair without a margin has 0."""
    from bondlm.stages.reward_model import margins_of

    model, tokenizer = load_base(save(tmp_path / "model", "causal"))
    rows = [row | margin for row, margin in zip(preferences(3), ({"margin": 3.0}, {}, {"margin": -1.5}), strict=True)]
    args = TrainingArguments(str(tmp_path), use_cpu=True, remove_unused_columns=False)
    trainer, pairs = preference_trainer(model, tokenizer, rows, args)
    gaps_B = margins_of(model, pairs, rows)
    torch.testing.assert_close(gaps_B, margins_of(model, pairs, preferences(3)))
    loss = trainer.compute_loss(model, trainer.data_collator(list(trainer.train_dataset)))
    by_hand = -torch.nn.functional.logsigmoid(gaps_B - torch.tensor([3.0, 0.0, -1.5])).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
