"""Runs with adapters of every sort: what is logged, saved and resumed, and what is refused in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny import PROMPTS, tiny_causal
from torch import Tensor

from bondlm.errors import ConfigError
from bondlm.models.load import load_model
from trainer.helpers import MODELS, TOKENIZER, ends_often, logged, lora, same, trainer

IDS = torch.tensor([TOKENIZER.encode(PROMPTS[1])])
ROLES = ("policy", "anchor", "reference")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def base() -> Any:
    return ends_often(tiny_causal(TOKENIZER))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def logits_of(made: Any, role: str) -> Tensor:
    with made.roles.use(role) as model:
        return logits(model)


KINDS: dict[str, Any] = {
    "dora": lora(use_dora=True),
    "pissa": lora(init_lora_weights="pissa"),
    "head and tokens": lora(target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[5, 6]),
    "embeddings": lora(target_modules=["q_proj", "embed_tokens"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_an_adapter_of_this_kind(kind: str, tmp_path: Path) -> None:
    given = logits(base())
    made = trainer(tmp_path, base(), peft_config=KINDS[kind], learning_rate=0.02, eta=0.2, gamma_ref=0.1)
    trained = {name for name, p in made.roles.model.named_parameters() if p.requires_grad}
    assert set(made.anchor.state_dict()) == trained
    for role in ROLES:
        torch.testing.assert_close(logits_of(made, role), given, atol=1e-4, rtol=0)
    made.train()
    first, second = logged(tmp_path)[:2]
    assert first["kl"] == pytest.approx(0, abs=1e-4)  # of the samples before the first step
    assert abs(second["kl"]) > 1e-4
    for row in (first, second):
        assert row["anchor/gap_closed"] == pytest.approx(1, abs=1e-4)
        assert row["skipped_steps"] == 0
    torch.testing.assert_close(logits_of(made, "reference"), given, atol=1e-4, rtol=0)
    made.save_model()
    loaded = PeftModel.from_pretrained(base(), str(tmp_path))
    torch.testing.assert_close(logits(loaded), logits_of(made, "policy"), atol=1e-5, rtol=0)


def test_a_cell_may_be_run_twice(tmp_path: Path) -> None:
    """A PEFT model trains on from where it is, also if an adapter `anchor` lies in it; a base begins anew."""
    model = get_peft_model(base(), lora())
    model.add_adapter("anchor", lora())
    trainer(tmp_path / "1", model, learning_rate=0.02).train()
    start = logits(model)
    made = trainer(tmp_path / "2", model, learning_rate=0.02)
    for role in ROLES:
        assert torch.equal(logits_of(made, role), start)
    made.train()
    assert logged(tmp_path / "2")[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert torch.equal(logits_of(made, "reference"), start)
    assert not torch.equal(logits_of(made, "policy"), start)
    plain = base()
    given = logits(plain)
    for cell in ("3", "4"):
        made = trainer(tmp_path / cell, plain, peft_config=lora(), learning_rate=0.02)
        for role in ROLES:
            assert torch.equal(logits_of(made, role), given)
        made.train()
        assert not torch.equal(logits(plain), given)


def test_a_run_whose_adapter_has_another_name_is_resumed_and_saved_at_its_root(tmp_path: Path) -> None:
    def made(folder: Path, **settings: Any) -> Any:
        torch.manual_seed(0)
        model = get_peft_model(base(), lora(), adapter_name="anchor")
        return trainer(folder, model, learning_rate=0.02, save_strategy="steps", save_steps=1, **settings)

    whole, begun = made(tmp_path / "whole"), made(tmp_path / "parts", max_steps=1)
    whole.train()
    begun.train()
    resumed = made(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed.anchor.state_dict(), whole.anchor.state_dict())
    assert torch.equal(logits_of(resumed, "policy"), logits_of(whole, "policy"))
    resumed.save_model()
    for folder in (tmp_path / "parts", tmp_path / "parts" / "checkpoint-2"):
        assert not (folder / "anchor").exists()
        loaded = PeftModel.from_pretrained(base(), str(folder))
        torch.testing.assert_close(logits(loaded), logits_of(whole, "policy"), atol=1e-6, rtol=0)


def adapted(config: Any = None, **changes: Any) -> Callable[[], Any]:
    return lambda: get_peft_model(base(), lora(**changes) if config is None else config)


def unfrozen_norms() -> Any:
    model = adapted()()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "norm" in name)
    return model


def second_adapter_trains() -> Any:
    model = adapted()()
    model.add_adapter("other", lora())
    model.base_model.set_adapter(["default", "other"])
    return model


def merged() -> Any:
    model = adapted()()
    model.merge_adapter()
    return model


def layers_alone() -> Any:
    return adapted()().get_base_model()


PROMPT = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
PREFIX = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
ADALORA = AdaLoraConfig(total_step=5, target_modules=["q_proj"], task_type="CAUSAL_LM")
REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "prompt tuning": (base, {"peft_config": PROMPT}, "PROMPT_TUNING.*LoraConfig"),
    "prefix tuning": (base, {"peft_config": PREFIX}, "PREFIX_TUNING.*LoraConfig"),
    "a model with a prefix": (adapted(PREFIX), {}, "PREFIX_TUNING.*LoraConfig"),
    "adalora": (base, {"peft_config": ADALORA}, "AdaLoRA.*LoraConfig"),
    "a model with adalora": (adapted(ADALORA), {}, "AdaLoRA.*LoraConfig"),
    "bias": (base, {"peft_config": lora(bias="lora_only")}, "bias='lora_only'.*modules_to_save"),
    "a model with biases": (adapted(bias="all"), {}, "bias='all'.*modules_to_save"),
    "a base that chance has changed": (
        base,
        {"peft_config": lora(init_lora_weights="pissa_niter_2")},
        "init_lora_weights='pissa_niter_2'.*'pissa'",
    ),
    "no such layers": (base, {"peft_config": lora(target_modules=["nowhere"])}, "peft_config.*nowhere"),
    "weights beside the adapter": (unfrozen_norms, {}, "norm.*modules_to_save"),
    "two adapters": (second_adapter_trains, {}, "active adapters.*other"),
    "a merged adapter": (merged, {}, "unmerge_adapter"),
    "layers without their model": (layers_alone, {}, "PeftModel"),
    "dropout of an adapter": (base, {"peft_config": lora(lora_dropout=0.1)}, "lora_dropout=0.1.*disable_dropout"),
    "dropout of another kind": (
        base,
        {"peft_config": LoHaConfig(r=2, target_modules=["q_proj"], module_dropout=0.5)},
        "module_dropout=0.5.*disable_dropout",
    ),
    "noise on embeddings": (base, {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5"),
}


@pytest.mark.parametrize(("model", "settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_adapters_that_cannot_be_trained_are_refused(
    model: Callable[[], Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, model(), **settings)


def test_a_folder_with_a_prompt_is_refused_by_whoever_loads_it(tmp_path: Path) -> None:
    model = adapted(PROMPT)()
    base().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "prompt"))
    with pytest.raises(ConfigError, match="PROMPT_TUNING"):
        load_model(tmp_path / "prompt", dtype=torch.float32)


def test_dropout_that_a_given_adapter_has_is_set_to_0_and_saved_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(tmp_path, adapted(lora_dropout=0.3)())
    assert "lora_dropout=0.3" in caplog.text
    made.save_model()
    assert LoraConfig.from_pretrained(str(tmp_path)).lora_dropout == 0
    kept = trainer(tmp_path / "kept", base(), peft_config=lora(lora_dropout=0.3), disable_dropout=False)
    policy = kept.roles.model.train()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        assert not torch.equal(policy(input_ids=IDS).logits, policy(input_ids=IDS).logits)
    kept.save_model()
    assert LoraConfig.from_pretrained(str(tmp_path / "kept")).lora_dropout == 0.3


@pytest.mark.parametrize(
    ("kind", "right", "wrong"), [("t5", "SEQ_2_SEQ_LM", "CAUSAL_LM"), ("llama", "CAUSAL_LM", "SEQ_CLS")]
)
def test_the_saved_adapter_names_the_class_that_loads_it(kind: str, right: str, wrong: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, MODELS[kind](TOKENIZER), peft_config=lora(kind, task_type=wrong), max_steps=1)
    made.train()
    made.save_model()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == right
