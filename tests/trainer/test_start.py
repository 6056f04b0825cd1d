"""Where a run starts if the name of its model does not say it: from an adapter, or from weights changed in memory."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from tiny import PROMPTS, tiny_causal
from torch import Tensor
from transformers import AutoModelForCausalLM

from bondlm.cli.eval import complete
from bondlm.errors import ConfigError
from bondlm.models.load import load_model
from trainer.helpers import TOKENIZER, ends_often, lora, trainer

IDS = torch.tensor([TOKENIZER.encode(PROMPTS[1])])
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.fixture
def base(tmp_path: Path) -> str:
    folder = str(tmp_path / "base")
    ends_often(tiny_causal(TOKENIZER)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def load(base: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def trained_adapter(base: str, seed: int = 0) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(load(base), lora(init_lora_weights=False))


def named_model(run: Path) -> str | None:
    return yaml.safe_load((run / "config.yaml").read_text()).get("model")


def test_an_adapter_in_memory_is_kept_as_the_runs_start_and_reference(base: str, tmp_path: Path) -> None:
    """TRL's way to go on from SFT. The base was named as what the run started from."""
    run, given = tmp_path / "run", trained_adapter(base)
    before = logits(given)
    made = trainer(run, given, save_strategy="steps", save_steps=1, learning_rate=0.1)
    made.train()
    made.save_model()
    assert named_model(run) == str(run / "start")
    assert torch.equal(logits(load_model(str(run / "start"), dtype=torch.float32)), before)
    assert not torch.equal(logits(load_model(str(run), dtype=torch.float32)), before)
    for folder in (run, tmp_path / "moved"):
        options, _ = complete({"model": str(folder), "dataset": "x", "reward_funcs": "nli:y"})
        assert options["reference"] == str(folder / "start")
        shutil.copytree(run, tmp_path / "moved", dirs_exist_ok=True)
    again = trainer(run, trained_adapter(base), save_strategy="steps", save_steps=1, learning_rate=0.1)
    again.train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="started from the adapter"):
        trainer(run, trained_adapter(base, seed=1), save_strategy="steps", save_steps=1, learning_rate=0.1).train(
            resume_from_checkpoint=True
        )


def test_a_second_trainer_of_a_run_leaves_its_start_alone(base: str, tmp_path: Path) -> None:
    """A notebook's next cell, to evaluate what was trained: the start would be the trained adapter."""
    run, given = tmp_path / "run", trained_adapter(base)
    before = logits(given)
    trainer(run, given, learning_rate=0.1).train()
    assert not torch.equal(logits(given), before)
    trainer(run, given)
    assert torch.equal(logits(load_model(str(run / "start"), dtype=torch.float32)), before)


def test_a_fresh_adapter_needs_no_start_of_its_own(base: str, tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", load(base), peft_config=lora())
    made.train()
    assert named_model(tmp_path / "run") == base
    assert not (tmp_path / "run" / "start").exists()


@pytest.mark.parametrize("fresh", [True, False])
def test_an_adapter_on_a_base_that_is_on_no_file_is_refused(base: str, tmp_path: Path, fresh: bool) -> None:
    """It would be loaded onto the one on file, and be another model there."""
    merged = trained_adapter(base).merge_and_unload()
    given = {"peft_config": lora()} if fresh else {}
    with pytest.raises(ConfigError, match=r"changed since they were loaded.*q_proj"):
        trainer(tmp_path / "run", merged if fresh else get_peft_model(merged, lora()), **given)
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_changes_its_base_by_itself_is_trained(base: str, tmp_path: Path) -> None:
    """PiSSA takes from the base what the adapter starts with, and the base on file still has it."""
    model = get_peft_model(load(base), lora(init_lora_weights="pissa"))
    before = logits(model)
    made = trainer(tmp_path / "run", model, learning_rate=0.1)
    made.train()
    made.save_model()
    saved = logits(load_model(str(tmp_path / "run"), dtype=torch.float32))
    assert torch.allclose(saved, logits(made.model), atol=1e-5)
    assert not torch.allclose(saved, before, atol=1e-3)


def test_whole_weights_that_are_on_no_file_have_no_name(
    base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run's folder says all of them, but `bondlm eval` must not take the file's for the reference."""
    made = trainer(tmp_path / "run", trained_adapter(base).merge_and_unload().requires_grad_(True))
    assert "--reference" in caplog.text
    made.train()
    made.save_model()
    assert named_model(tmp_path / "run") is None
    with pytest.raises(ConfigError, match="reference is required"):
        complete({"model": str(tmp_path / "run"), "dataset": "x", "reward_funcs": "nli:y"})


@pytest.mark.parametrize("loaded", [True, False])
def test_a_generation_config_that_transformers_refuses_to_save_ends_no_run(loaded: bool, tmp_path: Path) -> None:
    """Llama 2's on file, or set in memory: the save at the end raised, after hours."""
    base, model = tmp_path / "base", ends_often(tiny_causal(TOKENIZER))
    odd = {"temperature": 0.6, "do_sample": False}
    model.save_pretrained(base)
    file = base / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | odd))
    model.generation_config.update(**odd)
    ends = model.generation_config.eos_token_id
    made = trainer(tmp_path / "run", str(base) if loaded else model)
    made.train()
    made.save_model()
    kept = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == ends


@pytest.mark.parametrize("given", [{}, {"peft_config": lora()}], ids=["to go on", "under a new one"])
def test_an_adapter_that_transformers_loaded_is_refused(given: dict[str, Any], base: str, tmp_path: Path) -> None:
    """`from_pretrained` of an adapter's folder gives a model of the base's class."""
    trained_adapter(base).save_pretrained(tmp_path / "sft")
    with pytest.raises(ConfigError, match="loaded it from an adapter"):
        trainer(tmp_path / "run", load(str(tmp_path / "sft")), **given)
