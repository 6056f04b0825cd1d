"""Data sets and models that cannot be trained are refused before the first step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data.test_scored import scored_rows
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny import prompt_rows, tiny_causal
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments

from bondlm import BONDTrainer
from bondlm.errors import CheckpointError, ConfigError, DataError
from trainer.helpers import TOKENIZER, config, logged, lora, same, trainer, weights


def test_prompts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    rows = prompt_rows(3)
    longest = max(len(TOKENIZER.encode(row["prompt"])) for row in rows)
    trainer(tmp_path, train_dataset=rows, max_prompt_length=longest)
    with pytest.raises(DataError, match=rf"max_prompt_length\D+{longest - 1}\b"):
        trainer(tmp_path, train_dataset=rows, max_prompt_length=longest - 1)
    with pytest.raises(DataError, match="256 tokens"):  # of positions, for prompt and completion together
        trainer(tmp_path, train_dataset=rows, max_completion_length=250)
    with pytest.raises(DataError, match="row 0: empty"):
        trainer(tmp_path, train_dataset=rows, eval_dataset=[{"prompt": ""}])


def frozen_model() -> nn.Module:
    return tiny_causal(TOKENIZER).requires_grad_(False)


def tied_in_memory_alone() -> nn.Module:
    model = tiny_causal(TOKENIZER)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def partly_on_disk() -> nn.Module:
    model = tiny_causal(TOKENIZER)
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": "disk"}
    return model


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "init kwargs of a loaded model": (lambda: None, {"model_init_kwargs": {"a": 1}}, "model_init_kwargs"),
    "no trainable parameter": (frozen_model, {}, "trainable"),
    "an adapter on an adapter": (
        lambda: PeftModel(tiny_causal(TOKENIZER), lora()),
        {"peft_config": lora()},
        "adapter",
    ),
    "a name that is nowhere": (lambda: "/nowhere/at/all", {}, "/nowhere/at/all"),
    "a path that is nowhere": (lambda: Path("/nowhere/at/all"), {}, "/nowhere/at/all"),
    "a head that is tied in memory alone": (tied_in_memory_alone, {}, "tie_word_embeddings = True"),
    "layers on the disk": (partly_on_disk, {}, r"device_map.*QLoRA"),
    "a compiled model": (lambda: torch.compile(tiny_causal(TOKENIZER)), {}, "torch_compile=True"),
    "no model": (lambda: nn.Linear(2, 2), {}, "model is a Linear: give a model of transformers or PEFT"),
}


@pytest.mark.parametrize(("model", "settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_models_that_cannot_be_trained_are_refused(
    model: Callable[[], Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, model(), **settings)


def test_a_tokenizer_is_given_and_not_named(tmp_path: Path) -> None:
    for name in ("tiny", Path("tiny")):
        with pytest.raises(ConfigError, match="processing_class='tiny': give the tokenizer itself"):
            BONDTrainer(
                tiny_causal(TOKENIZER),
                len,
                config(tmp_path),
                train_dataset=prompt_rows(4),
                processing_class=name,  # type: ignore[arg-type]
            )


def test_settings_of_another_trainer_and_a_file_as_folder_are_refused(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ConfigError, match="args is a TrainingArguments, but BONDTrainer needs a BONDConfig"):
        BONDTrainer(tiny_causal(TOKENIZER), len, args, train_dataset=prompt_rows(2))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output_dir='.*file' is a file"):
        trainer(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"^ref_model=a LlamaForCausalLM: "):
        BONDTrainer(tiny_causal(TOKENIZER), ref_model=tiny_causal(TOKENIZER))


def test_bf16_weights_are_refused_where_they_would_train(tmp_path: Path) -> None:
    tiny_causal(TOKENIZER).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="bfloat16"):
        trainer(tmp_path, str(tmp_path / "model"), dtype="bfloat16")
    frozen = trainer(tmp_path, str(tmp_path / "model"), dtype="bfloat16", peft_config=lora())
    assert {p.dtype for p in frozen.roles.model.parameters() if p.requires_grad} == {torch.float32}
    assert frozen.roles.core.lm_head.weight.dtype == torch.bfloat16
    frozen.train()
    assert logged(tmp_path)[0]["anchor/gap_closed"] == pytest.approx(1, abs=1e-3)


def test_a_run_does_not_write_over_the_model_that_it_starts_from(tmp_path: Path) -> None:
    """By name, as an object that was loaded there, through a link, and as the base of an adapter."""
    base, other = tmp_path / "base", tmp_path / "adapter"
    tiny_causal(TOKENIZER).save_pretrained(base)
    loaded = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora()).save_pretrained(other)
    (tmp_path / "link").symlink_to(base)
    before = sorted(path.name for path in base.iterdir())
    for model in (str(base), loaded, str(tmp_path / "link"), str(other)):
        with pytest.raises(ConfigError, match=r"output_dir=.*base"):
            trainer(base, model)
    assert sorted(path.name for path in base.iterdir()) == before


def test_an_evaluation_without_held_out_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval_strategy='steps'.*target_n=2\.0.*eval_dataset"):
        trainer(tmp_path, eval_strategy="steps", eval_steps=1, target_n=2.0)


def test_a_run_without_a_step_is_refused(tmp_path: Path) -> None:
    few = {"rows": 3, "per_device_train_batch_size": 4}
    with pytest.raises(ConfigError, match="dataloader_drop_last"):
        trainer(tmp_path, dataloader_drop_last=True, **few)
    made = trainer(tmp_path, **few)
    made.train()
    assert made.state.global_step == 2


def test_a_data_set_with_a_format_trains_as_without(tmp_path: Path) -> None:
    rows = [row | {"label": i} for i, row in enumerate(prompt_rows(8))]
    made = trainer(tmp_path, train_dataset=Dataset.from_list(rows).with_format("torch"), prompt_format="plain")
    made.train()
    plain = trainer(tmp_path, train_dataset=rows)
    plain.train()
    assert same(weights(made.model), weights(plain.model))


def test_an_optimizer_that_lacks_what_is_trained_is_refused(tmp_path: Path) -> None:
    """It was made before the adapter: the base's weights are frozen then, and nothing would move."""
    model = tiny_causal(TOKENIZER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(ConfigError, match=r"^optimizers: .*lora_A"):
        trainer(tmp_path, model, peft_config=lora(), optimizers=(optimizer, None), learning_rate=None)
    made = trainer(tmp_path, tiny_causal(TOKENIZER), max_steps=1)
    held = torch.optim.SGD(made.roles.model.parameters(), lr=1e-3)
    trainer(tmp_path / "held", made.roles.model, max_steps=1, optimizers=(held, None), learning_rate=None).train()


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        ({"learning_rate": 1e-3}, "optimizer"),
        ({"weight_decay": 0.1}, "optimizer"),
        ({"optim": "sgd"}, "optimizer"),
        ({"warmup_steps": 3}, "schedule"),
    ],
)
def test_a_setting_that_an_own_optimizer_makes_useless_is_refused(
    settings: dict[str, Any], own: str, tmp_path: Path
) -> None:
    model = tiny_causal(TOKENIZER)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0) if own == "schedule" else None
    plain = {"learning_rate": None, "warmup_steps": 100}
    with pytest.raises(ConfigError, match=f"^{next(iter(settings))}=.*the {own} passed in optimizers="):
        trainer(tmp_path, model, optimizers=(optimizer, schedule), **plain | settings)


