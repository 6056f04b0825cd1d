"""Rows R of the fault matrix: rewards that lie, fail or are out of reach; servers: test_rewards_server.py."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.helpers import write_job
from rewards.reward_stub import good, serving, status
from rewards.small_models import bert_classifier, bert_tokenizer, saved
from safetensors.torch import load_file, save_file
from tiny import prompt_rows
from trainer.helpers import logged, low_ids, same, trainer, weights
from transformers import TrainerControl, TrainerState

from bondlm.cli import main
from bondlm.errors import RewardError, RewardOutageError
from bondlm.objectives import JBOND
from bondlm.rewards import NamedReward, SequenceClassifierReward, score
from bondlm.rollout.samples import Samples
from bondlm.rollout.seeds import Seeds
from bondlm.runs.folder import DROPPED_FILE
from bondlm.training.dropped import DropBudget
from bondlm.training.notices import TiesCallback
from faults.children import job, said, train


def word_sums(prompts: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(ids) / 100 for ids in completion_ids]


class FailsFor:
    """`word_sums`, but `value` for one prompt."""

    __name__ = "fails"

    def __init__(self, prompt: str, value: Any) -> None:
        self._prompt, self._value = prompt, value

    def __call__(self, prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[Any]:
        good = word_sums(prompts, completion_ids)
        return [self._value if p == self._prompt else r for p, r in zip(prompts, good, strict=True)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "good"], ids=str)
def test_r1_a_bad_reward_drops_its_prompt_whole_and_the_rest_learn_as_if_it_were_not_there(
    value: Any, tmp_path: Path
) -> None:
    """Equal to the gradient of the prompts that remain: loss, baseline and divisor know nothing of the dropped one."""
    prompt = prompt_rows(4)[1]["prompt"]
    settings: dict[str, Any] = {"rows": 4, "max_steps": 1, "optim": "sgd"}  # Adam's first step knows signs alone
    broken = trainer(tmp_path / "broken", reward=FailsFor(prompt, value), **settings)
    broken.train()
    (row,) = [json.loads(line) for line in (tmp_path / "broken" / DROPPED_FILE).read_bytes().splitlines()]
    said_of_broken = logged(tmp_path / "broken")[0]
    assert (row["step"], row["prompt"]) == (1, prompt)
    assert "reward 'fails'" in row["reason"]

    fewer = trainer(tmp_path / "fewer", reward=word_sums, per_device_train_batch_size=3, **settings)
    data: Any = fewer.train_dataset
    before = {name: tensor.clone() for name, tensor in weights(fewer.roles.model).items()}
    fewer.train_dataset = data.filter(lambda row: row["prompt"] != prompt)
    fewer.train()
    after, expected = weights(broken.roles.model), weights(fewer.roles.model)
    assert not same(before, expected)
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
    said_of_fewer = logged(tmp_path / "fewer")[0]
    for name in ("reward", "reward_std", "anchor/reward", "bond/advantage", "bond/forward_loss", "bond/penalty_rate"):
        assert said_of_broken[name] == pytest.approx(said_of_fewer[name], abs=1e-5), name


def test_r1_a_row_that_a_reward_model_cannot_score_drops_its_prompt(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer(max_length=14)
    limited = SequenceClassifierReward(bert_classifier(tokenizer), tokenizer)
    rows = prompt_rows(8)
    rows[5]["prompt"] = "rain " * 12  # by itself it has room
    made = trainer(tmp_path, reward=limited, train_dataset=rows, max_steps=2, max_skipped_frac=0.2)
    made.train()
    (dropped,) = [json.loads(line) for line in (tmp_path / DROPPED_FILE).read_text().splitlines()]
    assert dropped["prompt"] == rows[5]["prompt"]
    assert "takes 14 tokens" in dropped["reason"]


def test_r1_too_many_dropped_prompts_end_the_run_before_the_update(tmp_path: Path) -> None:
    bad = {row["prompt"] for row in prompt_rows(8)[::2]}

    def half_bad(prompts: list[str], **columns: Any) -> list[float]:
        return [float("nan") if p in bad else 1.0 for p in prompts]

    made = trainer(tmp_path, reward=half_bad, rows=8, max_steps=4, max_skipped_frac=0.2)
    with pytest.raises(RewardError, match=r"max_skipped_frac=0\.2.*half_bad"):
        made.train()
    rows = [json.loads(line) for line in (tmp_path / DROPPED_FILE).read_bytes().splitlines()]
    assert {row["prompt"] for row in rows} <= bad
    assert len(rows) >= 2
    assert made.state.global_step == rows[-1]["step"] - 1


def test_r1_without_a_budget_the_first_bad_reward_ends_the_run(tmp_path: Path) -> None:
    bad = FailsFor(prompt_rows(4)[1]["prompt"], None)
    with pytest.raises(RewardError, match="1 of 4 "):
        trainer(tmp_path, reward=bad, rows=4, max_steps=1, max_skipped_frac=0.0).train()


def test_r1_a_step_that_loses_all_its_prompts_is_skipped(tmp_path: Path) -> None:
    bad = prompt_rows(3)[1]["prompt"]
    made = trainer(
        tmp_path,
        reward=FailsFor(bad, None),
        **{"rows": 3, "max_steps": 3, "per_device_train_batch_size": 1, "max_skipped_frac": 0.5},
    )
    steps: list[tuple[bool, bool]] = []
    states = [weights(made.roles.model)]
    note, update = made.drops.note, made.anchor.update

    def noting(rows: Any, *args: Any) -> Any:
        states.append(weights(made.roles.model))
        steps.append((rows[0]["prompt"] == bad, False))
        return note(rows, *args)

    def updating(step: int) -> Any:
        steps[-1] = (steps[-1][0], True)
        return update(step)

    made.drops.note, made.anchor.update = noting, updating  # type: ignore[method-assign]
    made.train()
    states.append(weights(made.roles.model))
    assert made.state.global_step == 3
    assert sorted(steps) == [(False, True), (False, True), (True, False)]
    assert [same(*pair) for pair in pairwise(states[1:])] == [is_bad for is_bad, _ in steps]
    rows = logged(tmp_path)[:3]
    assert [row["bond/frac_dropped"] for row in rows] == [float(is_bad) for is_bad, _ in steps]
    assert [row["skipped_steps"] for row in rows] == [float(is_bad) for is_bad, _ in steps]


class Ranks:
    """An accelerator of two processes, of which the other reports what it is told."""

    device = "cpu"

    def __init__(self, *others: list[int]) -> None:
        self._others = list(others)

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.tensor([self._others.pop(0)]), mine])

    def gather_objects(self, mine: list[Any]) -> list[Any]:
        return mine


def dropping(count: int) -> Samples:
    empty = torch.zeros(4, 0)
    numbers = {f"{name}_PM": empty for name in ("rewards", "lengths", "finished", "logprobs")}
    return Samples(prompts=["5"] * 4, texts=[], dropped={i: "why" for i in range(count)}, **numbers)


def test_r1_the_budget_is_that_of_all_processes_and_of_the_whole_run(tmp_path: Path) -> None:
    """3 of 16 prompts are within a quarter; so are 4; 7 of 24 are not, although this process dropped only one."""
    rows, all_real = prompt_rows(4), torch.ones(4, dtype=torch.bool)
    budget = DropBudget(0.25, tmp_path)
    ranks = Ranks([4, 0, 0], [4, 3, 0], [4, 2, 0])
    assert budget.note(rows, dropping(0), 1, all_real, ranks) == {"bond/frac_dropped": 0.0}
    assert budget.note(rows, dropping(1), 2, all_real, ranks) == {"bond/frac_dropped": 0.5}
    assert (budget.seen, budget.dropped) == (16, 4)
    with pytest.raises(RewardError, match=r"step 3: .*3 of 8 prompts.*7 of 24 ") as caught:
        budget.note(rows, dropping(1), 3, all_real, ranks)
    assert caught.value.known_to_all
    assert budget.summary()[0].startswith("dropped: 4 of 16 prompts")  # the run takes step 3 again
    # A checkpoint knows how many it saw, however short the step that comes next.
    known = DropBudget(0.25, tmp_path)
    known.load_state({"seen": 800, "dropped": 150, "left_out": 3})
    known.note(rows[:1], dropping(1), 101, all_real[:1], Ranks([1, 1, 0]))
    assert known.state() == {"seen": 802, "dropped": 152, "left_out": 3}
    alone = DropBudget(0.25, tmp_path / "empty")
    alone.note(rows, dropping(1), 1, all_real, Ranks([4, 0, 0]))
    assert (alone.seen, alone.dropped) == (8, 1)


def test_r1_one_prompt_may_fail_however_short_the_run(tmp_path: Path) -> None:
    """1% of 4 prompts is nothing, and one odd prompt should not cost a run."""
    made = trainer(tmp_path, reward=FailsFor(prompt_rows(4)[0]["prompt"], None), rows=4, max_steps=1)
    made.train()
    assert made.drops.summary() == [f"dropped: 1 of 4 prompts, whose reward failed ({tmp_path / DROPPED_FILE})"]
    with pytest.raises(RewardError, match="2 of 8 "):
        trainer(tmp_path / "b", reward=FailsFor(prompt_rows(4)[0]["prompt"], None), rows=4, max_steps=2).train()


def test_r1_a_run_says_at_its_end_what_it_dropped(tmp_path: Path) -> None:
    config = job(tmp_path / "run", reward_funcs=f"{tmp_path / 'run' / 'reward.py'}:picky", eval_dataset=None)
    with (config.parent / "reward.py").open("a") as file:
        file.write(
            "def picky(prompts, completions):\n"
            "    good = letters(prompts, completions)\n"
            "    return [None if 'egg' in p[-1]['content'] else r for p, r in zip(prompts, good)]\n"
        )
    assert train(config) == 0, said(config)
    assert "dropped: 1 of 12 prompts" in said(config)


SHAPES: dict[str, tuple[Any, bool]] = {
    "(B, 1)": (torch.tensor([[1.0], [2.0], [3.0]]), True),
    "with gradient": (torch.tensor([1.0, 2.0, 3.0], requires_grad=True) * 1, True),
    "integers": (torch.tensor([1, 2, 3]), True),
    "one number": (1.0, False),
    "0-dim": (torch.tensor(1.0), False),
    "(1,)": (torch.tensor([1.0]), False),
    "(1, B)": (torch.tensor([[1.0, 2.0, 3.0]]), False),
    "(B, 2)": (torch.ones(3, 2), False),
    "too many": ([1.0, 2.0, 3.0, 4.0], False),
    "a range": (range(1, 4), True),
    "None": (None, False),
}


@pytest.mark.parametrize(("answer", "is_good"), SHAPES.values(), ids=SHAPES.keys())
def test_r2_other_shapes_are_made_right_or_refused_and_never_broadcast(answer: Any, is_good: bool) -> None:
    reward = NamedReward("r", lambda completions: answer)
    for allow in (False, True):  # a wrong count is no bad row: nobody knows whose values these are
        if is_good:
            scores = score([reward], ["p"] * 3, ["a"] * 3, allow_bad_rows=allow)
            assert scores.total.tolist() == [1.0, 2.0, 3.0]
            assert not scores.total.requires_grad
        else:
            with pytest.raises(RewardError, match="reward 'r'"):
                score([reward], ["p"] * 3, ["a"] * 3, allow_bad_rows=allow)


def test_r4_a_constant_reward_gives_no_backward_signal() -> None:
    objective = JBOND()
    for seed in range(20):
        selection = objective.select(torch.ones(5, 3, dtype=torch.float64), Seeds(seed, 1).tie_noise(range(5), 3))
        assert not selection.signal_PC.any()


def test_r4_fifty_steps_of_a_constant_reward_stay_at_the_anchor_and_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What remains is fine-tuning on samples of the anchor, noise without direction: its KL stays about 0."""
    made = trainer(
        tmp_path,
        reward=lambda completions: [0.5] * len(completions),
        **{"max_steps": 50, "per_device_train_batch_size": 8, "learning_rate": 1e-4},
    )
    made.train()
    rows = logged(tmp_path)[:50]
    assert {row["bond/penalty_rate"] for row in rows} == {0.0}
    assert {row["bond/frac_tied"] for row in rows} == {1.0}
    assert {row["reward_std"] for row in rows} == {0.0}
    assert abs(sum(row["anchor/kl"] for row in rows) / 50) < 0.01
    warned = [record.getMessage() for record in caplog.records if "equal rewards" in record.getMessage()]
    assert len(warned) == 1
    assert warned[0].startswith("step 10: 100% of the pairs of a prompt's samples")


