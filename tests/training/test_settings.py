"""A run that goes on in Python has the settings that it was begun with, or says which are others."""

import json
import linecache
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import prompt_rows
from trainer.helpers import config, lora, low_ids, same, trainer

from bondlm import BONDTrainer
from bondlm.config import changed_settings
from bondlm.config.given import own_copy
from bondlm.errors import ConfigError
from bondlm.training.settings import as_on_file, spell_alike


def run(folder: Path, *, adapter: Any = None, **settings: Any) -> BONDTrainer:
    small = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1} | settings
    return trainer(folder, peft_config=adapter, **small)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


NEVER: dict[str, Any] = {"learning_rate": 0.5, "weight_decay": 0.1, "optim": "sgd", "adam_beta1": 0.5}
ON_DEMAND: dict[str, Any] = {
    "objective": "rloo",
    "gamma": 0.7,
    "seed": 7,
    "lr_scheduler_type": "linear",
    "max_completion_length": 4,
}


def test_changed_settings_are_refused_before_a_step(tmp_path: Path) -> None:
    run(tmp_path).train()
    before = files(tmp_path)
    for name, value in (NEVER | ON_DEMAND).items():
        changed = {name: value, "max_steps": 3}
        with pytest.raises(ConfigError, match=rf"\b{name}: .* -> {value!r}") as refused:
            run(tmp_path, **changed).train(resume_from_checkpoint=True)
        assert ("allow_config_change=True" in str(refused.value)) is (name in ON_DEMAND)
        if name in NEVER:
            with pytest.raises(ConfigError, match=f"{name} cannot change"):
                run(tmp_path, **changed).train(resume_from_checkpoint=True, allow_config_change=True)
    assert {k: v for k, v in files(tmp_path).items() if k != "prompting.json"} == {
        k: v for k, v in before.items() if k != "prompting.json"
    }


def test_a_default_that_is_spelled_out_is_no_change(tmp_path: Path) -> None:
    run(tmp_path, learning_rate=None).train()
    spelled = {"learning_rate": 3e-6, "anchor": "ema", "average_weights": 0.0, "logging_first_step": True}
    longer = run(tmp_path, max_steps=3, **spelled)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 3


def test_settings_made_from_others_are_those_that_were_given(tmp_path: Path) -> None:
    """`dataclasses.replace` passes on what became of the defaults."""
    first = config(tmp_path, max_steps=1)
    longer = replace(first, max_steps=2)
    given = ("anchor", "average_weights")  # they depend on others, and are compared as they hold
    assert longer.given.keys() - first.given.keys() <= {*given}
    best = {"metric_for_best_model": "kl", "eval_strategy": "steps", "eval_steps": 1}
    config(
        tmp_path,
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=1,
        **best | {"metric_for_best_model": "reward"},
    )
    assert config(tmp_path, greater_is_better=True, **best).given["greater_is_better"] is True


def test_what_turns_the_default_average_off_is_refused(tmp_path: Path) -> None:
    """An averaged run went on without its average."""
    averaged: dict[str, Any] = {"objective": "self_bond", "n": 2, "num_samples": 4, "lr_scheduler_type": "constant"}
    evaluated: dict[str, Any] = {"eval_dataset": prompt_rows(2), "eval_strategy": "steps", "eval_steps": 1}
    assert run(tmp_path, **averaged).train() is not None
    best = {"save_strategy": "best", "metric_for_best_model": "eval_win_rate", "max_steps": 3}
    with pytest.raises(ConfigError, match=r"average_weights cannot change.*-> 0.0"):
        run(tmp_path, **averaged, **evaluated, **best).train(resume_from_checkpoint=True, allow_config_change=True)