def test_weights_of_rewards_that_are_not_there_are_refused(tmp_path: Path) -> None:
    scored = {"objective": "best_of_n_sft", "n": 4, "anchor": "fixed", "train_dataset": scored_rows(4, 4)}
    with pytest.raises(ConfigError, match=r"^reward_weights=\[2.0\]: there are no reward_funcs"):
        trainer(tmp_path, reward=None, reward_weights=[2.0], **scored)
    with pytest.raises(ConfigError, match=r"^reward_weights=\[0, 0\]"):
        trainer(tmp_path, reward=[len, max], reward_weights=[0, 0])
    rows = scored.pop("train_dataset")
    with pytest.raises(ConfigError, match=r"^reward_processing_classes: there are no reward_funcs"):
        BONDTrainer(
            tiny_causal(TOKENIZER),
            args=config(tmp_path, **scored | {"max_completion_length": 12}),
            train_dataset=rows,
            processing_class=TOKENIZER,
            reward_processing_classes=TOKENIZER,
        )


def test_a_folder_with_another_model_is_refused(tmp_path: Path) -> None:
    """What `sft` or `reward-model` made there would be lost, or be taken for the run's."""
    tiny_causal(TOKENIZER).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"already holds a model \(model.safetensors\)"):
        trainer(tmp_path)
    made = trainer(tmp_path / "own")
    made.save_model()  # what it has left there itself is no other model
    made.train()
    assert made.state.global_step == 2


def test_a_config_of_an_adapter_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"peft_config=\{'r': 4\}: give a config of peft"):
        trainer(tmp_path, peft_config={"r": 4})


def test_there_is_nothing_to_predict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="predict: completions have no labels"):
        trainer(tmp_path).predict(prompt_rows(2))


def test_a_model_that_was_cast_after_loading_has_rounded_positions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tmp_path / "as it is", tiny_causal(TOKENIZER))
    assert "rotary" not in caplog.text
    trainer(tmp_path / "cast", tiny_causal(TOKENIZER).to(torch.bfloat16))
    assert "rounded its rotary frequencies" in caplog.text