def steps_warned(
    tied: Callable[[int], float],
    caplog: pytest.LogCaptureFixture,
    *,
    every: int = 1,
    n: int = 5000,
    more: dict[str, float] | None = None,
) -> Any:
    watch, control = TiesCallback(), TrainerControl()
    watch.on_train_begin(None, TrainerState(global_step=0), control)
    caplog.clear()
    for step in range(every, n + 1, every):
        state = TrainerState(global_step=step, is_world_process_zero=True)
        watch.on_log(None, state, control, {"loss": 1.0, "bond/frac_tied": tied(step)} | (more or {}))
        watch.on_log(None, state, control, {"eval_reward": 1.0})
    return [int(record.getMessage().split(":")[0].removeprefix("step ")) for record in caplog.records]


def test_r4_the_warning_wants_steps_in_a_row_and_is_rare(caplog: pytest.LogCaptureFixture) -> None:
    assert steps_warned(lambda step: 1.0, caplog) == [10, 100, 1000]
    assert steps_warned(lambda step: 1.0, caplog, every=25) == [25, 250, 2500]
    assert steps_warned(lambda step: 0.2, caplog) == []
    assert steps_warned(lambda step: 0.21, caplog) == [10, 100, 1000]
    assert steps_warned(lambda step: float("nan"), caplog) == []
    assert steps_warned(lambda step: float(step % 10 > 0), caplog) == []  # never ten in a row
    assert steps_warned(lambda step: float(step % 20 > 0), caplog) == [10]  # ten often, a hundred never
    # self_bond learns from ties: only prompts all of whose samples tie count
    assert steps_warned(lambda step: 1.0, caplog, more={"bond/frac_no_signal": 0.5}) == []
    assert steps_warned(lambda step: 1.0, caplog, more={"bond/frac_no_signal": 0.6}) == [10, 100, 1000]
    others = TiesCallback()
    caplog.clear()
    for step in range(1, 50):
        others.on_log(None, TrainerState(global_step=step, is_world_process_zero=False), None, {"bond/frac_tied": 1.0})
    assert caplog.records == []


