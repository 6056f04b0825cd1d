"""The trainer from end to end, on tiny models: the same mathematics however it is cut, resumed or saved."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from tiny import prompt_rows, tiny_causal, tiny_gpt2, tiny_t5, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, TrainerCallback

from bondlm import BONDConfig, BONDTrainer
from bondlm.errors import CheckpointError, ConfigError, DataError, NonFiniteError, RewardError
from bondlm.runs.checkpoint import ANCHOR_FILE

TOKENIZER = tiny_tokenizer()
MODELS: dict[str, Callable[..., Any]] = {"llama": tiny_causal, "gpt2": tiny_gpt2, "t5": tiny_t5}


def low_ids(completion_ids: list[list[int]]) -> list[float]:
    """Mostly the share of tokens below 100, with few ties."""
    return [sum(t < 100 for t in ids) / len(ids) + 1e-3 * sum(ids) / 300 for ids in completion_ids]


def lora(kind: str = "llama", **settings: Any) -> LoraConfig:
    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    arguments: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": task}
    return LoraConfig(**arguments | settings)


def config(folder: Path, **settings: Any) -> BONDConfig:
    small: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 5,
        "learning_rate": 1e-3,
        **({"eta": 0.2} if settings.get("anchor", "ema") == "ema" else {}),
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "eval_num_samples": 2,
        "eval_num_reference_samples": 4,
    }
    return BONDConfig(output_dir=str(folder), **small | settings)


def ends_often(model: Any) -> Any:
    """A seventh of the tokens end a completion: completions of 1 to 5 tokens, finished and cut."""
    model.generation_config.eos_token_id = list(range(2, 300, 7))
    return model


def trainer(folder: Path, model: Any = None, *, reward: Any = low_ids, rows: int = 8, **settings: Any) -> BONDTrainer:
    """A trainer of a tiny model; keyword arguments of the constructor are taken out of `settings`."""
    names = ("eval_dataset", "callbacks", "optimizers", "peft_config", "processing_class", "train_dataset")
    arguments = {name: settings.pop(name) for name in names if name in settings}
    arguments = {"train_dataset": prompt_rows(rows), "processing_class": TOKENIZER} | arguments
    model = ends_often(tiny_causal(TOKENIZER)) if model is None else model
    return BONDTrainer(model, reward, config(folder, **settings), **arguments)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("time/", "step_time", "eval_runtime", "train_runtime", "train_samples_", "train_steps_")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]


# -- the step


class Gradients(TrainerCallback):
    """Keeps the gradient of the first step, before it is clipped or used."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.first:
            self.first = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


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


def test_the_sampled_law_is_the_learned_law(tmp_path: Path) -> None:
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


# -- resume


def optimizer_tensors(made: BONDTrainer) -> list[Tensor]:
    assert made.optimizer is not None
    state = made.optimizer.state_dict()["state"]
    return [value for entry in state.values() for value in entry.values() if isinstance(value, Tensor)]


def run_of_six(folder: Path, kind: str, **settings: Any) -> BONDTrainer:
    model = ends_often(tiny_t5(TOKENIZER) if kind == "t5" else tiny_causal(TOKENIZER))
    return trainer(
        folder,
        model,
        max_steps=6,
        save_strategy="steps",
        save_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        rows=10,  # 5 batches: windows of 4, 4 and 2 prompts; the epoch ends after step 3
        gamma=0.3,
        lr_scheduler_type="linear",
        peft_config=lora() if kind == "lora" else None,
        **settings,
    )


@pytest.mark.parametrize("kind", ["lora", "t5"])
def test_resuming_after_any_step_equals_never_stopping(kind: str, tmp_path: Path) -> None:
    whole = run_of_six(tmp_path / "whole", kind)
    whole.train()
    expected = without_times(logged(tmp_path / "whole"))
    assert [row["step"] for row in expected] == [1, 2, 3, 4, 5, 6, 6]
    samples = (tmp_path / "whole" / "samples.jsonl").read_text()
    for stop in (1, 3, 4) if kind == "lora" else (3,):
        folder = tmp_path / f"stopped-{stop}"
        shutil.copytree(tmp_path / "whole", folder)
        for step in range(stop + 1, 7):  # as if killed here, with what was logged beyond still on disk
            shutil.rmtree(folder / f"checkpoint-{step}")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 7, "lo')
        torch.rand(stop)
        resumed = run_of_six(folder, kind)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 6
        assert same(weights(resumed.roles.model), weights(whole.roles.model))
        assert same(resumed.anchor.state_dict(), whole.anchor.state_dict())
        mine, theirs = optimizer_tensors(resumed), optimizer_tensors(whole)
        assert len(mine) == len(theirs) > 0
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        rows = without_times(logged(folder))
        assert rows[:-1] == expected[:-1]  # the last row sums up the process's own part of the run
        assert (folder / "samples.jsonl").read_text() == samples
        # And so does what is drawn next.
        encoded: Any = list(whole.train_dataset)[:2]  # type: ignore[arg-type]
        assert resumed.sample(encoded, "anchor", 2).completions == whole.sample(encoded, "anchor", 2).completions


