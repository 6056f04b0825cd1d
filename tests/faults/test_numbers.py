"""Rows N0 to N12 of the fault matrix on one process: no silent wrong number."""

import inspect
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models.test_anchor import anchor_of as fp32_anchor
from models.test_anchor import gap_closed, moves, pairs_of, with_bf16_master
from objectives.mutants import MUTATIONS, defects, mutate
from tiny import tiny_causal, tiny_gpt2
from trainer.helpers import TOKENIZER, Spoiled, ends_often, logged, lora, optimizer_tensors, same, trainer, weights
from transformers import TrainingArguments

from bondlm import BONDConfig
from bondlm.bestofn import log_quantile
from bondlm.cli import main
from bondlm.engines.agreement import logprob_gap
from bondlm.engines.local.engine import TransformersEngine, sample_tokens
from bondlm.errors import EngineError, NonFiniteError
from bondlm.models.adapters import wrap_adapter
from bondlm.models.head import chosen_logprobs
from bondlm.models.learned_quantile import QuantileModel
from bondlm.models.logprobs import row_logprobs
from bondlm.models.roles import Roles
from bondlm.objectives import BOND, JBOND, VBON

SIGNS = [m for m in MUTATIONS if m.objective.__class__.__name__ == "JBOND"]


@pytest.mark.parametrize("mutation", SIGNS, ids=lambda m: m.what)
def test_n0_a_wrong_sign_is_found(mutation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """J-BOND's; those of the other objectives are in tests/objectives/test_mutations.py."""
    assert defects(mutation.objective) == []
    assert defects(mutate(mutation, monkeypatch)) != []


def test_n1_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=9)
    anchor = {name: tensor.clone() for name, tensor in made.anchor.state_dict().items()}
    Spoiled(made, set(range(1, 10)))
    with pytest.raises(NonFiniteError, match=r"step 3: .*gradient.* 3 steps") as caught:
        made.train()
    assert caught.value.exit_code == 5
    assert same(made.anchor.state_dict(), anchor)
    assert not any(tensor.any() for tensor in optimizer_tensors(made))
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_bytes().splitlines()]
    assert [row["step"] for row in skipped] == [1, 2, 3]
    assert all(row["samples"][0]["prompt"] for row in skipped)
    assert made.drops.summary() == [
        f"skipped: 3 steps, whose loss or gradient was not finite ({tmp_path / 'skipped.jsonl'})"
    ]


def test_n1_the_prompts_whose_loss_it_is_are_saved(tmp_path: Path) -> None:
    """Not the first ones of the step, and also if none are logged; a resumed run writes them again."""
    made = trainer(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_logged_samples=0,
        save_strategy="steps",
        save_steps=1,
    )
    seen, learn, note = list[str](), made.compute_loss, made.run_folder.note_step

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs["anchor_logp_PC"] = inputs["anchor_logp_PC"].masked_fill(inputs["row_P"][:, None] == 3, torch.nan)
        return learn(model, inputs, *args, **kwargs)

    def note_step(rollout: Any, *rest: Any) -> None:
        seen.append(rollout.rows[3]["prompt"])
        note(rollout, *rest)

    made.compute_loss, made.run_folder.note_step = compute_loss, note_step  # type: ignore[method-assign]
    made.train()
    for expected in ([1, 2], [1, 2]):
        skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_bytes().splitlines()]
        assert [row["step"] for row in skipped] == expected
        assert [[s["prompt"] for s in row["samples"]] for row in skipped] == [[prompt] for prompt in seen[:2]]
        assert all(row["samples"][0]["loss"] == "nan" and row["samples"][0]["policy"] for row in skipped)
        assert all(math.isfinite(row["loss"]) for row in logged(tmp_path)[:2])  # the mean of the others
        made.run_folder.on_train_begin(made.args, SimpleNamespace(is_world_process_zero=True, global_step=2), None)
    made.run_folder.on_train_begin(made.args, SimpleNamespace(is_world_process_zero=True, global_step=1), None)
    assert len((tmp_path / "skipped.jsonl").read_bytes().splitlines()) == 1