def test_settings_set_as_attributes_count(tmp_path: Path) -> None:
    args = config(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    args.learning_rate = 0.5
    assert own_copy(args).given["learning_rate"] == 0.5
    args.objective, args.eta = "self_bond", 0.02
    assert (own_copy(args).anchor, own_copy(args).average_weights) == ("fixed", pytest.approx(1 / 3))
    args.bf16 = True
    assert own_copy(args).mixed_precision == "bf16"  # which transformers derives from it
    made = run(tmp_path)
    made.args.copied_from.max_steps = 1
    with pytest.raises(ConfigError, match=r"max_steps=1 was set after.*trainer.args.max_steps"):
        made.train()
    made.args.copied_from.max_steps = made.args.max_steps
    made.args.max_steps = 1
    made.train()
    assert made.state.global_step == 1


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("missing_eos", "dropp", "missing_eos='dropp': choose one of"),
        ("eta", 7.0, "eta=7.0: must lie in"),
        ("beta_rl", 0.1, "beta_rl=0.1: objective='jbond' does not use it"),
        ("load_best_model_at_end", True, "needs metric_for_best_model"),
        ("temperature", 0.5, "temperature=0.5: completions are drawn from the model's own distribution"),
        ("lerning_rate", 1.0, "unknown setting 'lerning_rate' .did you mean 'learning_rate'"),
    ],
)
def test_settings_set_as_attributes_are_checked_as_if_they_were_given(
    tmp_path: Path, name: str, value: Any, said: str
) -> None:
    args = config(tmp_path)
    args.note, args.model_name = "a user's own", "another"  # which is a little like `label_names`
    setattr(args, name, value)
    with pytest.raises(ConfigError, match=said):
        BONDTrainer(model="unread", args=args, train_dataset=prompt_rows(4), reward_funcs=low_ids)
    delattr(args, name) if name not in args.settled else setattr(args, name, args.settled[name])
    assert own_copy(args).given == args.given