def test_a_checkpoint_by_name_and_the_anchor_is_read_once(tmp_path: Path) -> None:
    whole = run_of_six(tmp_path, "lora")
    whole.train()
    made = run_of_six(tmp_path, "lora")
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(made.anchor.state_dict(), whole.anchor.state_dict())
    at_six = {name: tensor.clone() for name, tensor in made.anchor.state_dict().items()}
    made.args.max_steps, made.args.learning_rate = 1, 0.0
    made.train()  # a new run in the same process begins where the weights are, not at the old checkpoint's anchor
    for name, anchor, policy in made.roles.anchor_pairs:
        torch.testing.assert_close(anchor.detach(), at_six[name].lerp(policy.detach(), 0.2), atol=1e-6, rtol=0)


def test_resume_without_the_anchor_is_refused(tmp_path: Path) -> None:
    run_of_six(tmp_path, "lora").train()
    (tmp_path / "checkpoint-6" / ANCHOR_FILE).unlink()
    made = run_of_six(tmp_path, "lora")
    before = weights(made.roles.model)
    with pytest.raises(CheckpointError, match=f"checkpoint-6 cannot be resumed from: {ANCHOR_FILE} is missing"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert same(weights(made.roles.model), before)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))  # what the message advises


def test_resume_falls_back_to_the_newest_checkpoint_that_verifies_and_says_so(tmp_path: Path) -> None:
    whole = run_of_six(tmp_path, "lora")
    whole.train()
    damaged = tmp_path / "checkpoint-6" / ANCHOR_FILE
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(bytes(data))
    (tmp_path / "checkpoint-5" / "manifest.json").unlink()
    resumed = run_of_six(tmp_path, "lora")
    with pytest.warns(UserWarning, match="not resumed from .*checkpoint-[56]") as warned:
        resumed.train(resume_from_checkpoint=True)
    messages = [str(w.message) for w in warned if "not resumed" in str(w.message)]
    assert len(messages) == 2
    assert "its hash differs" in messages[0]
    assert "it was not finished" in messages[1]
    assert same(weights(resumed.roles.model), weights(whole.roles.model))  # from 4 on, again


@pytest.mark.parametrize("exists", [False, True])
def test_nothing_to_resume_is_refused(exists: bool, tmp_path: Path) -> None:
    made = trainer(tmp_path / "run")
    if exists:
        (tmp_path / "run").mkdir(exist_ok=True)
    else:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        made.train(resume_from_checkpoint=True)


# -- saving


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.tensor([TOKENIZER.encode("What is two plus three?")])
    extra = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=ids, **extra).logits


@pytest.mark.parametrize(("kind", "auto"), [("llama", AutoModelForCausalLM), ("t5", AutoModelForSeq2SeqLM)])
def test_a_saved_folder_is_a_plain_model(kind: str, auto: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path, MODELS[kind](TOKENIZER), learning_rate=1e-2)
    made.train()
    made.save_model()
    loaded = auto.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(made.roles.model))
    assert not torch.allclose(logits(loaded), logits(MODELS[kind](TOKENIZER)), atol=1e-2)  # it was trained
    assert AutoTokenizer.from_pretrained(tmp_path).encode("hello") == TOKENIZER.encode("hello")


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_saved_adapter_is_a_plain_adapter(kind: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, MODELS[kind](TOKENIZER), learning_rate=1e-2, peft_config=lora(kind))
    made.train()
    made.save_model()
    assert not {"anchor", "reference"} & {path.name for path in tmp_path.iterdir()}
    loaded = PeftModel.from_pretrained(MODELS[kind](TOKENIZER), str(tmp_path))
    assert list(loaded.peft_config) == ["default"]
    with made.roles.use("policy") as policy:
        torch.testing.assert_close(logits(loaded), logits(policy), atol=1e-6, rtol=0)
    assert not torch.allclose(logits(loaded), logits(MODELS[kind](TOKENIZER)), atol=1e-2)


