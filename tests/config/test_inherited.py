"""Settings that come from transformers do something here, or are refused by name."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from trainer.helpers import config
from transformers import TrainingArguments

from bondlm import BONDConfig
from bondlm.config import SETTINGS, require_metric_of
from bondlm.config.bond_config import DEFAULTS
from bondlm.config.checks import refused_plainly
from bondlm.errors import ConfigError

WITHOUT_EFFECT: dict[str, Any] = {
    "label_smoothing_factor": 0.1,
    "label_names": ["x"],
    "eval_accumulation_steps": 2,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "prediction_loss_only": True,
    "batch_eval_metrics": True,
    "include_for_metrics": ["loss"],
    "do_predict": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "size",
    "average_tokens_across_devices": False,
    "auto_find_batch_size": True,
    "include_num_input_tokens_seen": True,
    "logging_nan_inf_filter": False,
    "use_cache": True,
    "liger_kernel_config": {"rope": True},
    "enable_jit_checkpoint": True,
    "resume_from_checkpoint": "somewhere",
    "hub_strategy": "every_save",
    "hub_always_push": True,
    "debug": "tpu_metrics_debug",
    "use_liger_kernel": True,
    "save_only_model": True,
    "ignore_data_skip": True,
    "remove_unused_columns": True,
    "eval_steps": 5,
    "save_total_limit": 1,
}

# Read by Trainer, accelerate, the loggers or bondlm in a run of `BONDTrainer`.
WORKS = """
    output_dir per_device_train_batch_size per_device_eval_batch_size num_train_epochs max_steps learning_rate
    lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    torch_compile_backend torch_compile_mode torch_empty_cache_steps logging_strategy logging_steps logging_first_step
    log_on_each_node log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id eval_strategy eval_delay eval_on_start save_strategy save_steps
    save_on_each_node push_to_hub hub_token hub_private_repo hub_model_id hub_revision load_best_model_at_end
    metric_for_best_model greater_is_better restore_callback_states_from_checkpoint full_determinism seed data_seed
    use_cpu accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp
    fsdp_config deepspeed skip_memory_metrics
""".split()
# Ask for what happens anyway, come from a launcher, or are refused once the model is known.
HARMLESS = {"do_train", "do_eval", "local_rank", "neftune_noise_alpha"}


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_what_does_nothing_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{name}="):
        config(tmp_path, **{name: WITHOUT_EFFECT[name]})


@pytest.mark.parametrize(
    ("name", "value"),
    [("dispatch_batches", True), ("split_batches", True), ("even_batches", False), ("use_seedable_sampler", False)],
)
def test_data_is_shared_out_in_the_one_way_that_steps_know(tmp_path: Path, name: str, value: bool) -> None:
    with pytest.raises(ConfigError, match=f"accelerator_config: {name}="):
        config(tmp_path, accelerator_config={name: value})
    config(tmp_path, accelerator_config={name: not value})


def test_a_schedule_that_measures_knows_which_end_is_better(tmp_path: Path) -> None:
    """Its own default is the low end: a rising win rate would cut the learning rate."""
    how = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 5}
    for metric, mode in (("win_rate", "max"), ("effective_n", "max"), ("kl", "min")):
        assert config(tmp_path, metric_for_best_model=metric, **how).lr_scheduler_kwargs == {"mode": mode}
    given = {"metric_for_best_model": "win_rate", "lr_scheduler_kwargs": {"mode": "min", "patience": 3}}
    assert config(tmp_path, **how, **given).lr_scheduler_kwargs == {"mode": "min", "patience": 3}
    with pytest.raises(ConfigError, match="warmup_steps=7"):
        config(tmp_path, metric_for_best_model="win_rate", warmup_steps=7, **how)


def test_every_inherited_setting_is_known_to_work_or_refused() -> None:
    """A new transformers may bring settings: look at each before it is listed here."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    known = set(WORKS) | set(WITHOUT_EFFECT) | HARMLESS | {"parallelism_config"}
    assert inherited - known == set()
    assert known - inherited <= {"activation_checkpointing", "activation_checkpointing_kwargs"}  # not in 5.19
    assert inherited <= set(SETTINGS)


def test_words_for_what_happens_anyway_pass(tmp_path: Path) -> None:
    made = config(tmp_path, do_train=True, do_eval=True, local_rank=0, include_num_input_tokens_seen=False, debug="")
    again = BONDConfig(**{name: value for name, value in made.to_dict().items() if value is not None})
    assert again.to_dict() == made.to_dict()


def test_a_logger_is_looked_up_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bondlm.config.checks.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ConfigError, match=r"report_to='wandb'.*pip install wandb"):
        config(tmp_path, report_to="wandb")
    with pytest.raises(ConfigError, match=r"report_to='wanbd'.*'wandb'"):
        config(tmp_path, report_to=["tensorboard", "wanbd"])
    with pytest.raises(ConfigError, match=r"a list is written '\[tensorboard, wandb\]'"):
        config(tmp_path, report_to="tensorboard,wandb")
    assert config(tmp_path, report_to=["tensorboard"]).report_to == ["tensorboard"]


