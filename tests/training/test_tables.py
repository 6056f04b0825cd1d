"""What loggers are given of a step's samples, and the mean and spread of one reward."""

import math
import sys
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from bondlm.training.clock import StepMeans
from bondlm.training.metrics import record_reward
from bondlm.training.processes import World
from bondlm.training.tables import TablesCallback, as_markdown, table_of

ALONE = World(size=1, rank=0, device=torch.device("cpu"))
SAMPLES = [
    {
        "prompt": [{"role": "user", "content": "a | b"}],
        "policy": [{"text": "one\ntwo", "reward": 0.5, "extra": {"words": 2}}],
        "anchor": [{"text": "three", "reward": -1.0}, {"text": "", "reward": 2.0, "extra": {"kind": "empty"}}],
    }
]


def test_a_table_has_a_row_for_each_completion_and_a_column_for_each_extra() -> None:
    columns, rows = table_of(SAMPLES, 7)
    assert columns == ["step", "prompt", "from", "completion", "reward", "kind", "words"]
    assert rows == [
        [7, "user: a | b", "policy", "one\ntwo", 0.5, None, 2],
        [7, "user: a | b", "anchor", "three", -1.0, None, None],
        [7, "user: a | b", "anchor", "", 2.0, "empty", None],
    ]


def test_what_a_cell_holds_does_not_break_the_table() -> None:
    lines = as_markdown(*table_of(SAMPLES, 7)).splitlines()
    assert len(lines) == 2 + 3
    assert {line.replace("\\|", "").count("|") for line in lines} == {8}


def test_a_rewards_mean_and_spread_leave_out_prompts_that_it_does_not_apply_to() -> None:
    means, world = StepMeans(), ALONE
    record_reward("r", torch.tensor([[1.0, 2.0], [math.nan, math.nan], [4.0, 9.0]]), means)
    assert means.drain(world) == pytest.approx(
        {"rewards/r/mean": 4.0, "rewards/r/std": float(torch.tensor([1.0, 2.0, 4.0, 9.0]).std())}
    )


def test_a_reward_that_applies_to_no_prompt_of_a_step_changes_no_mean() -> None:
    means, world = StepMeans(), ALONE
    record_reward("r", torch.tensor([[1.0, 3.0]]), means)
    record_reward("r", torch.full((2, 2), math.nan), means)
    assert means.drain(world)["rewards/r/mean"] == 2.0


def test_trackio_gets_a_table_per_logged_step_while_a_run_of_its_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []
    current: ContextVar[Any] = ContextVar("current_run", default="run")
    trackio = SimpleNamespace(
        context_vars=SimpleNamespace(current_run=current),
        Table=lambda dataframe: dataframe.to_dict(orient="records"),
        log=sent.append,
    )
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    folder, handler = SimpleNamespace(samples=lambda: SAMPLES), SimpleNamespace(callbacks=[])
    tables = TablesCallback(cast(Any, folder), handler)
    args, state = SimpleNamespace(report_to=["trackio"]), SimpleNamespace(is_world_process_zero=True, global_step=7)
    tables.on_log(args, state, None, {"loss": 1.0})
    current.set(None)
    tables.on_log(args, state, None, {"loss": 1.0})
    columns, rows = table_of(SAMPLES, 7)
    assert sent == [
        {"completions": [dict(zip(columns, row, strict=True)) for row in rows], "train/global_step": 7},
    ]
