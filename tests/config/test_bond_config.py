import math
from pathlib import Path
from typing import Any

import pytest

from bondlm import BONDConfig
from bondlm.config import DEFAULTS, OFF_POLICY, SETTINGS, objective_of
from bondlm.errors import BondError, ConfigError
from bondlm.objectives.make import OBJECTIVES


def config(tmp_path: Path, **settings: Any) -> BONDConfig:
    return BONDConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


REFUSED: list[tuple[str, Any]] = [
    ("objective", "dpo"),
    ("quantile", "exact"),
    ("quantile", "learned"),  # jbond has none
    ("quantile_learning_rate", 0.0),
    ("num_samples", 4),  # jbond draws one
    ("kl_budget", 0.0),
    ("max_skipped_steps", -1),
    ("save_total_limit", 1),
    ("anchor", "moving"),
    ("engine", "sglang"),
    ("log_quantile", "clamped"),  # of bond
    ("beta", -0.1),
    ("beta", 1.1),
    ("beta", math.nan),
    ("gamma", -1e-9),
    ("gamma", math.nan),
    ("gamma", math.inf),
    ("gamma_ref", -0.1),
    ("gamma_ref", math.nan),
    ("eta", -0.1),
    ("eta", 1.5),
    ("eta", math.nan),
    ("n", 1),
    ("n", 4),
    ("correction", True),  # of bond
    ("beta_rl", -1),
    ("alpha", 9),
    ("target_n", 2.0),  # eval_strategy is 'no' by default
    ("kl_budget", 1.0),
    ("num_anchor_samples", 1),
    ("anchor_update_every", 0),
    ("max_completion_length", 0),
    ("max_prompt_length", 0),
    ("max_rows", 0),
    ("pad_to_multiple_of", 0),
    ("max_tokens_per_micro_batch", 0),
    ("max_completion_length", 2.5),  # what is counted is whole
    ("max_rows", 8.0),
    ("max_steps", 1e3),
    ("eval_num_samples", 0),
    ("eval_num_reference_samples", 1),
    ("target_n", 1.0),
    ("target_n", math.nan),
    ("target_n", 16.5),
    ("dtype", "float16"),
    ("num_logged_samples", -1),
    ("average_weights", -0.1),
    ("average_weights", 1.5),
    ("average_weights", math.nan),
    ("learning_rate", -1e-4),
    ("learning_rate", math.inf),
    ("per_device_train_batch_size", 0),
    ("gradient_accumulation_steps", 0),
    ("weight_decay", -0.1),
    ("max_grad_norm", -1.0),
    ("seed", -1),
    ("seed", 2**32),
    ("reward_weights", 0.5),
    ("reward_weights", "abc"),
    ("model_init_kwargs", "abc"),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_refused_with_the_name_and_the_value_seen(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, **{name: value})
    assert str(caught.value).startswith(f"{name}={value!r}: ")
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, BondError)
    assert caught.value.exit_code == 2