def test_n2_a_gradient_that_is_not_finite(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1)
    before, anchor = weights(made.roles.model), {n: t.clone() for n, t in made.anchor.state_dict().items()}
    parameter = next(p for n, p in made.roles.model.named_parameters() if "q_proj" in n)
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    made.train()
    assert math.isfinite(logged(tmp_path)[0]["loss"])
    assert logged(tmp_path)[0]["skipped_steps"] == 1
    (skipped,) = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_bytes().splitlines()]
    assert skipped["not_finite"] == "gradient"
    assert len(skipped["samples"]) == made.args.per_device_train_batch_size  # nobody knows which of them it was
    assert same(weights(made.roles.model), before)
    assert same(made.anchor.state_dict(), anchor)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_n2_the_learned_quantile_takes_no_step_either(value: float) -> None:
    model = QuantileModel(4, learning_rate=0.1, seed=0)
    model.update(torch.randn(3, 8), torch.tensor([0.0, 1.0, 1.0]))
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    features = torch.randn(3, 8)
    features[1, 2] = value
    assert not math.isfinite(model.update(features, torch.tensor([0.0, 1.0, 1.0])))
    assert same(model.tensors(), before)
    assert math.isfinite(model.update(torch.randn(3, 8), torch.tensor([0.0, 1.0, 1.0])))
    assert not same(model.tensors(), before)


def test_n4_a_frozen_anchor_fails_gap_closed() -> None:
    assert moves(gap_closed(fp32_anchor(pairs_of(0.01, torch.bfloat16))))
    assert not moves(gap_closed(with_bf16_master(pairs_of(0.01, torch.bfloat16))))


@pytest.mark.parametrize(
    ("method", "none", "every"),
    [("jbond", -math.log(16), 0.0), ("clamped", math.log(1 / 4), 0.0), ("harmonic", -1.5, 0.0)],
)
def test_n5_a_quantile_of_0_or_1(method: Any, none: float, every: float) -> None:
    anchor = torch.tensor([[1.0, 2.0]])
    assert float(log_quantile(torch.tensor([[0.0]]), anchor, method=method)) == pytest.approx(none)
    assert float(log_quantile(torch.tensor([[3.0]]), anchor, method=method)) == every


@pytest.mark.parametrize("policy_reward", [-5.0, 5.0])
@pytest.mark.parametrize(
    "objective",
    [JBOND(), JBOND(log_quantile="harmonic"), BOND(n=4, num_anchor_samples=4), VBON(n=4, num_anchor_samples=4)],
    ids=repr,
)
def test_n5_such_a_quantile_gives_a_finite_loss_and_gradient(objective: Any, policy_reward: float) -> None:
    plan = objective.plan
    rewards = torch.cat([torch.full((3, plan.policy), policy_reward), torch.randn(3, plan.anchor)], dim=1).double()
    selection = objective.select(rewards, torch.rand(rewards.shape, dtype=torch.float64))
    signal, anchor_logp = selection.signal_PC.float(), torch.full((3, plan.compare), -7.0)
    logp = torch.full((3, plan.learn), -6.0, requires_grad=True)
    baseline = objective.baseline(objective.returns(signal, logp.detach()[:, : plan.compare], anchor_logp))
    loss = objective.loss(logp, anchor_logp, signal, baseline).loss_P
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()
    assert (signal < -1 if policy_reward < 0 else signal == 0).all()


@pytest.mark.parametrize("huge", [1e4, -1e4])
def test_n6_extreme_logits(huge: float) -> None:
    logits = torch.zeros(2, 5)
    logits[0, 2], logits[1, 3] = huge, -torch.inf
    logits.requires_grad_()
    logp = chosen_logprobs(logits, torch.tensor([2, 0]))
    logp.sum().backward()
    assert torch.isfinite(logp).all()
    assert torch.isfinite(logits.grad).all()  # type: ignore[arg-type]
    tokens, logprobs = sample_tokens(logits.detach(), torch.tensor([0.999999, 0.7]).double(), 1.0)
    assert torch.isfinite(logprobs).all()
    assert int(tokens[1]) != 3  # a token that is masked away is never drawn
    one, certain = sample_tokens(torch.randn(3, 1), torch.tensor([0.0, 0.5, 0.999]).double(), 1.0)
    assert one.tolist() == [0, 0, 0]
    assert certain.tolist() == [0.0, 0.0, 0.0]


