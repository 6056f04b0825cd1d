"""Every name of TRL's is answered: bondlm has it, or says its own word, or takes a value that asks for nothing else."""

from pathlib import Path
from typing import Any

import pytest

from bondlm import BONDConfig
from bondlm.config import SETTINGS as OWN
from bondlm.errors import ConfigError
from bondlm.migration import ARGUMENTS, COMMAND_LINE, SETTINGS, own_arguments, own_names

# Fields of GRPOConfig and RLOOConfig (TRL 1.16) beside those of TrainingArguments, with their defaults.
TRL_FIELDS: dict[str, Any] = {
    "model_init_kwargs": None,
    "trust_remote_code": False,
    "router_aux_loss_coef": None,
    "disable_dropout": False,
    "num_generations": 8,
    "num_generations_eval": None,
    "max_completion_length": 512,
    "ds3_gather_for_generation": True,
    "shuffle_dataset": True,
    "pad_to_multiple_of": "auto",
    "generation_batch_size": None,
    "steps_per_generation": None,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "generation_kwargs": None,
    "chat_template_kwargs": None,
    "repetition_penalty": 1.0,
    "cache_implementation": None,
    "use_vllm": False,
    "vllm_mode": "colocate",
    "vllm_model_impl": "vllm",
    "vllm_enable_sleep_mode": False,
    "vllm_structured_outputs_regex": None,
    "vllm_server_base_url": None,
    "vllm_server_host": "0.0.0.0",
    "vllm_server_port": 8000,
    "vllm_server_timeout": 240.0,
    "vllm_group_port": 51216,
    "vllm_gpu_memory_utilization": 0.3,
    "vllm_max_model_length": None,
    "vllm_tensor_parallel_size": 1,
    "beta": 0.0,
    "num_iterations": 1,
    "epsilon": 0.2,
    "epsilon_high": None,
    "reward_weights": None,
    "normalize_advantages": False,
    "reward_clip_range": None,
    "mask_truncated_completions": False,
    "sync_ref_model": False,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "log_completions": False,
    "log_multimodal": True,
    "num_completions_to_print": None,
    "log_unique_prompts": False,
    "use_transformers_continuous_batching": False,
    "transformers_continuous_batching_config": None,
    "use_transformers_paged": False,
    "cast_lm_head_to_fp32": False,
    "delta": None,
    "sapo_temperature_neg": 1.05,
    "sapo_temperature_pos": 1.0,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "importance_sampling_level": "token",
    "multi_objective_aggregation": "sum_then_normalize",
    "scale_rewards": "group",
    "loss_type": "dapo",
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "entropy_coef_min": 0.0,
    "entropy_coef_max": 1.0,
    "entropy_coef_delta": 0.005,
    "entropy_target": 0.2,
    "max_tool_calling_iterations": None,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": 3.0,
    "vllm_importance_sampling_clip_min": None,
    "off_policy_mask_threshold": None,
    "use_bias_correction_kl": True,
    "log_completions_hub_repo": None,
    "vllm_importance_sampling_cap": None,
}
# Defaults that ask for something else than bondlm's.
DIFFERENT = {"num_generations", "vllm_mode", "vllm_server_timeout", "vllm_gpu_memory_utilization"}
DIFFERENT |= {"sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"}


def config(tmp_path: Path, **settings: Any) -> BONDConfig:
    return BONDConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_every_field_of_trls_configs_is_known_or_answered() -> None:
    assert set(TRL_FIELDS) - set(OWN) - set(SETTINGS) == set()
    assert set(OWN) & set(SETTINGS) == set()  # what bondlm has needs no translation
    assert (set(OWN) - {"resume_from_checkpoint"}) & set(COMMAND_LINE) == set()


@pytest.mark.parametrize("name", sorted(set(TRL_FIELDS) & set(SETTINGS)))
def test_trls_default_is_accepted_where_bondlm_does_the_same(name: str, tmp_path: Path) -> None:
    value = TRL_FIELDS[name]
    if name not in DIFFERENT:
        assert not hasattr(config(tmp_path, **{name: value}), name)
        return
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, **{name: value})
    assert str(caught.value).startswith(f"{name}={value!r}: ")


def test_trls_automatic_padding_is_to_the_longest_row(tmp_path: Path) -> None:
    made = config(tmp_path, pad_to_multiple_of=TRL_FIELDS["pad_to_multiple_of"])
    assert made.pad_to_multiple_of is None
    assert "pad_to_multiple_of" not in made.given


