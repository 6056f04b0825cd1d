"""A step is the same mathematics however it is cut into batches, and the anchor follows it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import prompt_rows, tiny_causal, tiny_gpt2, tiny_t5, tiny_tokenizer
from torch import Tensor
from transformers import TrainerCallback

from bondlm import BONDTrainer
from bondlm.config import LORA_LEARNING_RATE, PAPER_LEARNING_RATE
from bondlm.errors import ConfigError
from trainer.helpers import (
    MODELS,
    TOKENIZER,
    Gradients,
    config,
    ends_often,
    logged,
    lora,
    low_ids,
    same,
    trainer,
    weights,
)


@pytest.mark.parametrize("kind", ["llama", "t5", "lora"])
def test_accumulation_changes_neither_gradient_nor_weights(kind: str, tmp_path: Path) -> None:
    """8 prompts in one batch, in 4 batches of 2, and in 3 batches of unequal size (the last one ends the data)."""
    results: dict[str, tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]] = {}
    for name, size, accumulate in (("1x8", 8, 1), ("4x2", 2, 4), ("3+3+2", 3, 3)):
        model = ends_often(tiny_t5(TOKENIZER) if kind == "t5" else tiny_causal(TOKENIZER))
        gradients = Gradients()
        made = trainer(
            tmp_path / name,
            model,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            optim="sgd",
            gamma=0.5,
            max_grad_norm=0.1,
            callbacks=[gradients],
            peft_config=lora() if kind == "lora" else None,
        )
        made.train()
        results[name] = (gradients.first, weights(made.roles.model), logged(tmp_path / name)[0])
    one, one_weights, one_row = results.pop("1x8")
    assert one
    for gradient, moved, row in results.values():
        assert gradient.keys() == one.keys()
        scale = max(float(g.abs().max()) for g in one.values())
        residuals = torch.cat([(gradient[n] - one[n]).flatten() for n in one]) / scale
        assert float(residuals.abs().max()) < 2e-5
        assert float(residuals.mean().abs()) < 1e-6
        for name, weight in one_weights.items():
            torch.testing.assert_close(moved[name], weight, atol=1e-6, rtol=1e-5)
        assert row["loss"] == pytest.approx(one_row["loss"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(one_row["grad_norm"], rel=1e-4)
        for name in ("reward", "anchor/kl", "kl", "completions/mean_length"):
            assert row[name] == pytest.approx(one_row[name], abs=1e-5)


def test_padding_to_a_multiple_changes_widths_alone(tmp_path: Path) -> None:
    """Of what learns and of what scores; what samples has its own rows."""
    results: list[dict[str, Tensor]] = []
    for multiple in (None, 16):
        model, gradients, widths = ends_often(tiny_causal(TOKENIZER)), Gradients(), set[int]()
        settings = {"max_steps": 1, "optim": "sgd", "pad_to_multiple_of": multiple}
        made = trainer(tmp_path / str(multiple), model, gamma=0.5, callbacks=[gradients], **settings)
        plain = made.model.forward

        def seen(*args: Any, plain: Any = plain, widths: set[int] = widths, **inputs: Any) -> Any:
            widths |= set() if inputs["use_cache"] else {inputs["input_ids"].shape[1]}
            return plain(*args, **inputs)

        made.model.forward = seen
        made.train()
        assert widths
        assert all(width % 16 == 0 for width in widths) == (multiple == 16)
        results.append(gradients.first)
    scale = max(float(g.abs().max()) for g in results[0].values())
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, atol=2e-5 * scale, rtol=1e-4)
    with pytest.raises(ConfigError, match="pad_to_multiple_of=16"):
        trainer(tmp_path / "t5", tiny_t5(TOKENIZER), pad_to_multiple_of=16)


@pytest.mark.parametrize("kind", ["llama", "t5", "t5-lora"])
def test_shared_prompts_change_nothing(kind: str, tmp_path: Path) -> None:
    results = []
    for share in (True, False):
        gradients = Gradients()
        model = ends_often(MODELS[kind.split("-")[0]](TOKENIZER))
        adapter = lora("t5") if kind.endswith("lora") else None
        made = trainer(tmp_path, model, peft_config=adapter, callbacks=[gradients], max_steps=1, optim="sgd")
        assert made.step.share_prompts  # this model can
        made.step.share_prompts = share
        made.train()
        results.append(gradients.first)
    scale = max(float(g.abs().max()) for g in results[0].values())
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, atol=2e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "lora"])
def test_the_anchor_follows_the_ema_of_the_policys_path(kind: str, tmp_path: Path) -> None:
    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[dict[str, Tensor]] = []

        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.seen.append(weights(model))

    path = Recorder()
    model = ends_often(MODELS.get(kind, tiny_causal)(TOKENIZER))
    made = trainer(
        tmp_path, model, max_steps=4, eta=0.3, callbacks=[path], peft_config=lora() if kind == "lora" else None
    )
    expected = {name: policy.detach().clone() for name, _, policy in made.roles.anchor_pairs}
    made.train()
    assert len(path.seen) == 4
    for seen in path.seen:
        expected = {name: 0.7 * value + 0.3 * seen[name] for name, value in expected.items()}
    for name, anchor, _ in made.roles.anchor_pairs:
        torch.testing.assert_close(anchor.detach(), expected[name], atol=1e-7, rtol=1e-5)
    assert any(not torch.equal(anchor, policy) for _, anchor, policy in made.roles.anchor_pairs)
    assert [row["anchor/gap_closed"] for row in logged(tmp_path)[:-1]] == [pytest.approx(1, abs=1e-3)] * 4


def test_the_sampled_distribution_is_the_learned_one(tmp_path: Path) -> None:
    """With dropout switched off, what was sampled has the log-probability that the loss computes."""
    made = trainer(tmp_path, tiny_gpt2(TOKENIZER, dropout=0.3))
    made.train()
    for row in logged(tmp_path)[:-1]:
        assert row["sampling/sampling_logp_difference/mean"] < 1e-4
    loose = trainer(tmp_path / "loose", tiny_gpt2(TOKENIZER, dropout=0.3), disable_dropout=False)
    loose.train()
    assert logged(tmp_path / "loose")[0]["sampling/sampling_logp_difference/mean"] > 0.1


@pytest.mark.parametrize("pad", ["eos", None])
def test_a_tokenizer_that_pads_with_eos_trains_alike(pad: Any, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(pad=pad)
    own, other = trainer(tmp_path / "own"), trainer(tmp_path / "eos", processing_class=tokenizer)
    own.train()
    other.train()
    for name, weight in weights(own.roles.model).items():
        torch.testing.assert_close(weights(other.roles.model)[name], weight, atol=1e-6, rtol=1e-5)
    assert logged(tmp_path / "eos")[0]["reward"] == logged(tmp_path / "own")[0]["reward"]


@pytest.mark.parametrize("kind", ["llama", "lora"])
def test_two_runs_are_equal_and_another_seed_is_another_run(kind: str, tmp_path: Path) -> None:
    def run(name: str, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(0)  # PEFT draws its first weights from the global generator
        made = trainer(tmp_path / name, seed=seed, peft_config=lora() if kind == "lora" else None)
        torch.rand(len(name))  # after that, what the surroundings do with it must not matter
        made.train()
        return weights(made.roles.model)

    one = run("a", 1)
    assert same(one, run("bb", 1))
    assert not same(one, run("c", 2))


def test_constant_rewards_give_no_backward_signal(tmp_path: Path) -> None:
    made = trainer(tmp_path, reward=lambda completions: [0.5] * len(completions))
    made.train()
    for row in logged(tmp_path)[:-1]:
        assert row["bond/penalty_rate"] == 0
        assert row["bond/frac_tied"] == 1


@pytest.mark.parametrize(("logging_steps", "steps"), [(2, [2, 4]), (0.5, [2, 4]), (3, [3, 4])])
def test_every_logged_step_has_the_kl_to_the_reference(logging_steps: float, steps: list[int], tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=4, logging_steps=logging_steps).train()
    assert [row["step"] for row in logged(tmp_path) if "kl" in row] == steps
    assert [row["step"] for row in logged(tmp_path) if "loss" in row] == steps


@pytest.mark.parametrize(("peft_config", "rate"), [(None, 3e-6), (lora(), 1e-4)], ids=["full", "lora"])
def test_the_default_learning_rate(peft_config: Any, rate: float, tmp_path: Path) -> None:
    assert trainer(tmp_path, learning_rate=None, peft_config=peft_config).args.learning_rate == rate


def test_the_settings_that_were_given_stay_as_they_are(tmp_path: Path) -> None:
    """A second trainer has the same: its adapter is not to learn at the first one's rate."""
    given = config(tmp_path / "run", learning_rate=None, max_steps=1, prompt_format="plain")
    given.dataloader_num_workers = 1
    before = copy.deepcopy({name: str(value) for name, value in vars(given).items()})
    stream = Dataset.from_list(prompt_rows(8)).to_iterable_dataset()
    rates = []
    for rows, adapter in ((stream, None), (prompt_rows(8), lora())):
        model = ends_often(tiny_causal(TOKENIZER))
        made = BONDTrainer(model, low_ids, given, train_dataset=rows, processing_class=TOKENIZER, peft_config=adapter)
        rates.append(made.args.learning_rate)
        assert {name: str(value) for name, value in vars(given).items()} == before
    assert rates == [PAPER_LEARNING_RATE, LORA_LEARNING_RATE]
