"""Learning a few tokens at a time is the same step."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models.helpers import capped
from models.test_logits_budget import VOCABULARY, scaled
from tiny import tiny_causal, tiny_t5
from torch import Tensor
from trainer.helpers import TOKENIZER, Gradients, ends_often, logged, lora, same, trainer, weights

from bondlm import BONDTrainer
from bondlm.errors import ResourceError
from bondlm.models.head import exact_head
from bondlm.training.micro_batches import cut, size_of

LENGTHS = (1, 2, 2, 3, 5, 8, 13, 40)  # words of the prompts


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, str]]:
    return [{"prompt": "rain " * length} for length in lengths]


class Passes:
    """The tokens, and the completions, of each forward pass that a gradient goes through; and its numbers of logits."""

    def __init__(self, made: BONDTrainer, most: int | None = None) -> None:
        """More than `most` tokens do not fit."""
        self.tokens: list[int] = []
        self.logits: list[int] = []
        self.num_failed = 0
        self._most = most
        model = made.roles.core
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda module, args, out: self.logits.append(out.numel()) if self.learns else None)
        self.learns = False

    def _before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.learns = torch.is_grad_enabled() and not kwargs.get("use_cache")
        if not self.learns:
            return
        encoded = kwargs["encoder_outputs"].last_hidden_state if "encoder_outputs" in kwargs else kwargs["input_ids"]
        decoded = kwargs.get("decoder_input_ids")
        self.tokens.append(encoded.shape[:2].numel() + (0 if decoded is None else decoded.numel()))
        if self._most is not None and self.tokens[-1] > self._most:
            self.num_failed += 1
            weight = next(p for p in module.parameters() if p.requires_grad)
            weight.grad = torch.full_like(weight, 7.0)  # what a backward pass cut short may leave
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


BUILDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_causal(TOKENIZER),
    "lora": lambda: tiny_causal(TOKENIZER),
    "t5": lambda: tiny_t5(TOKENIZER),
    "gemma 2, rows apart": capped,
}


def learned(folder: Path, kind: str, most: int | None = None, **settings: Any) -> tuple[Passes, dict[str, Tensor]]:
    """One step from prompts of very different lengths: its passes, and its gradient."""
    gradients = Gradients()
    more = {"peft_config": lora()} if kind == "lora" else {}
    how: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 8, "optim": "sgd"}
    made = trainer(
        folder, ends_often(BUILDS[kind]()), train_dataset=rows(), callbacks=[gradients], **how | settings, **more
    )
    passes = Passes(made, most)
    made.train()
    return passes, gradients.first


def assert_equal(gradient: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected
    assert gradient.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, atol=2e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("kind", BUILDS)
def test_no_more_tokens_learn_at_a_time_than_asked(kind: str, tmp_path: Path) -> None:
    """Short prompts together, and the longest one completion after the other."""
    whole, expected = learned(tmp_path / "whole", kind)
    assert len(whole.tokens) == 1
    limit = 120
    parts, gradient = learned(tmp_path / "parts", kind, max_tokens_per_micro_batch=limit)
    assert max(parts.tokens) <= max(limit, 40 * 5 + 5)  # one completion of the longest prompt, at "rain " * 40
    assert sum(tokens > limit for tokens in parts.tokens) <= 4  # its two, each once more in the backward pass
    assert 4 <= len(parts.tokens) <= 9
    assert_equal(gradient, expected)
    row, cut_row = (logged(tmp_path / name)[0] for name in ("whole", "parts"))
    assert cut_row["loss"] == pytest.approx(row["loss"], rel=1e-4)
    assert cut_row["bond/advantage"] == pytest.approx(row["bond/advantage"], rel=1e-4, abs=1e-5)


ONE_BY_ONE: dict[str, tuple[str, dict[str, Any]]] = {
    "jbond": ("t5", {"gamma": 0.3, "gamma_ref": 0.1}),
    "jbond, checkpointing": ("llama", {"gradient_checkpointing": True}),
    "bonbon": ("llama", {"objective": "bonbon", "n": 3, "alpha": 0.3}),  # its loss is no sum over completions
    "grpo": ("lora", {"objective": "grpo", "num_samples": 4, "beta_rl": 0.1, "anchor": "ema"}),
}


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_a_prompts_completions_can_learn_one_by_one(name: str, tmp_path: Path) -> None:
    """Whatever the loss makes of them together."""
    kind, settings = ONE_BY_ONE[name]
    _, expected = learned(tmp_path / "whole", kind, **settings)
    passes, gradient = learned(tmp_path / "parts", kind, max_tokens_per_micro_batch=1, **settings)
    assert len(passes.tokens) == 8 * settings.get("num_samples", 2) * 2  # each once more, backwards
    assert_equal(gradient, expected)


@pytest.mark.filterwarnings("ignore:bondlm. out of memory")
def test_a_longer_batch_than_the_one_that_failed_is_cut_before_it_fails(tmp_path: Path) -> None:
    """Two batches; one completion of the second has nearly as many tokens as the memory holds."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1, "optim": "sgd"}
    long, gradients, expected = rows((9, 9, 9, 9, 30, 30, 30, 30)), Gradients(), Gradients()
    made = trainer(tmp_path / "small", train_dataset=long, callbacks=[gradients], **settings)
    passes = Passes(made, most=110)
    made.train()
    assert passes.num_failed == 1
    assert 55 <= made._smaller.max_tokens <= 110
    trainer(tmp_path / "whole", train_dataset=long, callbacks=[expected], **settings).train()
    assert_equal(gradients.first, expected.first)