def test_what_may_change_does_and_a_change_that_is_allowed_is_on_file(tmp_path: Path) -> None:
    run(tmp_path).train()
    run(tmp_path, max_steps=3, save_steps=2, disable_tqdm=False).train(resume_from_checkpoint=True)
    assert json.loads((tmp_path / "env.json").read_text())["config_changes"] == []
    changed = run(tmp_path, max_steps=4, gamma=0.7)
    changed.train(resume_from_checkpoint=True, allow_config_change=True)
    assert changed.state.global_step == 4
    assert json.loads((tmp_path / "env.json").read_text())["config_changes"] == ["gamma: None -> 0.7"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["gamma"] == 0.7
    run(tmp_path, max_steps=5, gamma=0.7).train(resume_from_checkpoint=True)


def test_an_edited_reward_is_seen(tmp_path: Path) -> None:
    """Of a function that is given as an object, by its source."""

    def reward_of(code: str) -> Any:
        file = tmp_path / "rewards.py"
        file.write_text(f"from trainer.helpers import low_ids\n\ndef mine(completion_ids):\n    {code}\n")
        linecache.checkcache(str(file))
        namespace: dict[str, Any] = {"__name__": "rewards"}
        exec(compile(file.read_text(), str(file), "exec"), namespace)
        return namespace["mine"]

    first, other = "return low_ids(completion_ids)", "return [-x for x in low_ids(completion_ids)]"
    run(tmp_path / "run", reward=reward_of(other)).train()
    (tmp_path / "run" / "env.json").unlink()  # as of an earlier version: from here on it is known
    run(tmp_path / "run", reward=reward_of(first), max_steps=3).train(resume_from_checkpoint=True)
    changed = {"reward": reward_of(other), "max_steps": 4}
    with pytest.raises(ConfigError, match=r"reward_funcs: rewards\.mine has been edited"):
        run(tmp_path / "run", **changed).train(resume_from_checkpoint=True)
    run(tmp_path / "run", **changed).train(resume_from_checkpoint=True, allow_config_change=True)
    run(tmp_path / "run", **changed | {"max_steps": 5}).train(resume_from_checkpoint=True)


ADAPTERS: dict[str, tuple[dict[str, Any] | None, str, bool]] = {
    "rank": ({"r": 8}, r"peft_config\.r: 4 -> 8", False),
    "layers": ({"target_modules": ["q_proj"]}, r"peft_config\.target_modules: ", False),
    "scale": ({"use_rslora": True}, r"peft_config\.use_rslora: False -> True", False),
    "alpha": ({"lora_alpha": 64}, r"peft_config\.lora_alpha: 8 -> 64", True),
    "none": (None, "use_peft: True -> False", False),
}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapted") / "run"
    run(folder, adapter=lora()).train()
    return folder


@pytest.mark.parametrize("case", ADAPTERS)
def test_another_adapter_is_refused(case: str, adapted: Path) -> None:
    """With another alpha what was learned would have another strength; of another rank it does not fit."""
    change, message, may_change = ADAPTERS[case]
    made = run(adapted, adapter=None if change is None else lora(**change), max_steps=3)
    with pytest.raises(ConfigError, match=message) as refused:
        made.train(resume_from_checkpoint=True)
    assert ("allow_config_change=True" in str(refused.value)) is may_change


def test_the_adapter_is_compared_where_no_settings_are_on_file(adapted: Path, tmp_path: Path) -> None:
    """And where another folder goes on from a checkpoint."""
    (adapted / "config.yaml").rename(tmp_path / "kept.yaml")
    made = run(tmp_path / "other", adapter=lora(lora_alpha=64), max_steps=3)
    with pytest.raises(ConfigError, match=rf"^{adapted} .*lora_alpha: 8 -> 64"):
        made.train(resume_from_checkpoint=str(adapted / "checkpoint-2"))
    (tmp_path / "kept.yaml").rename(adapted / "config.yaml")
    made.train(resume_from_checkpoint=str(adapted / "checkpoint-2"), allow_config_change=True)
    assert made.state.global_step == 3


def test_a_refused_resume_leaves_no_anchor_for_the_next_call(tmp_path: Path) -> None:
    run(tmp_path / "one", adapter=lora()).train()
    made = run(tmp_path / "two", adapter=lora(), gamma=0.7, max_steps=0)
    fresh = {name: tensor.clone() for name, tensor in made.anchor.state_dict().items()}
    with pytest.raises(ConfigError, match="gamma"):
        made.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    made.train()
    assert same(made.anchor.state_dict(), fresh)


def test_objects_without_a_name_are_the_same_in_every_process() -> None:
    one, other = (as_on_file({"accelerator_config": {"x": object()}, "hub_token": "secret"}) for _ in range(2))
    assert one == other == {"accelerator_config": {"x": "object"}}


def test_a_run_of_the_command_goes_on_in_python_and_keeps_what_that_cannot_name(tmp_path: Path) -> None:
    run(tmp_path).train()
    options = yaml.safe_load((tmp_path / "config.yaml").read_text())
    options |= {"preset": "paper", "judges": "judge.py:small", "beta": 0.5, "train_dataset": "data.jsonl"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    run(tmp_path, max_steps=3).train(resume_from_checkpoint=True)
    now = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert {name: now.get(name) for name in ("preset", "judges", "train_dataset", "max_steps")} == {
        **{name: options[name] for name in ("preset", "judges", "train_dataset")},
        "max_steps": 3,
    }
    assert re.match("# written by BONDTrainer", (tmp_path / "config.yaml").read_text())


def test_names_that_mean_the_same_file_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command's are relative, and Python writes them whole."""
    (tmp_path / "reward.py").touch()
    (tmp_path / "m").mkdir()
    (tmp_path / "env.json").write_text(json.dumps({"directory": str(tmp_path)}))
    monkeypatch.chdir(tmp_path)
    held = {"model": str(tmp_path / "m"), "reward_funcs": [f"{tmp_path}/reward.py:f"], "beta": 0.5}
    asked: dict[str, Any] = {"model": "m", "reward_funcs": "reward.py:f", "beta": 0.5}
    spell_alike(held, asked, tmp_path)
    assert held == asked
    # Python also writes what a command leaves out.
    assert changed_settings(held | {"use_peft": False}, asked, tmp_path, allowed=False) == []
    other: dict[str, Any] = {"model": "m", "reward_funcs": "reward.py:g"}
    spell_alike(held, other, tmp_path)
    assert held["model"] == other["model"]
    assert other["reward_funcs"] == "reward.py:g"  # said as it was written
