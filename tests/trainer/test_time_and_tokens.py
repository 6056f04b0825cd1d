"""A step's books against measures of their own: a wall clock around it, tokens counted where they are worked on."""

import time
from pathlib import Path
from typing import Any

import pytest
from tiny import prompt_rows, tiny_causal, tiny_tokenizer
from transformers import TrainerCallback

from bondlm import BONDConfig, BONDTrainer
from bondlm.training import step as step_module

TOKENIZER = tiny_tokenizer()
NAP = 0.15  # seconds of each part of a step that a test makes slow


def length(completions: list[str]) -> list[float]:
    return [float(len(completion)) for completion in completions]


def config(folder: Path, **changes: Any) -> BONDConfig:
    settings: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings |= {"max_completion_length": 4, "warmup_steps": 0, "save_strategy": "no", "disable_tqdm": True}
    return BONDConfig(output_dir=str(folder), use_cpu=True, **settings | changes)


class Timed(BONDTrainer):
    """Notes when a step's first method is entered."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.setdefault("began", []).append(time.perf_counter())
        return super().get_batch_samples(*args, **kwargs)


class Ends(TrainerCallback):
    """Notes when the callbacks of a step's end run."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at.append(time.perf_counter())


def test_the_phases_account_for_the_wall_time_of_a_step(tmp_path: Path) -> None:
    """Fetching data, rewards and the learner's own code are slow here; 98% of the wall clock's time is on the books."""

    def slow(completions: list[str]) -> list[float]:
        time.sleep(NAP)
        return length(completions)

    made = Timed(
        *(tiny_causal(TOKENIZER), slow, config(tmp_path, logging_steps=1), prompt_rows(16)), processing_class=TOKENIZER
    )
    ends = Ends()
    made.add_callback(ends)
    collate = made.data_collator

    def slowly(rows: Any) -> Any:
        time.sleep(NAP)
        return collate(rows)

    made.data_collator = slowly
    made.train()
    walls = [end - begin for begin, end in zip(made.began, ends.at, strict=True)]  # type: ignore[attr-defined]
    steps = [row for row in made.state.log_history if "step_time" in row]
    assert len(walls) == len(steps) == 4
    for wall, row in zip(walls, steps, strict=True):
        phases = sum(value for name, value in row.items() if name.startswith("time/"))
        assert 0.98 * wall <= phases <= wall
        assert row["step_time"] == pytest.approx(phases)
        assert row["time/reward"] >= NAP


def test_compared_tokens_are_those_that_went_through_a_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The anchor scores at every step, the reference at logged ones, which are every second here."""
    scored: list[int] = []
    plain = step_module.group_logprobs

    def counting(model: Any, groups: Any, *args: Any, **kwargs: Any) -> Any:
        scored.append(sum(len(c) for _, completions in groups for c in completions))
        return plain(model, groups, *args, **kwargs)

    monkeypatch.setattr(step_module, "group_logprobs", counting)
    made = BONDTrainer(
        *(tiny_causal(TOKENIZER), length, config(tmp_path, logging_steps=2), prompt_rows(16)),
        processing_class=TOKENIZER,
    )
    made.train()
    logged = [row["num_tokens/compared"] for row in made.state.log_history if "num_tokens/compared" in row]
    assert len(logged) == 2
    assert len(scored) == 6
    assert 2 * sum(logged) == sum(scored)  # means over two steps
