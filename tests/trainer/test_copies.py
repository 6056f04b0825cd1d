"""The frozen copies of full fine-tuning: how many there are, where they rest, and that none of it changes a number."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny import prompt_rows, tiny_causal, tiny_tokenizer

from bondlm import BONDConfig, BONDTrainer
from bondlm.errors import ConfigError
from bondlm.models.roles import Roles

TOKENIZER = tiny_tokenizer()
NUMBERS = ("loss", "kl", "reward", "anchor/kl", "anchor/distance", "eval_kl", "eval_reward", "eval_reference_reward")


def length(completions: list[str]) -> list[float]:
    return [float(len(completion)) for completion in completions]


def trainer(folder: Path, peft_config: Any = None, **changes: Any) -> BONDTrainer:
    settings: dict[str, Any] = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2, "eval_steps": 3}
    settings |= {"max_completion_length": 5, "warmup_steps": 0, "learning_rate": 1e-2, "eval_strategy": "steps"}
    settings |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    args = BONDConfig(output_dir=str(folder), **settings | changes)
    rows = prompt_rows(10)
    return BONDTrainer(
        *(tiny_causal(TOKENIZER), length, args, rows[:6], rows[6:]),
        processing_class=TOKENIZER,
        peft_config=peft_config,
    )


def numbers(made: BONDTrainer) -> list[dict[str, float]]:
    made.train()
    return [{name: row[name] for name in NUMBERS if name in row} for row in made.state.log_history]


def copies(roles: Roles) -> int:
    """How many sets of weights the three roles have."""
    held = set()
    for role in ("policy", "anchor", "reference"):
        with roles.use(role) as model:
            held.add(model.get_input_embeddings().weight.data_ptr())
    return len(held)


def test_a_fixed_anchor_and_the_reference_are_one_copy_with_the_numbers_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = trainer(tmp_path / "shared", anchor="fixed")
    assert copies(shared.roles) == 2
    seen = numbers(shared)
    two = trainer(tmp_path / "two", anchor="fixed")
    two.roles.keep_reference()
    assert copies(two.roles) == 3
    assert numbers(two) == seen
    assert any(row.get("kl", 0) != 0 for row in seen)
    assert copies(trainer(tmp_path / "ema").roles) == 3


def test_a_reference_keeps_its_weights_when_a_shared_anchor_gets_others(tmp_path: Path) -> None:
    """A run with a moved anchor goes on with `anchor: fixed` (--allow_config_change)."""
    made = trainer(tmp_path, anchor="fixed")
    start = {name: tensor.clone() for name, tensor in made.anchor.state_dict().items()}
    made.anchor.load_state_dict({name: tensor + 1 for name, tensor in start.items()})
    for role, offset in (("anchor", 1), ("reference", 0)):
        with made.roles.use(role) as model:
            assert all(torch.equal(p, start[name] + offset) for name, p in model.named_parameters())


def test_an_offloaded_anchor_gives_the_numbers_of_one_on_the_device(tmp_path: Path) -> None:
    assert numbers(trainer(tmp_path / "off", offload_anchor=True)) == numbers(trainer(tmp_path / "on"))


@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize("offload", [True, False])
def test_where_the_copies_rest(moves: bool, offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen by what is moved: no accelerator is here."""
    roles = Roles(tiny_causal(TOKENIZER), anchor_moves=moves, offload_anchor=offload)
    stays: set[str] = set()
    visits: list[str] = []
    for name, model in roles._copies.items():
        monkeypatch.setattr(model, "to", lambda device, name=name: stays.add(f"{name} on {device}"))
    monkeypatch.setattr("bondlm.models.roles._copied_to", lambda device, data: visits.append(str(device)) or data)
    roles.to(torch.device("cuda"))
    assert stays == (set() if offload else {"anchor on cuda" if moves else "reference on cuda"})
    for role in ("anchor", "reference"):
        visits.clear()
        with roles.use(role):
            assert bool(visits) == (offload or (moves and role == "reference"))
        assert set(visits) <= {"cuda"}


def test_an_adapter_cannot_be_offloaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="offload_anchor=True"):
        trainer(tmp_path, LoraConfig(r=4, target_modules=["q_proj"]), offload_anchor=True)