OBJECTIVE_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"objective": "bond", "n": 1}, "n=1"),
    ({"objective": "bond", "n": 4, "num_anchor_samples": 1}, "num_anchor_samples=1"),
    ({"objective": "bond", "n": 4, "log_quantile": "jbond"}, "log_quantile='jbond'"),
    ({"objective": "bond", "quantile": "exact"}, "quantile='exact'"),
    ({"objective": "bond", "quantile": "learned", "log_quantile": "harmonic"}, "log_quantile='harmonic'"),
    ({"objective": "bond", "quantile": "learned", "correction": True}, "correction=True"),
    ({"objective": "bond", "quantile": "learned", "num_anchor_samples": 0}, "num_anchor_samples=0"),
    ({"objective": "bond", "n": 4, "beta": 0.0, "num_anchor_samples": 5}, "num_anchor_samples=5"),
    ({"objective": "bond", "n": 4, "beta": 0.0, "num_anchor_samples": 2}, "num_anchor_samples=2"),
    ({"objective": "bond", "beta": 0.0, "log_quantile": "clamped"}, "log_quantile='clamped'"),
    ({"objective": "bond", "beta": 0.0, "correction": True}, "correction=True"),
    ({"objective": "bond", "beta": 0.0, "quantile": "learned"}, "quantile='learned'"),
    ({"beta": 0.0, "num_anchor_samples": 3}, "num_anchor_samples=3"),
    ({"beta": 0, "log_quantile": "harmonic"}, "log_quantile='harmonic'"),
    ({"objective": "best_of_n_sft", "n": 1}, "n=1"),
    ({"objective": "best_of_n_sft", "beta": 1.0}, "beta=1.0"),
    ({"objective": "best_of_n_sft", "gamma": 0.5}, "gamma=0.5"),
    ({"objective": "vbon", "beta": 0.0}, "beta=0.0"),
    ({"objective": "rloo", "beta_rl": 0.0, "anchor": "ema"}, "anchor='ema'"),
    ({"objective": "grpo", "beta_rl": 0.0, "anchor": "periodic", "gamma_ref": 0.1}, "anchor='periodic'"),
    ({"objective": "rloo", "n": 4}, "n=4"),
    ({"objective": "reinforce", "alpha": 0.5}, "alpha=0.5"),
    ({"objective": "jbond", "anchor": "fixed", "eta": 0.1}, "eta=0.1"),
    ({"objective": "jbond", "anchor_update_every": 10}, "anchor_update_every=10"),
    ({"objective": "bond", "quantile_learning_rate": 0.1}, "quantile_learning_rate=0.1"),
    ({"objective": "best_of_n_sft", "num_anchor_samples": 8}, "num_anchor_samples=8"),
    ({"objective": "reinforce", "beta_rl": -0.1}, "beta_rl=-0.1"),
    ({"objective": "rloo", "beta_rl": math.nan}, "beta_rl=nan"),
    ({"objective": "rloo", "num_samples": 1}, "num_samples=1"),
    ({"objective": "rloo", "log_quantile": "harmonic"}, "log_quantile='harmonic'"),
    ({"objective": "vbon", "n": 4, "num_anchor_samples": 1}, "num_anchor_samples=1"),
    ({"objective": "bonbon", "n": 4, "alpha": 1.5}, "alpha=1.5"),
    ({"objective": "best_of_n_regression", "n": 4, "num_samples": 3}, "num_samples=3"),
    ({"objective": "listwise", "n": 4, "num_samples": 3}, "num_samples=3"),
    ({"objective": "listwise", "gamma_ref": 0.1}, "gamma_ref=0.1"),
    ({"objective": "self_bond", "num_samples": 2}, "num_samples=2"),
    ({"objective": "self_bond", "n": 100}, "n=100"),
    ({"objective": "self_bond", "log_quantile": "clamped"}, "log_quantile='clamped'"),
    ({"objective": "self_bond", "anchor": "ema"}, "anchor='ema'"),
    ({"objective": "self_bond", "anchor": "periodic"}, "anchor='periodic'"),
    ({"objective": "self_bond", "eta": 0.1}, "eta=0.1"),
    ({"objective": "self_bond", "gamma": 0.1}, "gamma=0.1"),
    ({"objective": "best_of_n_sft", "gamma_ref": 0.1}, "gamma_ref=0.1"),
    ({"objective": "jbond", "gamma_ref": 0.1, "anchor": "fixed"}, "gamma_ref=0.1"),
    ({"engine": "vllm", "max_rows": 4}, "max_rows=4"),
    ({"engine": "vllm", "cuda_graphs": False}, "cuda_graphs=False"),
    ({"objective": "jbond", "gamma_ref": 0.1, "eta": 0.0}, "gamma_ref=0.1"),
    ({"vllm_base_url": "http://other:8000"}, "vllm_base_url='http://other:8000'"),  # of an external server of vllm
]


@pytest.mark.parametrize(("settings", "start"), OBJECTIVE_SETTINGS)
def test_settings_that_an_objective_cannot_use_are_refused(
    settings: dict[str, Any], start: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, **settings)
    assert str(caught.value).startswith(f"{start}: ")


def test_every_objective_has_its_plan(tmp_path: Path) -> None:
    """(policy samples, anchor samples, learned, compared) a prompt."""
    plans: dict[str, tuple[int, int, int, int]] = {
        "jbond": (1, 2, 2, 1),
        "bond": (1, 16, 2, 1),
        "best_of_n_sft": (0, 2, 1, 0),
        "reinforce": (1, 0, 1, 1),
        "rloo": (2, 0, 2, 2),
        "grpo": (8, 0, 8, 8),
        "vbon": (1, 16, 1, 1),
        "bonbon": (0, 2, 2, 2),
        "best_of_n_regression": (0, 2, 2, 2),
        "self_bond": (8, 0, 8, 8),
        "listwise": (0, 8, 8, 8),
    }
    assert set(plans) == set(OBJECTIVES)
    for name, expected in plans.items():
        plan = objective_of(config(tmp_path, objective=name)).plan
        assert (plan.policy, plan.anchor, plan.learn, plan.compare) == expected
    changed = {
        (1, 5, 2, 1): {"objective": "jbond", "num_anchor_samples": 5, "log_quantile": "harmonic"},
        (1, 8, 2, 1): {"objective": "bond", "n": 8, "num_anchor_samples": 4},
        (1, 4, 2, 1): {"objective": "bond", "n": 4, "quantile": "learned"},
        (1, 3, 2, 1): {"objective": "bond", "n": 3, "beta": 0.0},
        (3, 0, 3, 3): {"objective": "rloo", "num_samples": 3},
        (6, 0, 6, 6): {"objective": "self_bond", "n": 4, "num_samples": 6, "log_quantile": "best_of_n"},
    }
    for expected, settings in changed.items():
        plan = objective_of(config(tmp_path, **settings)).plan
        assert (plan.policy, plan.anchor, plan.learn, plan.compare) == expected