# What stands in the sentence for a name: bondlm's own word.
WORDS: list[tuple[str, Any, str]] = [
    ("num_generations", 8, "num_samples"),
    ("num_generations_eval", 2, "eval_num_samples"),
    ("mask_truncated_completions", True, "missing_eos"),
    ("use_vllm", True, "engine"),
    ("vllm_mode", "server", "vllm_server"),
    ("vllm_server_base_url", "http://x", "vllm_base_url"),
    ("vllm_server_host", "10.0.0.1", "vllm_base_url"),
    ("vllm_server_port", 8001, "vllm_base_url"),
    ("vllm_server_timeout", 240.0, "vllm_start_timeout"),
    ("vllm_gpu_memory_utilization", 0.3, "vllm_server_args"),
    ("vllm_tensor_parallel_size", 2, "vllm_server_args"),
    ("vllm_max_model_length", 512, "vllm_server_args"),
    ("num_completions_to_print", 4, "num_logged_samples"),
    ("sync_ref_model", True, "anchor"),
    ("ref_model_mixup_alpha", 0.6, "eta"),
    ("ref_model_sync_steps", 64, "anchor_update_every"),
    ("shuffle_dataset", False, "train_sampling_strategy"),
    ("normalize_advantages", True, "grpo"),
    ("entropy_coef", 0.1, "beta_rl"),
    ("temperature", 0.9, "distribution"),
    ("top_p", 0.9, "distribution"),
    ("repetition_penalty", 1.1, "distribution"),
    ("generation_kwargs", {"top_k": 5}, "distribution"),
    ("num_iterations", 2, "one step per rollout"),
    ("steps_per_generation", 8, "remove it if it is at most gradient_accumulation_steps"),
    ("generation_batch_size", 64, "remove it"),
    ("epsilon", 0.3, "one step per rollout"),
    ("delta", 2.0, "one step per rollout"),
    ("loss_type", "grpo", "dapo"),
    ("trust_remote_code", True, "code"),
    ("evaluation_strategy", "steps", "eval_strategy"),
    ("warmup_ratio", 0.1, "warmup_steps"),
    ("kl_coef", 0.05, "beta_rl"),
]


@pytest.mark.parametrize(("name", "value", "word"), WORDS)
def test_another_value_is_refused_with_bondlms_own_word(name: str, value: Any, word: str, tmp_path: Path) -> None:
    for command in (None, "train"):
        with pytest.raises(ConfigError) as caught:
            own_names({name: value}, OWN, command=command)
        assert str(caught.value).startswith(f"{name}={value!r}: ")
        assert word in str(caught.value)
    with pytest.raises(ConfigError, match=f"^{name}="):
        config(tmp_path, **{name: value})


def test_none_asks_for_nothing_and_all_problems_are_told_at_once(tmp_path: Path) -> None:
    config(tmp_path, **dict.fromkeys(SETTINGS))
    with pytest.raises(ConfigError, match=r"top_p=0.5: .*; top_k=3: .*; unknown setting 'lerning_rate'.*learning_rate"):
        config(tmp_path, top_p=0.5, top_k=3, lerning_rate=1.0)


def test_the_table_comes_before_the_nearest_name(tmp_path: Path) -> None:
    """`delta` is near to `eta`, `vllm_mode` to `vllm_timeout`, `log_completions` to `max_completion_length`."""
    for name, value in (("delta", 2.0), ("vllm_mode", "server"), ("log_completions", "all")):
        with pytest.raises(ConfigError) as caught:
            config(tmp_path, **{name: value})
        assert "did you mean" not in str(caught.value)


def test_names_of_trls_scripts_are_answered_on_the_command_line_alone(tmp_path: Path) -> None:
    given = {"dataset_train_split": "train", "load_in_4bit": False, "eta": 0.1}
    assert own_names(given, OWN, command="train") == {"eta": 0.1}
    for name, word in (("model_name_or_path", "model"), ("dataset_name", "train_dataset"), ("use_dora", "use_peft")):
        with pytest.raises(ConfigError, match=rf"^{name}='x': .*\b{word}\b"):
            own_names({name: "x"}, OWN, command="train")
        with pytest.raises(ConfigError, match=f"unknown setting '{name}'"):
            config(tmp_path, **{name: "x"})


def test_arguments_of_other_trainers_are_refused_unless_they_are_none() -> None:
    own_arguments(dict.fromkeys(ARGUMENTS), ["model"])
    for name in ("tools", "rollout_func", "environment_factory", "tokenizer", "compute_metrics"):
        with pytest.raises(ConfigError, match=rf"^{name}=.*: "):
            own_arguments({name: print}, ["model"])
    with pytest.raises(ConfigError, match=r"unknown argument 'modl' .*'model'"):
        own_arguments({"modl": None}, ["model"])


class Plain(BONDConfig):
    """Not decorated with @dataclass."""

    per_device_train_batch_size = 2


class WithItsOwn(BONDConfig):
    def __init__(self, colour: str, **settings: Any) -> None:
        self.colour = colour
        super().__init__(**settings)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("lr", "learning_rate"), ("epochs", "num_train_epochs"), ("batch_size", "per_device_train_batch_size")],
)
def test_a_short_name_is_one_that_people_write(name: str, meant: str, tmp_path: Path) -> None:
    """The most similar name was `auto_find_batch_size`, or none."""
    with pytest.raises(ConfigError, match=f"did you mean {meant!r}"):
        BONDConfig(output_dir=str(tmp_path), use_cpu=True, **{name: 1})


def test_a_subclass_that_is_no_dataclass_of_its_own(tmp_path: Path) -> None:
    """It ended in a KeyError."""
    assert Plain(output_dir=str(tmp_path), use_cpu=True, eta=0.3, num_generations=None).eta == 0.3
    with pytest.raises(ConfigError, match=r"etta.*did you mean 'eta'"):
        Plain(output_dir=str(tmp_path), etta=0.3)
    made = WithItsOwn(colour="blue", output_dir=str(tmp_path), use_cpu=True, eta=0.3)
    assert (made.colour, made.eta) == ("blue", 0.3)