def test_n7_a_stale_sampler() -> None:
    learner = torch.tensor([[[-1.0, -2.0], [-3.0, -1.0]]])
    sampled = learner[:, :1].clone()
    sampled[0, 0, 1] = float("nan")  # no token there
    assert logprob_gap(learner, sampled, 4, strict=True) == 0
    with pytest.warns(UserWarning, match=r"\b0\.20? nats"):
        logprob_gap(learner, sampled - 0.2, 4, strict=True)
    with pytest.raises(EngineError, match=r"step 4: .* 0\.60 nats") as caught:
        logprob_gap(learner, sampled + 0.6, 4, strict=True)
    assert caught.value.exit_code == 5


def test_n7_a_run_whose_sampler_holds_other_weights_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path)
    draw = made.engine.generate_roles
    stale = tiny_causal(TOKENIZER, seed=3).state_dict()

    def from_other_weights(*args: Any, **settings: Any) -> Any:
        mine = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
        made.model.load_state_dict(stale)
        try:
            return draw(*args, **settings)
        finally:
            made.model.load_state_dict(mine)

    monkeypatch.setattr(made.engine, "generate_roles", from_other_weights)
    with pytest.raises(EngineError, match=r"sampl.* nats"):
        made.train()


def test_n8_a_truncated_distribution_is_no_setting_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("top_p", "top_k", "temperature", "repetition_penalty"):
        assert not hasattr(BONDConfig, name)
        assert not hasattr(TrainingArguments, name)
        assert main(["train", "--model", "x", "--train_dataset", "y", f"--{name}", "0.9"]) == 2
        assert f"{name}=0.9" in capsys.readouterr().err


def test_n8_what_the_model_says_of_sampling_is_not_heeded(tmp_path: Path) -> None:
    drawn = []
    for settings in ({}, {"top_k": 1, "top_p": 0.1, "temperature": 0.1, "repetition_penalty": 9.0, "do_sample": False}):
        model = tiny_causal(TOKENIZER)
        model.generation_config.update(**settings)
        made = trainer(tmp_path, ends_often(model))
        drawn.append(made.sample(list(made.train_dataset)[:4], "policy", 3).completions)  # type: ignore[arg-type]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("role", ["policy", "anchor"])
def test_n9_dropout_is_off_while_scoring(role: Any) -> None:
    roles = Roles(tiny_gpt2(TOKENIZER, dropout=0.5))
    roles.model.train()
    rows = [([5, 6, 7], [8, 9]), ([5, 6], [7])]
    scores = []
    for _ in range(2):
        with roles.use(role) as model:
            scores.append(row_logprobs(model, rows, 0, start_id=None, device=torch.device("cpu")))
    assert torch.equal(scores[0], scores[1])
    assert roles.model.training


def test_n10_after_an_exception_the_policy_is_active() -> None:
    model = wrap_adapter(tiny_causal(TOKENIZER), lora())
    roles = Roles(model)
    engine = TransformersEngine(roles.use, eos_ids=[2], pad_id=0)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".default." in name for name in trains)

    def fails(*args: Any) -> Any:
        raise ZeroDivisionError

    engine._decode = fails  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        engine.generate([[5, 6]], 1, role="anchor", max_new_tokens=2, seeds=[1])
    assert model.active_adapter == "default"
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trains


def test_n11_the_batch_size_changes_no_log_probability() -> None:
    model = tiny_causal(TOKENIZER)
    rows = [(list(range(3, 5 + i)), list(range(20, 21 + (5 * i) % 7))) for i in range(8)]
    scores = [
        row_logprobs(model, rows, 0, start_id=None, device=torch.device("cpu"), batch_rows=size) for size in (1, 8)
    ]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=1e-5)


def test_n12_completions_without_text_are_no_division_by_zero(tmp_path: Path) -> None:
    """Every completion is its end of sequence alone: one token is learned from, and nothing divides by lengths."""
    model = tiny_causal(TOKENIZER)
    model.generation_config.eos_token_id = list(range(300))
    made = trainer(tmp_path, model, reward=lambda completions: [float(i) for i in range(len(completions))])
    made.train()
    for row in logged(tmp_path)[:2]:
        assert row["completions/max_length"] == 1
        assert math.isfinite(row["loss"])
        assert row["skipped_steps"] == 0
    assert "completion_mask" not in inspect.getsource(type(made.objective))
