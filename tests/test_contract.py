"""What users and documents rely on does not change by accident: public names, settings, metrics."""

import dataclasses
import inspect
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from frozen import (
    BESTOFN,
    CONFIG_FIELDS,
    EVAL_METRICS,
    FROM_TRANSFORMERS,
    NOISE_METRICS,
    OTHER_OBJECTIVES_METRICS,
    SOME_REWARDS_METRICS,
    TRAIN_METRICS,
    TRAINER_ARGUMENTS,
)
from tiny import prompt_rows, tiny_causal, tiny_tokenizer
from transformers import TrainingArguments

import bondlm
import bondlm.bestofn
from bondlm import BONDConfig, BONDTrainer
from bondlm.errors import ConfigError, RewardError
from bondlm.rewards.extras import Extras

ROOT = Path(__file__).parent.parent


def test_public_names() -> None:
    assert set(bondlm.__all__) == {"BONDConfig", "BONDTrainer", "__version__"}
    assert set(bondlm.bestofn.__all__) == BESTOFN
    for module in (bondlm, bondlm.bestofn):
        for name in module.__all__:
            assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'BONDtrainer'"):
        _ = bondlm.BONDtrainer


def test_config_fields() -> None:
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {name: field for name, field in vars(BONDConfig)["__dataclass_fields__"].items() if name not in inherited}
    assert set(own) == CONFIG_FIELDS
    assert all(field.metadata.get("help") for field in own.values())


def test_constructor_arguments_are_trls() -> None:
    names = list(inspect.signature(BONDTrainer).parameters)
    assert names == [*TRAINER_ARGUMENTS, "others"]
    for name in ("tools", "rollout_func", "environment_factory"):
        with pytest.raises(ConfigError, match=f"^{name}="):
            BONDTrainer("no model", **{name: print})  # type: ignore[arg-type]


def length(completions: list[str]) -> list[float]:
    return [float(len(completion)) for completion in completions]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two steps with an evaluation log."""
    tokenizer = tiny_tokenizer()
    args = BONDConfig(
        output_dir=str(tmp_path_factory.mktemp("run")),
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        max_completion_length=4,
        warmup_steps=0,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = prompt_rows(6)
    trainer = BONDTrainer(
        tiny_causal(tokenizer), length, args, train_dataset=rows[:4], eval_dataset=rows[4:], processing_class=tokenizer
    )
    trainer.train()
    history: list[dict[str, Any]] = trainer.state.log_history
    return history


def test_metric_names(logged: list[dict[str, Any]]) -> None:
    first, second, evaluation = logged[:3]
    train = {name.replace("rewards/length/", "rewards/<name>/") for name in first}
    assert train == {name.replace("rewards/length/", "rewards/<name>/") for name in second}
    assert train - FROM_TRANSFORMERS - {"step"} == TRAIN_METRICS
    assert set(evaluation) - FROM_TRANSFORMERS - {"step"} == EVAL_METRICS


def test_step_time_is_the_sum_of_the_phases(logged: list[dict[str, Any]]) -> None:
    """Whether that is the time that passed, a wall clock says (trainer/test_time_and_tokens.py)."""
    for row in logged[:2]:
        phases = [value for name, value in row.items() if name.startswith("time/")]
        assert all(value >= 0 for value in phases)
        assert row["step_time"] == pytest.approx(sum(phases), rel=1e-6)
    assert sum(row["step_time"] for row in logged[:2]) <= logged[-1]["train_runtime"] + 0.01


def documented_metrics() -> set[str]:
    """Names in the first column of the tables of docs/metrics.md; `a/b`, `/c` is short for `a/b`, `a/c`."""
    names: set[str] = set()
    for line in (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").splitlines():
        cells = line.split("|")
        found = re.findall(r"`([^`]+)`", cells[1]) if line.startswith("|") else []
        for name in found:
            names.add(found[0].rsplit("/", 1)[0] + name if name.startswith("/") else name)
    return names


def test_a_reward_logs_nothing_under_the_name_of_a_runs_metric() -> None:
    """They would be averaged together; what judges log is by `log_metric` itself."""
    log = Extras(1).offered["log_metric"]
    of_evaluations = {name.removeprefix("eval_") for name in EVAL_METRICS}
    for name in TRAIN_METRICS | OTHER_OBJECTIVES_METRICS | NOISE_METRICS | EVAL_METRICS | of_evaluations:
        with pytest.raises(RewardError, match=f"log_metric.'{name}'.: bondlm's own metrics have names like this"):
            log(name, 1.0)
    for name in ("accuracy", "rewards/length", "step_reward", "judges/m/agreement"):
        log(name, 1.0)


def test_every_metric_is_documented_and_no_other() -> None:
    names = documented_metrics()
    logged_names = (
        TRAIN_METRICS
        | OTHER_OBJECTIVES_METRICS
        | SOME_REWARDS_METRICS
        | NOISE_METRICS
        | {name.removesuffix("_low").removesuffix("_high") for name in EVAL_METRICS}
    )
    assert {name for name in logged_names if not any(fnmatch(name, pattern) for pattern in names)} == set()
    assert {pattern for pattern in names if not any(fnmatch(name, pattern) for name in logged_names)} == set()