def test_r5_winners_of_ties_have_no_favourite_place() -> None:
    """Chi-square over 4,000 draws: 10.8 is passed once in a thousand with one degree of freedom."""
    objective, winners = JBOND(), Counter[int]()
    for step in range(4):
        selection = objective.select(
            torch.zeros(1000, 3, dtype=torch.float64), Seeds(0, step).tie_noise(range(1000), 3)
        )
        winners.update(selection.rows_PL[:, 1].tolist())
    assert set(winners) == {1, 2}
    assert sum((count - 2000) ** 2 / 2000 for count in winners.values()) < 10.8


def test_r6_a_reward_that_raises_ends_the_run_with_code_4_and_its_traceback(tmp_path: Path) -> None:
    config = job(tmp_path / "run", reward_funcs=f"{tmp_path / 'run' / 'reward.py'}:raising")
    assert train(config) == 4
    trace, error = said(config).rsplit("bondlm: error:", 1)
    assert f'{tmp_path / "run" / "reward.py"}", line' in trace
    assert "in raising" in trace
    assert "KeyError: 'no such answer'" in trace
    assert "reward 'raising'" in error


def test_r6_a_reward_that_raises_for_one_row_ends_the_run_too(tmp_path: Path) -> None:
    """Which row it was, only the function knows: it may catch its exception and return None for the row."""

    def raises_once(prompts: list[str]) -> list[float]:
        return [1 / prompt.count("e") if "egg" not in prompt else 1 / 0 for prompt in prompts]

    with pytest.raises(RewardError, match="ZeroDivisionError") as caught:
        trainer(tmp_path, reward=raises_once, rows=6, per_device_train_batch_size=6, max_steps=1).train()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_r8_an_outage_saves_and_ends_with_code_4_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """The server goes away after two steps: checkpoint 2 is there, and the resumed run equals one never disturbed."""
    with serving() as stub:
        settings: dict[str, Any] = {"reward_funcs": stub.url, "reward_outage_s": 0.2, "save_steps": 100}
        calm = job(tmp_path / "calm", **settings)
        assert train(calm) == 0, said(calm)
        config = job(tmp_path / "run", **settings)
        stub.requests.clear()
        stub.script, stub.otherwise = [good, good], status(503)
        assert train(config) == 4, said(config)
        assert "reward_outage_s" in said(config)
        assert (tmp_path / "run" / "run" / "checkpoint-2" / "manifest.json").is_file()
        stub.otherwise = good
        assert train(config) == 0, said(config)
    files = [folder / "run" / "adapter_model.safetensors" for folder in (tmp_path / "run", tmp_path / "calm")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_r8_an_outage_in_an_evaluation_saves_too(tmp_path: Path) -> None:
    with serving() as stub:
        made = trainer(
            tmp_path,
            reward=stub.url,
            **{"eval_dataset": prompt_rows(12)[10:], "eval_strategy": "steps", "eval_steps": 2},
            **{"max_steps": 4, "reward_outage_s": 0.2},
        )
        stub.script, stub.otherwise = [good, good], status(503)
        with pytest.raises(RewardOutageError, match="reward_outage_s"):
            made.train()
        assert made.state.global_step == 2
        assert (tmp_path / "checkpoint-2" / "manifest.json").is_file()
        with pytest.raises(RewardOutageError):  # outside training an evaluation has nothing to save
            made.evaluate()


def test_r11_a_reward_that_depends_on_its_neighbours_is_found_by_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_job(tmp_path)
    with (tmp_path / "reward.py").open("a") as file:
        file.write(
            "def padded(prompts, completions):\n"
            "    good = letters(prompts, completions)\n"
            "    return [r + 0.01 * len(good) for r in good]\n"
        )
    assert main(["check", "--config", str(config), "--reward_funcs", f"{tmp_path}/reward.py:padded"]) == 4
    assert "it depends on the rest of the batch" in " ".join(capsys.readouterr().err.split())
    assert main(["check", "--config", str(config)]) == 0


def test_r12_a_reward_model_without_a_trained_head_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "rm", bert_classifier(bert_tokenizer()), bert_tokenizer())
    tensors = load_file(f"{path}/model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, f"{path}/model.safetensors", metadata={"format": "pt"})
    config = write_job(tmp_path, reward_funcs=path)
    assert main(["train", "--config", str(config)]) == 2
    assert "classifier.weight" in capsys.readouterr().err


def test_r14_only_the_order_of_rewards_counts_and_clipping_makes_ties(tmp_path: Path) -> None:
    maps = {
        "plain": lambda r: r,
        "cubed": lambda r: (r - 0.3) ** 3,
        "large": lambda r: 1e6 * r - 5e5,
        "clipped": lambda r: min(r, 0.35),
    }
    results, ties = {}, {}
    for name, change in maps.items():
        folder = tmp_path / name
        made = trainer(
            folder,
            reward=lambda completion_ids, change=change: [change(r) for r in low_ids(completion_ids)],
        )
        made.train()
        results[name] = weights(made.roles.model)
        ties[name] = sum(row["bond/frac_tied"] for row in logged(folder)[:2]) / 2
    assert same(results["plain"], results["cubed"])
    assert same(results["plain"], results["large"])
    assert not same(results["plain"], results["clipped"])
    assert ties["clipped"] > ties["plain"] + 0.2