def test_the_anchor_follows_the_objective_unless_it_is_set(tmp_path: Path) -> None:
    assert config(tmp_path).anchor == config(tmp_path, objective="bond").anchor == "ema"
    for objective in ("self_bond", "grpo", "rloo", "reinforce"):
        assert config(tmp_path, objective=objective).anchor == "fixed"
    assert config(tmp_path, objective="self_bond", anchor="fixed").anchor == "fixed"
    assert config(tmp_path, objective="rloo", anchor="ema").anchor == "ema"


def test_weights_are_averaged_where_a_run_has_a_fixed_point(tmp_path: Path) -> None:
    third = pytest.approx(1 / 3)
    assert config(tmp_path).average_weights == config(tmp_path, objective="rloo").average_weights == 0
    assert config(tmp_path, objective="self_bond").average_weights == third
    assert config(tmp_path, gamma_ref=0.3).average_weights == third
    for falling in ("linear", "cosine", "warmup_stable_decay"):  # its last steps are small already
        how = {"num_decay_steps": 10} if falling == "warmup_stable_decay" else {}
        settled = config(tmp_path, objective="self_bond", lr_scheduler_type=falling, lr_scheduler_kwargs=how)
        assert settled.average_weights == 0
    assert config(tmp_path, objective="self_bond", average_weights=0).average_weights == 0
    assert config(tmp_path, average_weights=0.2).average_weights == 0.2
    best: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "eval_win_rate"}
    best |= {"eval_strategy": "steps", "eval_steps": 10, "save_steps": 10}
    assert config(tmp_path, objective="self_bond", **best).average_weights == 0
    with pytest.raises(ConfigError, match=r"^average_weights=0.2: "):  # which weights would be the best ones?
        config(tmp_path, objective="self_bond", average_weights=0.2, **best)
    best |= {"load_best_model_at_end": False, "save_strategy": "best"}  # its checkpoints hold the weights of a step
    assert config(tmp_path, objective="self_bond", **best).average_weights == 0
    with pytest.raises(ConfigError, match=r"^average_weights=0.2: save_strategy='best'"):
        config(tmp_path, objective="self_bond", average_weights=0.2, **best)


def test_columns_for_the_rewards_cannot_be_dropped(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="remove_unused_columns"):
        config(tmp_path, remove_unused_columns=True)


def test_kernels_that_only_the_policy_would_get_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"use_liger_kernel=True: .*docs/speed\.md"):
        config(tmp_path, use_liger_kernel=True)


KNOBS: dict[str, tuple[str, ...]] = {
    "jbond": ("beta", "gamma", "gamma_ref", "num_anchor_samples", "log_quantile"),
    "bond": (
        *("n", "beta", "gamma", "gamma_ref", "num_anchor_samples", "log_quantile"),
        *("correction", "quantile", "quantile_learning_rate"),
    ),
    "best_of_n_sft": ("n",),
    "reinforce": ("beta_rl", "gamma_ref"),
    "rloo": ("beta_rl", "gamma_ref", "num_samples"),
    "grpo": ("beta_rl", "gamma_ref", "num_samples", "scale_rewards"),
    "vbon": ("n", "gamma_ref", "num_anchor_samples"),
    "bonbon": ("n", "alpha"),
    "best_of_n_regression": ("n", "num_samples"),
    "self_bond": ("n", "num_samples", "log_quantile", "adaptive_strength"),
    "listwise": ("n", "num_samples"),
}