def test_a_run_can_start_from_the_adapter_of_another(tmp_path: Path) -> None:
    tiny_causal(TOKENIZER).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    common: dict[str, Any] = {"learning_rate": 1e-2, "dtype": "float32"}
    first = trainer(tmp_path / "first", str(tmp_path / "base"), peft_config=lora(), **common)
    first.train()
    first.save_model()
    second = BONDTrainer(
        str(tmp_path / "first"), low_ids, config(tmp_path / "second", **common), train_dataset=prompt_rows(8)
    )
    with first.roles.use("policy") as policy, second.roles.use("reference") as reference:
        start = logits(policy)
        torch.testing.assert_close(logits(reference), start, atol=1e-5, rtol=0)
    second.train()
    with second.roles.use("reference") as reference:
        torch.testing.assert_close(logits(reference), start, atol=1e-5, rtol=0)
    with second.roles.use("policy") as policy:
        assert not torch.allclose(logits(policy), start, atol=1e-2)


# -- what it is for


def held_out(made: BONDTrainer) -> dict[str, float]:
    return made.evaluate(prompt_rows(96)[64:])


def test_jbond_beats_its_reference(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        rows=64,
        max_steps=40,
        per_device_train_batch_size=16,
        max_completion_length=6,
        learning_rate=1e-2,
        logging_steps=10,
        eval_num_samples=8,
        eval_num_reference_samples=16,
    )
    before = held_out(made)
    assert before["eval_kl"] == pytest.approx(0.0, abs=1e-6)
    assert before["eval_win_rate_low"] <= 0.5 <= before["eval_win_rate_high"]
    made.train()
    after = held_out(made)
    assert after["eval_win_rate_low"] > 0.6
    assert after["eval_effective_n_low"] > 2
    assert after["eval_kl_low"] > 0
    assert after["eval_reward_low"] > before["eval_reward_high"]
    assert after["eval_reference_reward"] == before["eval_reference_reward"]  # the reference never moves
    rows = [row for row in logged(tmp_path) if "loss" in row]
    assert rows[-1]["anchor/reward"] > rows[0]["anchor/reward"]  # and the anchor follows


def test_gamma_holds_the_policy_near_the_reference(tmp_path: Path) -> None:
    results = {}
    for gamma in (0.0, 10.0):
        made = trainer(
            tmp_path / str(gamma),
            rows=64,
            max_steps=20,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            eta=0.3,
            gamma=gamma,
            eval_num_samples=8,
        )
        made.train()
        results[gamma] = held_out(made)
    assert results[10.0]["eval_kl_high"] < results[0.0]["eval_kl_low"]


def test_constant_rewards_give_no_backward_signal(tmp_path: Path) -> None:
    made = trainer(tmp_path, reward=lambda completions: [0.5] * len(completions))
    made.train()
    for row in logged(tmp_path)[:-1]:
        assert row["bond/penalty_rate"] == 0
        assert row["bond/frac_tied"] == 1


@pytest.mark.parametrize(("logging_steps", "steps"), [(2, [2, 4]), (0.5, [2, 4]), (3, [3])])
def test_every_logged_step_has_the_kl_to_the_reference(logging_steps: float, steps: list[int], tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=4, logging_steps=logging_steps).train()
    assert [row["step"] for row in logged(tmp_path) if "kl" in row] == steps
    assert [row["step"] for row in logged(tmp_path) if "loss" in row] == steps


# -- evaluation


class NoteEvaluation(TrainerCallback):
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.metrics.append(metrics)


def test_evaluation_is_repeatable_and_leaves_the_run_alone(tmp_path: Path) -> None:
    plain, watched = trainer(tmp_path / "plain"), trainer(tmp_path / "watched", eval_dataset=prompt_rows(12)[8:])
    note = NoteEvaluation()
    watched.add_callback(note)
    once = watched.evaluate()
    assert without_times([watched.evaluate()]) == without_times([once])
    assert note.metrics[0] == once
    watched.args.eval_strategy, watched.args.eval_steps = "steps", 1
    for made in (plain, watched):
        made.train()
    assert same(weights(plain.roles.model), weights(watched.roles.model))
    parts = watched.evaluate({"one": prompt_rows(4), "two": prompt_rows(8)[4:]})
    assert {name.split("_")[1] for name in parts if name != "epoch"} == {"one", "two"}


