"""Policy and reference end their answers at the same tokens, as in training, whatever their own files say."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from tiny import prompt_rows, tiny_causal, tiny_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

from bondlm import BONDConfig, BONDTrainer
from bondlm.cli.eval import complete, fingerprint, load_job
from bondlm.errors import ConfigError
from bondlm.evaluation.pair import Pair
from bondlm.rollout.sampler import Sampler

TOKENIZER = tiny_tokenizer()
ENDS = (2, 7, 8)


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def reward(folder: Path) -> str:
    (folder / "reward.py").write_text("def long(completions, **_):\n    return [float(len(c)) for c in completions]\n")
    return f"{folder}/reward.py:long"


def base(folder: Path, ends: int | list[int] = 2) -> str:
    model = tiny_causal(TOKENIZER)
    model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def trained(folder: Path, start: str, *, lora: bool) -> str:
    """A run whose end-of-sequence tokens were set on the model object, as the log line of `PromptEncoder` advises."""
    model = AutoModelForCausalLM.from_pretrained(start)
    model.generation_config.eos_token_id = list(ENDS)
    sizes = {"max_steps": 1, "warmup_steps": 0, "per_device_train_batch_size": 2, "max_completion_length": 4}
    args = BONDConfig(output_dir=str(folder), use_cpu=True, save_strategy="no", **sizes)
    peft_config = LoraConfig(r=4, target_modules=["q_proj"]) if lora else None
    trainer = BONDTrainer(model, length, args, prompt_rows(4), processing_class=TOKENIZER, peft_config=peft_config)
    trainer.train()
    trainer.save_model()
    assert trainer.encoder.eos_ids == ENDS
    return str(folder)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_answers_end_where_they_did_in_training(lora: bool, tmp_path: Path) -> None:
    start = base(tmp_path / "base")
    run = trained(tmp_path / "run", start, lora=lora)
    assert Sampler(run, dtype="float32").encoder.eos_ids == ENDS
    options = {"model": run, "dataset": prompt_rows(2), "reward_funcs": reward(tmp_path)}
    settings, _ = complete(options | {"reference": start, "dtype": "float32"})
    job = load_job(settings)
    samplers = job["pair"].samplers
    assert samplers["policy"].encoder.eos_ids == samplers["reference"].encoder.eos_ids == ENDS
    rows = job["rows"]
    for sampler in samplers.values():
        drawn = [c for row in sampler.sample(rows, 16, max_completion_length=64) for c in row]
        assert any(c.ids[-1] in (7, 8) for c in drawn)
        assert not any(set(c.ids[:-1]) & set(ENDS) for c in drawn)
    assert fingerprint(settings, job)["eos_ids"] == list(ENDS)  # samples with the models' own ends are refused


def test_samples_of_models_with_the_same_ends_are_those_of_before(tmp_path: Path) -> None:
    start = base(tmp_path / "base")
    (tmp_path / "out").mkdir()
    options = {"model": start, "reference": start, "dataset": prompt_rows(2), "output": str(tmp_path / "out")}
    options["max_completion_length"] = 4
    settings, _ = complete(options | {"reward_funcs": reward(tmp_path), "dtype": "float32"})
    assert "eos_ids" not in fingerprint(settings, load_job(settings))


def test_a_reference_that_ends_elsewhere_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy, reference = base(tmp_path / "policy", [2, 7]), base(tmp_path / "reference", [2, 9])
    with pytest.raises(ConfigError, match="eos_token_id") as error:
        Pair(policy, reference, dtype="float32")
    assert "id 9" in str(error.value)
    pair = Pair(policy, reference, dtype="float32", is_start=True)  # training ended its answers there
    assert pair.samplers["reference"].encoder.eos_ids == (2, 7)
    GenerationConfig(eos_token_id=2).save_pretrained(reference)
    assert not caplog.text
    pair = Pair(policy, reference, dtype="float32")
    assert pair.samplers["reference"].encoder.eos_ids == (2, 7)
    assert "id 7" in caplog.text