def test_what_processes_of_a_run_must_have_alike(tmp_path: Path) -> None:
    """What BONDConfig declares, and of transformers' settings those that change what a step computes."""
    shared = set(config(tmp_path).shared_settings())
    own = {name for name in vars(BONDConfig)["__annotations__"] if not name.startswith("_")}
    assert shared - own == {
        *("seed", "data_seed", "max_steps", "num_train_epochs", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "max_grad_norm", "weight_decay", "bf16", "fp16"),
    }
    assert own <= shared
    assert config(tmp_path, eta=0.3).shared_settings() != config(tmp_path).shared_settings()


def test_every_objective_takes_its_own_knobs_and_refuses_all_others(tmp_path: Path) -> None:
    other: dict[str, Any] = {
        **{"n": 3, "beta": 0.25, "gamma": 0.5, "gamma_ref": 0.5, "num_anchor_samples": 4, "log_quantile": "harmonic"},
        **{"correction": True, "quantile": "learned", "quantile_learning_rate": 0.5, "beta_rl": 0.5},
        **{"num_samples": 4, "alpha": 0.5, "scale_rewards": "none", "adaptive_strength": True},
    }
    assert {name for names in KNOBS.values() for name in names} == set(other)
    assert set(KNOBS) == set(OBJECTIVES)
    for objective, names in KNOBS.items():
        for name, value in other.items():
            more = {"quantile": "learned"} if name == "quantile_learning_rate" and objective == "bond" else {}
            more |= {"anchor": "ema"} if name == "gamma_ref" and "beta_rl" in names else {}  # their own is fixed
            settings = {"objective": objective, name: value} | more
            if name in names:
                assert getattr(config(tmp_path, **settings), name) == value
            elif name == "scale_rewards":  # to scale nothing is what all others do
                assert config(tmp_path, **settings).scale_rewards == "group"
            else:
                with pytest.raises(ConfigError, match=f"{name}={value!r}: objective={objective!r}"):
                    config(tmp_path, **settings)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, eta=-1.0, n=1, max_rows=0, save_only_model=True)
    assert {part.split("=")[0] for part in str(caught.value).split("; ")} == {"eta", "n", "max_rows", "save_only_model"}
    with pytest.raises(ConfigError) as caught:  # and of those that its objective has
        config(tmp_path, beta=2.0, gamma=-1.0)
    assert [part.split("=")[0] for part in str(caught.value).split("; ")] == ["beta", "gamma"]


def test_a_setting_of_the_wrong_type_is_refused_like_any_other_value(tmp_path: Path) -> None:
    for name in ("eta", "max_completion_length", "vllm_base_url", "beta"):
        with pytest.raises(ConfigError, match=rf"^{name}=\['x'\]: "):
            config(tmp_path, **{name: ["x"]})


def test_several_servers_are_different_addresses(tmp_path: Path) -> None:
    several = ["http://a:8000", "https://b"]
    assert config(tmp_path, engine="vllm", vllm_base_url=several).vllm_base_url == several
    same = (["http://a", "http://a"], ["http://a", "http://a/"], ["http://a", "http://a/v1"])
    for refused in ([], *same, ["http://a", "b"], {"http://a": 1}):
        with pytest.raises(ConfigError, match=r"^vllm_base_url="):
            config(tmp_path, engine="vllm", vllm_base_url=refused)


