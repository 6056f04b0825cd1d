"""What trains is fp32, whatever dtype a model comes in; a loss scale that is being found ends no run."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_causal

from bondlm.errors import ConfigError, NonFiniteError
from trainer.helpers import TOKENIZER, ends_often, logged, lora, same, trainer, weights

HALVES = [torch.bfloat16, torch.float16]


def trained_dtypes(made: Any) -> set[torch.dtype]:
    return {p.dtype for p in made.roles.model.parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", HALVES)
def test_a_model_in_half_precision_trains_in_fp32_and_says_so(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ends_often(tiny_causal(TOKENIZER, dtype=dtype))
    with caplog.at_level(logging.WARNING, "bondlm"):
        made = trainer(tmp_path, model, learning_rate=3e-6, max_steps=3)
    assert str(dtype).removeprefix("torch.") in caplog.text
    assert trained_dtypes(made) == {torch.float32}
    before = weights(made.roles.model)
    made.train()
    after = weights(made.roles.model)
    # A weight without a gradient stays (a token that nobody drew): of those of a matrix that all use, all move.
    moved = {name: float((after[name] != before[name]).float().mean()) for name in before if "proj" in name}
    assert min(moved.values()) > 0.95, moved


def test_a_model_in_fp32_is_left_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "bondlm"):
        trainer(tmp_path)
    assert "float32" not in caplog.text


@pytest.mark.parametrize("dtype", HALVES)
def test_an_adapter_is_fp32_on_a_base_that_keeps_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    from peft import get_peft_model

    model = get_peft_model(ends_often(tiny_causal(TOKENIZER, dtype=dtype)), lora(), autocast_adapter_dtype=False)
    assert any(p.dtype == dtype for p in model.parameters() if p.requires_grad)
    made = trainer(tmp_path, model, max_steps=1)
    assert trained_dtypes(made) == {torch.float32}
    assert made.roles.core.model.layers[0].self_attn.q_proj.base_layer.weight.dtype == dtype
    made.train()


@pytest.mark.parametrize("bf16", [False, True])
def test_a_trained_copy_beside_the_adapter_is_fp32(bf16: bool, tmp_path: Path) -> None:
    model = ends_often(tiny_causal(TOKENIZER, dtype=torch.bfloat16))
    config = lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    made = trainer(tmp_path, model, peft_config=config, bf16=bf16, max_steps=2)
    assert trained_dtypes(made) == {torch.float32}
    base = made.roles.core.model.layers[0].self_attn.q_proj.base_layer.weight.dtype
    assert base == (torch.bfloat16 if bf16 else torch.float32)  # autocast casts what comes in; nothing else would
    made.train()


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", torch.bfloat16])
def test_the_dtype_of_init_kwargs_is_that_of_the_frozen_weights(name: str, value: Any, tmp_path: Path) -> None:
    tiny_causal(TOKENIZER).save_pretrained(tmp_path / "model")
    made = trainer(tmp_path, str(tmp_path / "model"), model_init_kwargs={name: value}, peft_config=lora())
    assert made.roles.core.lm_head.weight.dtype == torch.bfloat16
    full = trainer(tmp_path, str(tmp_path / "model"), model_init_kwargs={name: value})
    assert trained_dtypes(full) == {torch.float32}


def test_auto_is_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    tiny_causal(TOKENIZER, dtype=torch.float16).save_pretrained(tmp_path / "model")
    made = trainer(tmp_path, str(tmp_path / "model"), model_init_kwargs={"dtype": "auto"}, peft_config=lora())
    assert made.roles.core.lm_head.weight.dtype == torch.float16


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no dtype": ({"model_init_kwargs": {"dtype": "half-ish"}}, "half-ish"),
    "a dtype of integers": ({"model_init_kwargs": {"dtype": "int8"}}, "int8"),
    "two that differ": ({"model_init_kwargs": {"dtype": "float32", "torch_dtype": "bfloat16"}}, "torch_dtype"),
    "another than the setting": ({"model_init_kwargs": {"dtype": "float32"}, "dtype": "bfloat16"}, "dtype=bfloat16"),
    "an argument that nobody takes": ({"model_init_kwargs": {"no_such_argument": 1}}, "no_such_argument"),
    "quantised twice": ({"model_init_kwargs": {"quantization_config": {}}, "quantization_config": {}}, "twice"),
    "fp16 on a CPU": ({"fp16": True}, "fp16"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_dtype_that_cannot_be_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny_causal(TOKENIZER).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, str(tmp_path / "model"), peft_config=lora(), **settings)


def test_quantisation_is_for_a_model_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantization_config"):
        trainer(tmp_path, quantization_config={"load_in_4bit": True})


@pytest.mark.parametrize("kind", ["whole", "tied", "adapter"])
def test_the_head_of_every_role_computes_in_fp32_if_asked(kind: str, tmp_path: Path) -> None:
    """A product in bf16 would have logits of 8 bits; each role's are those of its own head."""
    for asked in (False, True):
        model = ends_often(tiny_causal(TOKENIZER, dtype=torch.bfloat16 if kind == "adapter" else torch.float32))
        if kind == "tied":
            model.lm_head.weight = model.model.embed_tokens.weight
            model.config.tie_word_embeddings = True
        adapter = {"peft_config": lora()} if kind == "adapter" else {"bf16": True}
        made = trainer(tmp_path, model, cast_lm_head_to_fp32=asked, max_steps=1, eta=0.5, **adapter)
        made.train()
        heads = []
        for role in ("policy", "anchor", "reference"):
            with made.roles.use(role) as lent, torch.no_grad():
                head, seen = lent.get_output_embeddings(), list[Any]()
                hook = head.register_forward_hook(lambda module, args, out, seen=seen: seen.extend((args[0], out)))
                lent(input_ids=torch.arange(9)[None])
                hook.remove()
                heads.append(head.weight.float().clone())
            hidden, logits = seen
            expected = torch.nn.functional.linear(hidden.float(), heads[-1])  # no autocast here
            assert torch.equal(logits.float(), expected) == asked
            assert (logits.dtype == torch.float32) == asked
        if kind != "adapter":
            assert not torch.equal(heads[0], heads[1])
            assert not torch.equal(heads[1], heads[2])
        else:
            assert made.roles.core.model.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.bfloat16