@pytest.mark.filterwarnings("ignore:bondlm. out of memory")
def test_a_run_goes_on_with_the_size_that_it_found(tmp_path: Path) -> None:
    """To the bit, and without running out of memory again; unless another limit is asked for."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "train_dataset": rows()}
    settings |= {"per_device_train_batch_size": 8}

    def run(folder: Path, *, resume: bool = False, **more: Any) -> tuple[BONDTrainer, Passes]:
        made = trainer(folder, **settings | more)
        passes = Passes(made, most=150)
        made.train(resume_from_checkpoint=resume)
        return made, passes

    straight, failing = run(tmp_path / "straight")
    assert failing.num_failed
    run(tmp_path / "stopped", max_steps=2)
    resumed, fitting = run(tmp_path / "stopped", resume=True)
    assert fitting.num_failed == 0
    assert same(weights(resumed.roles.model), weights(straight.roles.model))
    raised = trainer(tmp_path / "stopped", **settings | {"max_steps": 5}, max_tokens_per_micro_batch=1000)
    raised.train(resume_from_checkpoint=True)
    assert raised._smaller.max_tokens == 1000


def test_every_process_makes_as_many_passes(tmp_path: Path) -> None:
    """Here another one needs five and six parts where this one needs none."""
    made = trainer(tmp_path, max_tokens_per_micro_batch=10_000, per_device_train_batch_size=8, train_dataset=rows())

    class Others:
        is_alone = False

        def max(self, needed: Tensor) -> Tensor:
            assert needed.tolist() == [1]
            return needed + 5

    plain = made._smaller.agreed
    made._smaller.agreed = lambda batches, world: plain(batches, Others())  # type: ignore[method-assign, arg-type]
    passes = Passes(made)
    made.args.max_steps = 1
    made.train()
    assert len(passes.tokens) == 6


def test_where_others_wait_the_error_names_the_setting(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1)
    passes, plain = Passes(made, most=0), made._smaller.learn
    two = SimpleNamespace(world_size=2, deepspeed_plugin=None, gradient_accumulation_steps=1)
    made._smaller.learn = lambda model, batch, step, args: plain(model, batch, step, two)  # type: ignore[method-assign]
    with pytest.raises(ResourceError, match=r"8 completion.* \d+ tokens.*max_tokens_per_micro_batch"):
        made.train()
    assert passes.num_failed == 1


def test_cut_takes_neighbours_together_and_one_at_least() -> None:
    parts = cut([1, 2, 3, 9, 1, 4, 7], lambda some: sum(some) <= 6)
    assert parts == [[1, 2, 3], [9], [1, 4], [7]]


def test_of_several_pieces_the_largest_that_can_be_cut_counts() -> None:
    """Else a single completion that is too long would be tried for ever."""

    def piece(completions: int, tokens: int) -> dict[str, Tensor]:
        return {"completion_ids": torch.zeros(1, completions, 3), "input_ids": torch.zeros(1, tokens)}

    assert size_of({"pieces": [piece(1, 90), piece(2, 20), piece(3, 15)]}) == (2, 20)
    assert size_of({"pieces": [piece(1, 40), piece(1, 90)]}) == (1, 90)
    assert size_of(piece(4, 50)) == (4, 50)


@pytest.mark.parametrize("build", [capped, scaled])
def test_a_model_that_alters_its_logits_learns_a_few_prompts_at_a_time(
    build: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many logits as fit, also where a long prompt and a short one would make many between them."""
    monkeypatch.setitem(BUILDS, "altering", build)
    whole, expected = learned(tmp_path / "whole", "altering")
    budget = 30 * VOCABULARY
    monkeypatch.setattr("bondlm.models.head.LOGITS_BUDGET", 4 * budget)
    parts, gradient = learned(tmp_path / "parts", "altering")
    assert len(whole.logits) == 1
    assert 1 < len(parts.logits) < 8
    assert budget / 4 < max(parts.logits) <= budget < whole.logits[0]
    assert_equal(gradient, expected)
    assert exact_head(build(), torch.device("cpu")) is None