def test_a_single_sample_cannot_be_ranked_last(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing_eos='worst': objective='reinforce'"):
        config(tmp_path, objective="reinforce", missing_eos="worst")
    config(tmp_path, objective="rloo", missing_eos="worst")


def test_objectives_that_draw_nothing_from_the_policy_can_learn_from_a_file(tmp_path: Path) -> None:
    assert set(OFF_POLICY) == {"best_of_n_sft", "bonbon", "best_of_n_regression", "listwise"}
    regression = config(tmp_path, objective="best_of_n_regression", n=3)
    assert objective_of(regression).plan.total == 3
    assert objective_of(regression, num_logged=8).plan.total == 8  # all that are on file
    assert objective_of(config(tmp_path, objective="listwise"), num_logged=6).plan.total == 6
    regression = config(tmp_path, objective="best_of_n_regression", n=3, num_samples=4)
    assert objective_of(regression, num_logged=8).plan.total == 4


def test_the_help_names_every_objective() -> None:
    help_text = str(BONDConfig.__dataclass_fields__["objective"].metadata["help"])
    assert all(name in help_text for name in OBJECTIVES)


def test_what_a_setting_needs_is_a_setting_and_one_of_its_values(tmp_path: Path) -> None:
    needed = {setting.needs for setting in SETTINGS.values() if setting.needs is not None}
    assert needed == {
        ("anchor", "ema"),
        ("anchor", "periodic"),
        ("quantile", "learned"),
        ("quantile", "monte_carlo"),
        ("reward_aggregation", "lexicographic"),
        ("engine", "vllm"),
        ("vllm_server", "auto"),
        ("vllm_server", "external"),
    }
    for other, value in needed:
        assert other in DEFAULTS
        more = {"engine": "vllm"} if other == "vllm_server" else {}
        config(tmp_path, objective="bond", **more | {other: value})


def test_what_may_change_when_a_run_goes_on() -> None:
    """How long it lasts and what it prints, not what it computes; see tests/faults/test_durability.py."""
    groups: dict[str, set[str]] = {}
    for name, setting in SETTINGS.items():
        groups.setdefault(setting.may_change, set()).add(name)
    del groups["on demand"]
    assert groups == {
        "always": {
            *("logging_steps", "save_steps", "eval_steps", "eval_strategy", "save_total_limit", "output_dir"),
            *(
                "logging_strategy",
                "logging_first_step",
                "save_strategy",
                "disable_tqdm",
                "log_level",
                "log_level_replica",
            ),
            *("num_logged_samples", "max_rows", "per_device_eval_batch_size", "report_to"),
            *("pad_to_multiple_of", "max_tokens_per_micro_batch"),
            *("eval_num_samples", "eval_num_reference_samples"),
            *(
                "target_n",
                "kl_budget",
                "main_eval",
                "reward_timeout_s",
                "reward_outage_s",
                "max_skipped_frac",
                "strict",
            ),
            *(
                "vllm_base_url",
                "vllm_sleep",
                "ddp_timeout",
                "per_device_train_batch_size",
                "gradient_accumulation_steps",
            ),
            *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_samples"),
        },
        "if endless": {"max_steps", "num_train_epochs"},
        "never": {
            "learning_rate",
            "weight_decay",
            "optim",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
            "adaptive_strength",
            "average_weights",
        },
    }


ACCEPTED: list[dict[str, Any]] = [
    {"beta": 0.0, "eta": 0.0, "num_anchor_samples": 2},
    {"objective": "bond", "n": 4, "beta": 0.0, "num_anchor_samples": 4, "gamma": 1.0},
    {"beta": 1.0, "eta": 1.0, "gamma": 2.0},
    {"anchor": "periodic", "anchor_update_every": 1},
    {"anchor": "fixed", "engine": "transformers", "dtype": "bfloat16"},
    {"max_prompt_length": 1, "max_completion_length": 1, "max_rows": 1, "pad_to_multiple_of": 1},
    {"eval_num_samples": 1, "eval_num_reference_samples": 2, "num_logged_samples": 0}
    | {"target_n": 2.0, "kl_budget": 0.1, "eval_strategy": "steps", "eval_steps": 5},
    {"objective": "bond", "anchor": "fixed", "quantile": "learned", "quantile_learning_rate": 0.1},
]


@pytest.mark.parametrize("settings", ACCEPTED)
def test_the_ends_of_every_range_are_allowed(settings: dict[str, Any], tmp_path: Path) -> None:
    made = config(tmp_path, **settings)
    assert {name: getattr(made, name) for name in settings} == settings


def test_defaults_are_the_papers_where_it_states_one(tmp_path: Path) -> None:
    """Sessa et al. 2024, sections 5 and 6 and Fig. 5."""
    made = config(tmp_path)
    paper = {
        "objective": "jbond",
        "n": 2,
        "num_anchor_samples": None,  # that is 2, see the plans above
        "log_quantile": None,  # that is Eq. 17
        "beta": 0.5,
        "gamma": 0.0,
        "anchor": "ema",
        "eta": 0.02,
        "anchor_update_every": 50,
        "warmup_steps": 100,
    }
    assert {name: getattr(made, name) for name in paper} == paper
    assert made.lr_scheduler_type == "constant_with_warmup"
    assert made.learning_rate is None  # 3e-6 with full fine-tuning: the trainer decides, see tests/trainer/test_step.py


def test_nothing_is_sent_anywhere_and_no_column_is_lost_by_default(tmp_path: Path) -> None:
    made = config(tmp_path)
    assert made.report_to == []
    assert not made.push_to_hub
    assert not made.remove_unused_columns


def test_settings_survive_a_round_trip_through_a_dictionary(tmp_path: Path) -> None:
    made = config(tmp_path, beta=0.25, eta=0.1, max_prompt_length=7, reward_weights=[1.0, 0.5])
    again = BONDConfig(**{name: value for name, value in made.to_dict().items() if value is not None})
    assert again.to_dict() == made.to_dict()
