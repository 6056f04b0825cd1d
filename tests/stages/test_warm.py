"""Reward models whose weights are averaged: the head that they share, how they differ, what is saved and said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from rewards.small_models import bert_classifier, bert_tokenizer, saved
from safetensors.torch import load_file
from torch.nn.functional import softplus
from transformers import AutoModelForSequenceClassification, TrainingArguments

from bondlm.cli import main
from bondlm.errors import ConfigError
from bondlm.rewards import load_rewards, score
from bondlm.stages.reward_model import Pairs, load_base, margins_of, preference_trainer
from bondlm.stages.rows import flip_labels
from bondlm.stages.warm import Member, load_member, members_of, probe_head
from stages.helpers import CHEAP, preferences, save, write

ANSWERS = {"chosen": " blue", "rejected": " red"}  # words of their own in plain text, too


def train(tmp_path: Path, *extra: str) -> dict[str, Any]:
    data = write(tmp_path / "p.jsonl", [row | ANSWERS for row in preferences(40)])
    command = ["reward-model", "--model", save(tmp_path / "model", "causal"), "--train_dataset", data]
    command += ["--output_dir", str(tmp_path / "rm"), "--learning_rate", "5e-3", *CHEAP, *extra]
    assert main(command) == 0
    facts: dict[str, Any] = json.loads((tmp_path / "rm" / "reward.json").read_text())
    return facts


@pytest.mark.parametrize("kind", ["causal", "bert"])
def test_the_probed_head_is_the_minimum_of_its_loss(tmp_path: Path, kind: str) -> None:
    """By margins of the model itself: bent in any direction of the head, the regularised loss rises."""
    if kind == "bert":
        folder = saved(tmp_path, bert_classifier(bert_tokenizer(), num_labels=1).float(), bert_tokenizer())
    model, tokenizer = load_base(folder if kind == "bert" else save(tmp_path, "causal"))
    rows = [row | ANSWERS | {"margin": float(i % 2)} for i, row in enumerate(preferences(5))]
    rows.append({"prompt": "sky", "chosen": " red", "rejected": " blue sea"})
    pairs = Pairs(model, tokenizer)
    body = {name: t.clone() for name, t in model.state_dict().items()}
    probe_head(model, pairs, rows)
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, body[name])}
    head = model.score if kind == "causal" else model.classifier
    assert changed <= {"score.weight", "classifier.weight", "classifier.bias"}
    fitted = head.weight.detach().double().clone()

    def margins(weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            head.weight.copy_(weight)
        return margins_of(model, pairs, rows)

    basis = torch.eye(fitted.shape[1], dtype=torch.float64)
    gaps = torch.stack([margins(direction.unsqueeze(0)) for direction in basis], dim=1)
    square = gaps.pow(2).sum(dim=1).mean()
    margins_wanted = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.0])

    def loss(weight: torch.Tensor) -> float:
        norm = float(weight.pow(2).sum() * square)
        return float(softplus(margins_wanted - gaps @ weight[0]).mean()) + norm / (2 * len(rows))

    least = loss(fitted)
    torch.manual_seed(0)
    for size in (1e-2, 1.0):
        for _ in range(20):
            assert loss(fitted + size * fitted.norm() * torch.randn_like(fitted)) > least
    assert least < loss(torch.zeros_like(fitted)) - 1e-3


def test_what_is_saved_is_the_mean_of_the_members_weights(tmp_path: Path) -> None:
    facts = train(tmp_path, "--members", "3", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "4")
    saved_ = load_file(tmp_path / "rm" / "model.safetensors")
    members = [load_file(tmp_path / "rm" / f"member-{i}" / "checkpoint-4" / "model.safetensors") for i in (1, 2, 3)]
    for name, mean in saved_.items():
        torch.testing.assert_close(mean, sum(m[name] for m in members) / 3, rtol=1e-6, atol=1e-7)
    assert not all(torch.equal(members[0][name], members[1][name]) for name in saved_)
    said = [(m["seed"], m["learning_rate"], m["dropout"], m["steps"]) for m in facts["members"]]
    assert said == [(42, 5e-3, 0.05, 4), (43, 2.5e-3, 0.1, 4), (44, 5e-3, 0.0, 4)]
    assert facts["steps"] == 12
    margins = [member["margin"] for member in facts["members"]]
    assert facts["ensemble"]["margin"] == pytest.approx(sum(margins) / 3)


@pytest.mark.parametrize("extra", [[], ["--use_peft"]])
def test_the_mean_is_an_ordinary_reward_that_has_learned(
    tmp_path: Path, extra: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    facts = train(tmp_path, "--members", "2", "--num_train_epochs", "2", *extra)
    shown = capsys.readouterr().out
    for name, numbers in [("mean of the weights", facts), ("mean of the scores", facts["ensemble"])]:
        assert numbers["accuracy"]["value"] > 0.9
        assert f"{name}: held-out accuracy {numbers['accuracy']['value']:.3f}" in shown
    assert [f"member {i}: held-out accuracy" in shown for i in (1, 2)] == [True, True]
    assert not list((tmp_path / "rm").glob("member-*"))
    rewards = load_rewards(str(tmp_path / "rm"), dtype=torch.float32)
    (row,) = preferences(1)
    better, worse = score(rewards, [row["prompt"]] * 2, [*ANSWERS.values()], {}).total.tolist()
    assert better > worse


def test_new_adapters_differ_between_members(tmp_path: Path) -> None:
    base, tokenizer = load_base(save(tmp_path / "model", "causal"))
    members = members_of({"model": str(tmp_path / "model"), "members": 2}, 1e-4)

    def adapter(member: Member, before: int) -> torch.Tensor:
        model = load_member(member, base, tokenizer, seed=42)
        torch.manual_seed(before)
        args = TrainingArguments(str(tmp_path), seed=member.seed, use_cpu=True, report_to="none")
        config = LoraConfig(target_modules=["q_proj"])
        trained: Any = preference_trainer(model, tokenizer, preferences(2), args, peft_config=config)[0].model
        return torch.cat([p.flatten() for name, p in trained.named_parameters() if "lora_A" in name])

    one, two = (adapter(member, before=1) for member in members)
    assert not torch.equal(one, two)
    assert torch.equal(one, adapter(members[0], before=2))


def test_members_start_with_one_head_and_their_own_dropout(tmp_path: Path) -> None:
    name, other = save(tmp_path / "model", "causal"), tmp_path / "sft"
    model, tokenizer = load_base(name)
    with torch.no_grad():
        moved = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)
        moved.model.embed_tokens.weight.add_(1)
        moved.save_pretrained(other)
        tokenizer.save_pretrained(other)
    with torch.no_grad():
        model.score.weight.fill_(0.5)
    options = {"model": name, "members": 2, "member_starts": [str(other), name], "member_dropouts": 0.3}
    one, two = [load_member(m, model, tokenizer, seed=42) for m in members_of(options, 1e-4)]
    assert one.score.weight.eq(0.5).all()
    assert two.score.weight.eq(0.5).all()
    torch.testing.assert_close(one.model.embed_tokens.weight, two.model.embed_tokens.weight + 1)
    assert {layer.self_attn.attention_dropout for layer in one.model.layers} == {0.3}
    assert one.config.attention_dropout == 0.0
    saved(other, bert_classifier(bert_tokenizer(), num_labels=1), bert_tokenizer())
    with pytest.raises(ConfigError, match=r"member_starts.*other weights"):
        load_member(members_of(options, 1e-4)[0], model, tokenizer, seed=42)


def test_labels_are_flipped_in_training_pairs_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = preferences(40)
    flipped, count = flip_labels(rows, 0.25, seed=1)
    assert count == 10 == sum(row["chosen"] == "red" for row in flipped)
    assert flipped == flip_labels(rows, 0.25, seed=1)[0] != flip_labels(rows, 0.25, seed=2)[0]
    assert {row["prompt"] for row in flipped} == {row["prompt"] for row in rows}
    assert all(row["chosen"] == "blue" for row in rows)
    facts = train(tmp_path, "--flip_labels", "0.25", "--num_train_epochs", "2")
    assert (facts["flipped_pairs"], facts["train_pairs"]) == (9, 36)
    assert "9 of 36 training pairs" in capsys.readouterr().out
    assert facts["accuracy"]["value"] > 0.5  # held-out labels are the right ones


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--members", "0"], "members=0"),
        (["--members", "2.5"], "members=2.5"),
        (["--members", "true"], "members=True"),
        (["--member_dropouts", "0.1"], "member_dropouts does nothing"),
        (["--member_starts", "a"], "member_starts does nothing"),
        (["--members", "2", "--member_dropouts", "[0.1, 0.2, 0.3]"], "member_dropouts has 3 values"),
        (["--members", "2", "--member_dropouts", "1.0"], "member_dropouts"),
        (["--members", "2", "--member_learning_rates", "[]"], "member_learning_rates"),
        (["--members", "2", "--member_learning_rates", "[1e-4, 0]"], "member_learning_rates"),
        (["--members", "2", "--member_learning_rates", "fast"], "member_learning_rates"),
        (["--flip_labels", "0.5"], "flip_labels=0.5"),
        (["--flip_labels", "-0.1"], "flip_labels=-0.1"),
        (["--flip_labels", "true"], "flip_labels=True"),
        (["--flip_labels", "0.001"], "flip_labels=0.001"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_a_model_is_loaded(
    tmp_path: Path, options: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "p.jsonl", preferences(20))
    command = ["reward-model", "--model", "no/such/model", "--train_dataset", data, "--output_dir", str(tmp_path)]
    assert main([*command, *options]) == 2
    assert name in capsys.readouterr().err


def test_one_held_out_prompt_has_no_interval_and_the_facts_are_json(tmp_path: Path) -> None:
    data, one = write(tmp_path / "p.jsonl", preferences(10)), tmp_path / "rm"
    command = ["reward-model", "--model", save(tmp_path / "model", "causal"), "--train_dataset", data]
    assert main([*command, "--output_dir", str(one), "--max_steps", "1", *CHEAP]) == 0

    def refuse(name: str) -> None:
        raise AssertionError(name)

    facts = json.loads((one / "reward.json").read_text(), parse_constant=refuse)
    assert facts["accuracy"]["low"] is None


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="adapter"):
        load_base(str(tmp_path))
