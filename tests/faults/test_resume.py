"""Row D9 of the fault matrix: stopped after any step and resumed, a run is byte for byte one that never stopped."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_causal, tiny_t5
from trainer.helpers import TOKENIZER, ends_often, logged, lora, same, trainer, weights, without_times

from bondlm.trainer import BONDTrainer

STEPS = 6
BOND_K = {"objective": "bond", "n": 4, "num_anchor_samples": 3}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "jbond-causal-full-1": ("causal", {}),
    "jbond-causal-full-1-logged-every-4": ("causal", {"logging_steps": 4, "gradient_accumulation_steps": 2}),
    "jbond-causal-lora-4": ("causal-lora", {"gradient_accumulation_steps": 4}),
    "jbond-t5-full-4": ("t5", {"gradient_accumulation_steps": 4}),
    "jbond-t5-lora-1": ("t5-lora", {}),
    "bond-causal-lora-1": ("causal-lora", BOND_K),
    "bond-causal-full-4": ("causal", BOND_K | {"gradient_accumulation_steps": 4}),
    "bond-t5-lora-4": ("t5-lora", BOND_K | {"gradient_accumulation_steps": 4}),
    "bond-t5-full-1": ("t5", BOND_K),
}


def run(folder: Path, case: str) -> BONDTrainer:
    kind, settings = CASES[case]
    model = ends_often(tiny_t5(TOKENIZER) if kind.startswith("t5") else tiny_causal(TOKENIZER, layers=1))
    return trainer(
        folder,
        model,
        rows=18,  # with an accumulation of 4 the epoch ends in the middle of the run, with a window of 2 prompts
        max_steps=STEPS,
        max_completion_length=3,
        per_device_train_batch_size=2 if "gradient_accumulation_steps" in settings else 4,
        save_strategy="steps",
        save_steps=1,
        gamma=0.3,
        lr_scheduler_type="linear",
        peft_config=lora("t5" if kind.startswith("t5") else "llama") if kind.endswith("lora") else None,
        **settings,
    )


EVERY = ("jbond-causal-lora-4", "bond-causal-full-4")


@pytest.mark.parametrize("case", CASES)
def test_d9_resume_equality(case: str, tmp_path: Path) -> None:
    resume_after(case, range(1, STEPS + 1) if case in EVERY else (3 if "logged" in case else 4,), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in EVERY])
def test_d9_resume_equality_after_every_step(case: str, tmp_path: Path) -> None:
    resume_after(case, range(1, STEPS + 1), tmp_path)


def resume_after(case: str, stops: Iterable[int], tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", case)
    whole.train()
    every = whole.args.logging_steps
    steps = list(range(every, STEPS + 1, every))
    expected = without_times(logged(tmp_path / "whole"))[: len(steps)]
    assert [row["step"] for row in expected] == steps
    samples = (tmp_path / "whole" / "samples.jsonl").read_bytes()
    encoded: Any = list(whole.train_dataset)[:2]  # type: ignore[arg-type]
    drawn = whole.sample(encoded, "anchor", 2).completions
    last = f"checkpoint-{STEPS}"
    for stop in stops:
        folder = tmp_path / f"stopped-{stop}"
        shutil.copytree(tmp_path / "whole", folder)
        for step in range(stop + 1, STEPS + 1):  # what was logged beyond is still there
            shutil.rmtree(folder / f"checkpoint-{step}")
        resumed = run(folder, case)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == STEPS
        assert same(weights(resumed.roles.model), weights(whole.roles.model))
        assert same(resumed.anchor.state_dict(), whole.anchor.state_dict())
        names = [path.name for path in (tmp_path / "whole" / last).iterdir()]
        for name in names:  # optimizer, scheduler, generators, anchor, policy
            if Path(name).suffix in (".pt", ".pth", ".safetensors"):
                assert (folder / last / name).read_bytes() == (tmp_path / "whole" / last / name).read_bytes(), name
        assert {"optimizer.pt", "rng_state.pth", "scheduler.pt", "anchor.safetensors"} <= set(names)
        assert without_times(logged(folder))[: len(steps)] == expected
        assert (folder / "samples.jsonl").read_bytes() == samples
        assert resumed.sample(encoded, "anchor", 2).completions == drawn
