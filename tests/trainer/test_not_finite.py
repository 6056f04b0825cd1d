"""Rewards that fail and numbers that are not finite reach no weight."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from bondlm import BONDTrainer
from bondlm.errors import NonFiniteError, RewardError
from trainer.helpers import Spoiled, logged, lora, optimizer_tensors, same, trainer, weights


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
    "too few": (lambda count: [1.0] * (count - 1), " values .* completions"),
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


def test_losses_that_are_not_finite_end_the_run_and_nothing_has_moved(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=9)
    before = weights(made.roles.model)
    anchor = {name: tensor.clone() for name, tensor in made.anchor.state_dict().items()}
    Spoiled(made, set(range(1, 10)))
    with pytest.raises(NonFiniteError, match=r"step 3: .*gradient.*\b3 steps") as caught:
        made.train()
    assert caught.value.exit_code == 5
    after = weights(made.roles.model)
    assert all(torch.equal(after[name], before[name]) for name in before if "lm_head" not in name)
    assert same(made.anchor.state_dict(), anchor)
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_bytes().splitlines()]
    assert [row["step"] for row in skipped] == [1, 2, 3]
    assert [sample["loss"] for sample in skipped[0]["samples"]] == ["nan"] * 4


@pytest.mark.parametrize("save_steps", [100, 3])
def test_what_was_learned_before_is_saved_first(save_steps: int, tmp_path: Path) -> None:
    def spoil(model: Any, inputs: Any, output: Any) -> Any:
        if torch.is_grad_enabled() and made.state.global_step >= 2:
            output.logits = output.logits * float("nan")
        return output

    settings = {"max_steps": 6, "max_skipped_steps": 1, "save_strategy": "steps", "save_steps": save_steps}
    made, two_steps = trainer(tmp_path / "run", **settings), trainer(tmp_path / "two", max_steps=2)
    two_steps.train()
    made.roles.core.register_forward_hook(spoil)
    with pytest.raises(NonFiniteError, match="step 4: "):
        made.train()
    assert same(weights(made.roles.model), weights(two_steps.roles.model))
    again = trainer(tmp_path / "run", **settings)
    again.train(resume_from_checkpoint=True)
    skipped = [row["skipped_steps"] for row in logged(tmp_path / "run") if "skipped_steps" in row]
    assert skipped == [0, 0, 1, 1, 0, 0]
    assert not same(weights(again.roles.model), weights(two_steps.roles.model))


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


def test_a_copy_that_is_due_at_a_skipped_step_is_made(tmp_path: Path) -> None:
    """And not a whole period later: the policy as step 1 left it is the anchor of step 3."""
    made = trainer(tmp_path, objective="bond", n=2, max_steps=2, anchor="periodic", anchor_update_every=2)
    before = {name: tensor.clone() for name, tensor in made.anchor.state_dict().items()}
    Spoiled(made, {2})
    made.train()
    policy, anchor = weights(made.roles.model), made.anchor.state_dict()
    kept = [name for name in anchor if "lm_head" not in name]  # which the fault has spoiled
    assert all(torch.equal(policy[name], anchor[name]) for name in kept)
    assert any(not torch.equal(before[name], anchor[name]) for name in kept)


def test_a_gradient_that_is_not_finite_is_found_even_if_the_loss_is(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1)
    before = weights(made.roles.model)
    name, parameter = next((n, p) for n, p in made.roles.model.named_parameters() if "q_proj" in n)
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    made.train()
    assert name in before
    assert same(weights(made.roles.model), before)
    assert logged(tmp_path)[0]["skipped_steps"] == 1


@pytest.mark.parametrize("prompts", [1, 4])
def test_a_step_that_is_not_finite_leaves_the_intervals_other_numbers_alone(prompts: int, tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=3, logging_steps=3, per_device_train_batch_size=prompts)
    Spoiled(made, {2})
    made.train()
    (row,) = (row for row in logged(tmp_path) if "loss" in row)
    assert row["skipped_steps"] == pytest.approx(1 / 3)
    undefined = {name for name, value in row.items() if value is None}
    assert undefined == ({"rewards/low_ids/std"} if prompts == 1 else set())  # one sample per step has no spread