@pytest.mark.parametrize(("target_n", "gain", "steps"), [(3.0, 10, 1), (3.0, 0, 3), (None, 10, 3)])
def test_target_n_stops_the_run_once_it_is_reached(
    target_n: float | None, gain: float, steps: int, tmp_path: Path
) -> None:
    def stub(dataset: Any) -> Any:
        """Policy samples that are the reference's, with `gain` on every reward."""
        samples = made.sample(dataset.to_list(), "reference", 4)
        return replace(samples, rewards_PM=samples.rewards_PM + gain), samples

    made = trainer(
        tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, eval_dataset=prompt_rows(4), target_n=target_n
    )
    made.held_out_samples = stub  # type: ignore[method-assign]
    made.train()
    assert made.state.global_step == steps


def test_a_signal_finishes_the_step_saves_and_stops(tmp_path: Path) -> None:
    class Signal(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                made.stop.signal = 15

    made = trainer(tmp_path, max_steps=5, callbacks=[Signal()])
    made.train()
    assert made.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / ANCHOR_FILE).is_file()


# -- bad input


class Broken:
    """A reward that fails in the second step."""

    __name__ = "broken"

    def __init__(self, fail: Callable[[int], list[float]]) -> None:
        self.calls, self.fail = 0, fail

    def __call__(self, completions: list[str]) -> list[float]:
        self.calls += 1
        return [float(i) for i in range(len(completions))] if self.calls == 1 else self.fail(len(completions))


def raises(count: int) -> list[float]:
    raise KeyError("no such row")


FAILURES: dict[str, tuple[Callable[[int], list[float]], str]] = {
    "NaN": (lambda count: [float("nan")] * count, "nan"),
    "infinite": (lambda count: [float("inf")] * count, "inf"),
    "raises": (raises, "no such row"),
    "too few": (lambda count: [1.0] * (count - 1), "values for"),
}


@pytest.mark.parametrize(("fail", "message"), FAILURES.values(), ids=FAILURES.keys())
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_broken_reward_stops_before_the_update(
    kind: str, fail: Callable[[int], list[float]], message: str, tmp_path: Path
) -> None:
    def run(name: str, fail: Callable[[int], list[float]], max_steps: int) -> BONDTrainer:
        torch.manual_seed(0)  # PEFT draws its first weights from the global generator
        peft_config = lora() if kind == "lora" else None
        return trainer(tmp_path / name, reward=Broken(fail), max_steps=max_steps, peft_config=peft_config)

    made, one_step = run("broken", fail, 3), run("one step", raises, 1)
    one_step.train()
    with pytest.raises(RewardError, match=message) as caught:
        made.train()
    assert "broken" in str(caught.value)
    assert same(weights(made.roles.model), weights(one_step.roles.model))
    assert same(made.anchor.state_dict(), one_step.anchor.state_dict())


class Spoiled:
    """The engine, which leaves a NaN in the policy's head after it has sampled for one of the given steps."""

    def __init__(self, made: BONDTrainer, steps: set[int]) -> None:
        self._made, self._steps, self._generate = made, steps, made.engine.generate
        self._kept: Tensor | None = None
        made.engine.generate = self  # type: ignore[assignment]

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        head = self._made.roles.core.lm_head.weight
        if self._kept is not None:
            head[7] = self._kept
            self._kept = None
        drawn = self._generate(*args, **kwargs)
        if self._made.state.global_step + 1 in self._steps and kwargs["role"] == "anchor":  # the last call of a step
            self._kept = head[7].clone()
            head[7] = float("nan")
        return drawn