BEST: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "reward"}
EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (EVALUATED | {"load_best_model_at_end": True}, "load_best_model_at_end=True needs metric_for_best_model"),
        (EVALUATED | {"save_strategy": "best"}, "save_strategy='best' needs metric_for_best_model"),
        (EVALUATED | {"lr_scheduler_type": "reduce_lr_on_plateau"}, "needs metric_for_best_model"),
        (EVALUATED | {"metric_for_best_model": "loss"}, "metric_for_best_model='loss'"),
        (EVALUATED | {"metric_for_best_model": "eval_winrate"}, "metric_for_best_model='eval_winrate'"),
        (EVALUATED | {"metric_for_best_model": "entropy"}, "greater_is_better"),
        ({"save_strategy": "best", "metric_for_best_model": "reward"}, "eval_strategy='steps'"),
        ({"warmup_steps": 10, "lr_scheduler_type": "constant"}, "warmup_steps=10"),
        (EVALUATED | {"save_steps": 2} | BEST, r"eval_steps=1 and save_steps=2\. Set both"),
    ],
)
def test_settings_of_the_best_model_are_looked_up_at_once(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        config(tmp_path, **settings)


@pytest.mark.parametrize("name", sorted(name for name, default in DEFAULTS.items() if default not in (None, "")))
def test_what_must_have_a_value_is_not_null(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=None: it must have a value; leave it out for the default"):
        config(tmp_path, **{name: None})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gradient_checkpointing_kwargs": "x"}, "gradient_checkpointing_kwargs='x': must be names and values"),
        ({"deepspeed": "zero2.json"}, "deepspeed='zero2.json': its package is not installed"),
        ({"dataloader_prefetch_factor": 2}, "a setting was refused: .*prefetch_factor"),
    ],
)
def test_what_transformers_trips_over_is_a_sentence(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        config(tmp_path, **settings)
    with pytest.raises(ConfigError, match="output_dir='': name a folder"):
        BONDConfig(output_dir="", use_cpu=True)


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("reward", True),
        ("eval_win_rate_low", True),
        ("effective_n", True),
        ("kl", False),
        ("eval_other_kl_high", False),
        ("eval_rewards/a/win_rate", True),
        ("eval_other_rewards/length_2/effective_n_low", True),
    ],
)
def test_which_end_of_a_measure_is_better_is_known(metric: str, greater: bool, tmp_path: Path) -> None:
    made = config(tmp_path, **EVALUATED, load_best_model_at_end=True, metric_for_best_model=metric)
    assert made.greater_is_better is greater
    assert config(tmp_path, **EVALUATED, metric_for_best_model=metric, greater_is_better=True).greater_is_better


def test_the_best_models_metric_is_of_the_data_sets_that_are_there() -> None:
    require_metric_of(None, "eval_reward")
    require_metric_of(["a", "b"], "eval_b_win_rate_low")
    require_metric_of(["a", "b"], "reward")  # of the one that leads
    require_metric_of(None, None)
    require_metric_of(["a"], "eval_a_rewards/length/win_rate")
    require_metric_of(None, "rewards/length/effective_n_high", ["length", "other"])
    for metric in ("completions/max_length", "reference_reward_low"):
        require_metric_of(None, f"eval_{metric}")
    for metric, rewards in (("rewards/lenght/win_rate", ["length", "other"]), ("rewards/length/win_rate", ["length"])):
        with pytest.raises(ConfigError, match=rf"metric_for_best_model='{metric}': .*length|with a single reward"):
            require_metric_of(None, metric, rewards)
    for names, metric in ((None, "b_reward"), (["a"], "eval_b_reward")):
        with pytest.raises(ConfigError, match="metric_for_best_model"):
            require_metric_of(names, metric)


@pytest.mark.parametrize("value", ["enable_thinking=false", ["enable_thinking"]])
def test_names_and_values_that_are_none_are_named(value: Any, tmp_path: Path) -> None:
    """A text was taken letter by letter: "the chat template does not look at 'e'"."""
    with pytest.raises(ConfigError, match=r"chat_template_kwargs=.*\{name: value\}"):
        BONDConfig(output_dir=str(tmp_path), chat_template_kwargs=value)
    assert BONDConfig(output_dir=str(tmp_path), chat_template_kwargs='{"a": 1}').chat_template_kwargs == {"a": 1}


def test_only_an_error_of_another_library_becomes_ours_and_its_cause() -> None:
    ours, theirs = ConfigError("eta=3: too large"), ValueError("no such optimizer")
    with pytest.raises(ConfigError) as caught, refused_plainly():
        raise ours
    assert caught.value is ours
    assert caught.value.__cause__ is None  # it was itself
    with pytest.raises(ConfigError, match="a setting was refused: no such optimizer") as caught, refused_plainly():
        raise theirs
    assert caught.value.__cause__ is theirs