def test_a_head_that_cannot_be_fp32_is_refused(tmp_path: Path) -> None:
    tied = tiny_causal(TOKENIZER, dtype=torch.bfloat16)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    for model, adapter in ((tied, lora()), (tiny_causal(TOKENIZER), lora(target_modules=["q_proj", "lm_head"]))):
        with pytest.raises(ConfigError, match="cast_lm_head_to_fp32"):
            trainer(tmp_path, model, cast_lm_head_to_fp32=True, peft_config=adapter)


def with_loss_scale(folder: Path, scale: float, reward: Any = None, **settings: Any) -> Any:
    """A run in fp16 on the CPU, which accelerate gives a loss scale on GPUs only."""
    made = trainer(folder, **({} if reward is None else {"reward": reward}), **settings)
    made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    made.accelerator.native_amp, made.accelerator.state._mixed_precision = True, "fp16"
    made.roles.autocast = torch.float16
    return made


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_loss_scale_that_is_too_large_is_lowered_until_the_run_learns(max_grad_norm: float, tmp_path: Path) -> None:
    made = with_loss_scale(tmp_path, 2.0**22, max_steps=16, max_grad_norm=max_grad_norm, max_skipped_steps=2)
    before = weights(made.roles.model)
    try:
        made.train()
    finally:
        made.accelerator.state._mixed_precision = "no"
    skipped = [row["skipped_steps"] for row in logged(tmp_path) if "skipped_steps" in row]
    assert skipped.index(0.0) > 2  # more in a row than max_skipped_steps
    assert made.accelerator.scaler.get_scale() == 2.0 ** (22 - sum(skipped))
    assert not same(weights(made.roles.model), before)
    assert not (tmp_path / "skipped.jsonl").exists()
    gaps = [row["anchor/gap_closed"] for row in logged(tmp_path) if "anchor/gap_closed" in row]
    assert len(gaps) == 16 - sum(skipped)  # the anchor rests while the scale is sought


def test_a_loss_that_is_not_finite_ends_a_run_whatever_its_scale(tmp_path: Path) -> None:
    def spoil(model: Any, inputs: Any, output: Any) -> Any:
        output.logits = output.logits * float("nan") if torch.is_grad_enabled() else output.logits
        return output

    made = with_loss_scale(tmp_path, 2.0**10, max_steps=10, max_skipped_steps=2)
    made.roles.core.register_forward_hook(spoil)
    try:
        with pytest.raises(NonFiniteError, match="max_skipped_steps"):
            made.train()
    finally:
        made.accelerator.state._mixed_precision = "no"
    assert made.state.global_step == 3