def test_losses_that_are_not_finite_end_the_run_and_nothing_has_moved(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=9)
    before = weights(made.roles.model)
    anchor = {name: tensor.clone() for name, tensor in made.anchor.state_dict().items()}
    Spoiled(made, set(range(1, 10)))
    with pytest.raises(NonFiniteError, match="step 3: the gradient is not finite, 3 steps in a row") as caught:
        made.train()
    assert caught.value.exit_code == 5
    after = weights(made.roles.model)
    assert all(torch.equal(after[name], before[name]) for name in before if "lm_head" not in name)
    assert same(made.anchor.state_dict(), anchor)
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_bytes().splitlines()]
    assert [row["step"] for row in skipped] == [1, 2, 3]
    assert [sample["loss"] for sample in skipped[0]["samples"]] == ["nan"] * 4


def test_one_step_that_is_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    """Step 2 of 3 leaves policy, anchor and the optimizer's moments as they were."""
    made = trainer(tmp_path, max_steps=3)
    Spoiled(made, {2})

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.policy: list[dict[str, Tensor]] = []
            self.anchor: list[dict[str, Tensor]] = []
            self.moments: list[list[Tensor]] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kept = {n: w for n, w in weights(made.roles.model).items() if "lm_head" not in n}
            self.policy.append(kept)
            self.anchor.append({n: t.clone() for n, t in made.anchor.state_dict().items()})
            self.moments.append([t.clone() for t in optimizer_tensors(made)])

    seen = Recorder()
    made.add_callback(seen)
    made.train()
    assert same(seen.policy[0], seen.policy[1])
    assert same(seen.anchor[0], seen.anchor[1])
    assert all(torch.equal(a, b) for a, b in zip(seen.moments[0], seen.moments[1], strict=True))
    assert not same(seen.policy[1], seen.policy[2])
    assert [row["skipped_steps"] for row in logged(tmp_path)[:-1]] == [0, 1, 0]


def test_a_gradient_that_is_not_finite_is_found_even_if_the_loss_is(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1)
    before = weights(made.roles.model)
    name, parameter = next((n, p) for n, p in made.roles.model.named_parameters() if "q_proj" in n)
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    made.train()
    assert name in before
    assert same(weights(made.roles.model), before)
    assert logged(tmp_path)[0]["skipped_steps"] == 1


def test_prompts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    rows = prompt_rows(3)
    longest = max(len(TOKENIZER.encode(row["prompt"])) for row in rows)
    trainer(tmp_path, train_dataset=rows, max_prompt_length=longest)
    with pytest.raises(DataError, match="row"):
        trainer(tmp_path, train_dataset=rows, max_prompt_length=longest - 1)
    with pytest.raises(DataError):  # prompt and completion together leave the model's 256 positions
        trainer(tmp_path, train_dataset=rows, max_completion_length=250)
    with pytest.raises(DataError):
        trainer(tmp_path, train_dataset=rows, eval_dataset=[{"prompt": ""}])


def test_evaluation_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eval_dataset"):
        trainer(tmp_path).evaluate()


def frozen_model() -> nn.Module:
    return tiny_causal(TOKENIZER).requires_grad_(False)


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "init kwargs of a loaded model": (lambda: None, {"model_init_kwargs": {"a": 1}}, "model_init_kwargs"),
    "no trainable parameter": (frozen_model, {}, "no trainable parameter"),
    "an adapter on an adapter": (
        lambda: PeftModel(tiny_causal(TOKENIZER), lora()),
        {"peft_config": lora()},
        "adapter already",
    ),
    "a name that is nowhere": (lambda: "/nowhere/at/all", {}, "/nowhere/at/all"),
}


@pytest.mark.parametrize(("model", "settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_models_that_cannot_be_trained_are_refused(
    model: Callable[[], Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, model(), **settings)


def test_bf16_weights_are_refused_where_they_would_train(tmp_path: Path) -> None:
    tiny_causal(TOKENIZER).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="bfloat16"):
        trainer(tmp_path, str(tmp_path), dtype="bfloat16")
    frozen = trainer(tmp_path, str(tmp_path), dtype="bfloat16", peft_config=lora())
    assert {p.dtype for p in frozen.roles.model.parameters() if p.requires_grad} == {torch.float32}
    assert frozen.roles.core.lm_head.weight.dtype == torch.bfloat16
    frozen.train()
    assert logged(tmp_path)[0]["anchor/gap_closed"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("peft_config", "rate"), [(None, 3e-6), (lora(), 1e-4)], ids=["full", "lora"])
def test_the_default_learning_rate(peft_config: Any, rate: float, tmp_path: Path) -> None:
    assert trainer(tmp_path, learning_rate=None, peft_config=peft_config).args.learning_rate == rate
