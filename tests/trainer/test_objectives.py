"""Every objective through the same trainer: it learns, resumes exactly, and where it may, from logged samples alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from data.test_scored import scored_rows
from frozen import OTHER_OBJECTIVES_METRICS, TRAIN_METRICS
from tiny import prompt_rows, tiny_causal, tiny_t5

from bondlm import BONDTrainer
from bondlm.errors import CheckpointError
from trainer.helpers import (
    TOKENIZER,
    ends_often,
    logged,
    lora,
    optimizer_tensors,
    same,
    trainer,
    weights,
    without_times,
)

LEARNERS: dict[str, dict[str, Any]] = {
    "jbond, 4 anchor samples": {"num_anchor_samples": 4},
    "jbond, harmonic": {"num_anchor_samples": 4, "log_quantile": "harmonic"},
    "jbond, gamma_ref": {"gamma_ref": 0.3, "anchor": "ema", "eta": 0.3},
    "bond": {"objective": "bond", "n": 4, "num_anchor_samples": 8},
    "bond, beta 0": {"objective": "bond", "n": 4, "beta": 0.0},
    "bond, beta 1": {"objective": "bond", "n": 4, "beta": 1.0, "log_quantile": "harmonic", "correction": True},
    "bond, learned": {"objective": "bond", "n": 4, "quantile": "learned", "quantile_learning_rate": 1e-2}
    | {"max_steps": 16},  # p starts at 1/2 for everything: the first steps learn from the forward term alone
    "iterative bond": {"objective": "bond", "n": 2, "anchor": "periodic", "anchor_update_every": 3},
    "best_of_n_sft": {"objective": "best_of_n_sft", "n": 4},
    "reinforce": {"objective": "reinforce", "beta_rl": 0.01},
    "rloo": {"objective": "rloo", "beta_rl": 0.01, "num_samples": 4},
    "grpo": {"objective": "grpo", "beta_rl": 0.01, "num_samples": 4},
    "vbon": {"objective": "vbon", "n": 4},
    "bonbon": {"objective": "bonbon", "n": 4, "alpha": 0.5},
    "regression": {"objective": "best_of_n_regression", "n": 4, "num_samples": 8},
    "listwise": {"objective": "listwise", "n": 4, "num_samples": 8},
    "self_bond": {"objective": "self_bond", "n": 8, "num_samples": 4, "per_device_train_batch_size": 96},
    "self_bond, best_of_n": {"objective": "self_bond", "n": 4, "num_samples": 4, "log_quantile": "best_of_n"}
    | {"per_device_train_batch_size": 96},
    "self_bond, adaptive": {"objective": "self_bond", "n": 4, "num_samples": 4, "adaptive_strength": True}
    | {"per_device_train_batch_size": 96},
}


@pytest.mark.parametrize("name", LEARNERS)
def test_the_reward_rises(name: str, tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        rows=192,  # the twelve prompts, each under 16 names
        eval_dataset=prompt_rows(24),
        max_completion_length=2,
        max_rows=2000,
        learning_rate=5e-3,
        eval_num_samples=64,
        eval_num_reference_samples=64,
        **({"anchor": "fixed", "max_steps": 10, "per_device_train_batch_size": 192} | LEARNERS[name]),
    )
    made.train()
    after = made.evaluate()
    assert after["eval_win_rate_low"] > 0.5
    assert after["eval_reward"] > after["eval_reference_reward"]
    plan, row = made.objective.plan, logged(tmp_path)[0]
    assert {n for n in row if n.startswith(("bond/", "time/"))} <= TRAIN_METRICS | OTHER_OBJECTIVES_METRICS
    assert ("reward" in row) == ("kl" in row) == ("anchor/kl" in row) == (plan.policy > 0)
    assert ("anchor/reward" in row) == (plan.anchor > 0)
    if plan.policy:
        assert row["sampling/sampling_logp_difference/mean"] < 1e-4
    # The anchor's samples had, and the policy's have, the log-probability that the first step compares with.
    if name in ("bonbon", "regression"):
        field = "bond/margin_error" if name == "bonbon" else "bond/regression_error"
        assert abs(row[field]) > 0.1


RESUMED: dict[str, dict[str, Any]] = {
    "bond": {"objective": "bond", "n": 4, "num_anchor_samples": 6, "gamma": 0.2},
    "learned": {"objective": "bond", "n": 3, "quantile": "learned", "peft_config": True},
    "rloo": {"objective": "rloo", "beta_rl": 0.1, "anchor": "periodic", "anchor_update_every": 2},
    "gamma_ref": {"objective": "rloo", "beta_rl": 0.1, "num_samples": 3, "gamma_ref": 0.5, "anchor": "ema"},
    "logged": {"objective": "best_of_n_regression", "n": 3, "anchor": "fixed"},
    "self_bond": {"objective": "self_bond", "n": 3, "num_samples": 4, "anchor": "fixed"},
    "adaptive": {"objective": "self_bond", "n": 3, "num_samples": 4, "anchor": "fixed", "adaptive_strength": True},
}


def test_gamma_ref_pulls_back_to_the_reference(tmp_path: Path) -> None:
    """Rewards that say nothing, and a policy that has left: its KL falls with gamma_ref, and stays without."""
    kls = []
    for gamma_ref in (0.0, 2.0):
        made = trainer(
            tmp_path / str(gamma_ref),
            reward=lambda completions: [0.0] * len(completions),
            rows=96,
            **{"anchor": "ema", "eta": 1.0, "gamma_ref": gamma_ref, "beta": 1.0},
            **{"per_device_train_batch_size": 96, "max_completion_length": 2, "max_rows": 2000},
            **{"max_steps": 10, "learning_rate": 3e-3, "logging_steps": 1},
        )
        with torch.no_grad():  # what KL other runs have cost; the reference stays
            generator = torch.Generator().manual_seed(3)
            for parameter in made.roles.model.parameters():
                parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
        made.train()
        kls.append([row["kl"] for row in logged(tmp_path / str(gamma_ref)) if "kl" in row])
    free, pulled = (sum(of_steps[-4:]) / 4 for of_steps in kls)
    assert pulled < 0.6 * free
    assert pulled < 0.8 * kls[1][0]


@pytest.mark.parametrize("settings", [LEARNERS[name] for name in ("reinforce", "rloo", "grpo", "self_bond")])
def test_what_all_rewards_share_teaches_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    """Also where it is 1e8, of which fp32 keeps eights."""
    trained = []
    for shared in (0.0, 1e8):
        made = trainer(
            tmp_path / str(shared),
            reward=lambda completions, shared=shared: [shared + len(text) / 4 for text in completions],
            **settings | {"max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "anchor": "fixed"},
            **{"max_grad_norm": 0.0, "optim": "sgd"},
        )
        before = weights(made.roles.model)
        made.train()
        trained.append({name: weight - before[name] for name, weight in weights(made.roles.model).items()})
    largest = max(float(change.abs().max()) for change in trained[0].values())
    assert largest > 1e-4
    for name, change in trained[0].items():
        assert torch.allclose(change, trained[1][name], rtol=1e-3, atol=1e-3 * largest)


def six_steps(folder: Path, settings: dict[str, Any]) -> BONDTrainer:
    settings = dict(settings)
    data = {"train_dataset": scored_rows(10)} if settings["objective"].endswith("regression") else {}
    adapter = {"peft_config": lora()} if settings.pop("peft_config", False) else {}
    data |= {"max_completion_length": 12} if data else {}
    return trainer(folder, max_steps=6, save_strategy="steps", save_steps=1, rows=10, **data, **adapter, **settings)


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_equals_never_stopping(name: str, tmp_path: Path) -> None:
    whole = six_steps(tmp_path / "whole", RESUMED[name])
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / "stopped" / f"checkpoint-{step}")
    resumed = six_steps(tmp_path / "stopped", RESUMED[name])
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed.roles.model), weights(whole.roles.model))
    assert same(resumed.anchor.state_dict(), whole.anchor.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(optimizer_tensors(resumed), optimizer_tensors(whole), strict=True))
    if whole.quantile_model is not None and resumed.quantile_model is not None:
        assert same(resumed.quantile_model.tensors(), whole.quantile_model.tensors())
        assert any("exp_avg" in key for key in whole.quantile_model.tensors())
    rows, expected = (without_times(logged(tmp_path / name)) for name in ("stopped", "whole"))
    assert rows[:-1] == expected[:-1]  # the last row is the mean loss since the start or the resume


def test_a_checkpoint_without_its_quantile_model_is_refused(tmp_path: Path) -> None:
    settings = RESUMED["learned"]
    six_steps(tmp_path, settings).train()
    (tmp_path / "checkpoint-6" / "quantile.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"quantile\.safetensors"):
        six_steps(tmp_path, settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize("objective", ["best_of_n_sft", "bonbon", "best_of_n_regression", "listwise"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_logged_samples_are_enough(objective: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_t5(TOKENIZER) if kind == "t5" else ends_often(tiny_causal(TOKENIZER))
    rows = scored_rows(12, 6)
    made = BONDTrainer(
        model,
        args=trainer(tmp_path / "unused").args.__class__(
            **{"output_dir": str(tmp_path / "run"), "objective": objective, "n": 4, "anchor": "fixed"}
            | ({"alpha": 0.5} if objective == "bonbon" else {})
            | {
                "max_steps": 12,
                "max_completion_length": 12,
                "per_device_train_batch_size": 12,
                "learning_rate": 5e-3,
                "warmup_steps": 0,
            }
            | {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
        ),
        train_dataset=rows,
        processing_class=TOKENIZER,
    )

    def no_generation(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("generated")

    monkeypatch.setattr(made.engine, "generate_roles", no_generation)
    groups = made.train_dataset.to_list()
    width = 6 if objective in ("best_of_n_regression", "listwise") else 4
    assert [len(g["logged_ids"]) for g in groups] == [width] * 12

    def log_ratios() -> tuple[float, float]:
        """Mean over prompts of log pi - log pi_ref of the best, and of the worst, logged sample."""
        ends = []
        for pick in (max, min):
            chosen = [pick(zip(g["logged_rewards"], g["logged_ids"], strict=True))[1] for g in groups]
            pairs = [(g["prompt_ids"], [ids]) for g, ids in zip(groups, chosen, strict=True)]
            ends.append(float((made.step.logprob("policy", pairs) - made.step.logprob("reference", pairs)).mean()))
        return ends[0], ends[1]

    assert log_ratios() == (0.0, 0.0)
    made.train()
    best, worst = log_ratios()
    assert best > worst + 0.3
    if objective == "listwise":
        distances = [row["bond/listwise_kl"] for row in logged(tmp_path / "run")[:-1]]
        assert distances[-1] < 0.5 * distances[0]
    if objective == "best_of_n_regression":
        losses = [row["bond/regression_loss"] for row in logged(tmp_path / "run")[:-1]]
        assert losses[-1] < 0.5 * losses[0]
