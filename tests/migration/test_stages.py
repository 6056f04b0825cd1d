"""Names of TRL's SFTTrainer and RewardTrainer on the command line of `sft` and `reward-model`."""

from typing import Any

import pytest

from bondlm.cli.options import known_options
from bondlm.errors import ConfigError
from bondlm.migration import STAGES

# Fields of SFTConfig and RewardConfig (TRL 1.16) beside those of TrainingArguments, and of what their scripts parse,
# with their defaults.
TRL_FIELDS: dict[str, Any] = {
    "model_init_kwargs": None,
    "trust_remote_code": False,
    "router_aux_loss_coef": None,
    "chat_template_path": None,
    "dataset_text_field": "text",
    "dataset_kwargs": None,
    "dataset_num_proc": None,
    "eos_token": None,
    "max_length": 1024,
    "truncation_mode": "keep_start",
    "shuffle_dataset": False,
    "packing": False,
    "packing_strategy": "bfd",
    "padding_free": False,
    "pad_to_multiple_of": "auto",
    "eval_packing": None,
    "completion_only_loss": None,
    "assistant_only_loss": False,
    "loss_type": "nll",
    "activation_offloading": False,
    "pad_token": None,
    "disable_dropout": True,
    "center_rewards_coefficient": None,
    "model_name_or_path": None,
    "model_revision": "main",
    "dtype": "float32",
    "attn_implementation": None,
    "lora_target_parameters": None,
    "lora_modules_to_save": None,
    "lora_task_type": "CAUSAL_LM",
    "use_rslora": False,
    "use_dora": False,
    "load_in_8bit": False,
    "load_in_4bit": False,
    "bnb_4bit_quant_type": "nf4",
    "use_bnb_nested_quant": False,
    "bnb_4bit_quant_storage": None,
    "dataset_name": None,
    "dataset_config": None,
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "dataset_streaming": False,
    "ignore_bias_buffers": False,
    "streaming": False,
    "test_split_size": None,
}
# Defaults that ask for something else than what the commands do.
DIFFERENT = {"max_length", "dataset_text_field", "disable_dropout", "dataset_test_split"}
COMMANDS = ("sft", "reward-model")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", sorted(TRL_FIELDS))
def test_every_name_is_known_or_answered(command: str, name: str) -> None:
    value = TRL_FIELDS[name]
    if name not in DIFFERENT:
        assert known_options(command, {name: value}) == {}
    elif (command, name) != ("reward-model", "max_length"):
        with pytest.raises(ConfigError, match=f"^{name}={value!r}: "):
            known_options(command, {name: value})
    with pytest.raises(ConfigError) as caught:
        known_options(command, {name: "another", "lerning_rate": 1})
    assert (f"{name}='another': " in str(caught.value)) != ((command, name) == ("reward-model", "max_length"))


def test_what_a_command_has_itself_is_not_in_the_table() -> None:
    """But `max_length`, which is an option of one of them."""
    for command in COMMANDS:
        own = {name for name in STAGES if known_or_none(command, name)}
        assert own == ({"max_length"} if command == "reward-model" else set())


def known_or_none(command: str, name: str) -> bool:
    return name in known_options(command, {name: None})


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("max_seq_length", 512, "max_completion_length"),
        ("dataset_text_field", "text", "completion_column"),
        ("group_by_length", True, "train_sampling_strategy"),
        ("shuffle_dataset", "no", "train_sampling_strategy"),
        ("lora_modules_to_save", ["head"], "lora_r"),
        ("torch_dtype", "bfloat16", "bf16"),
        ("test_split_size", 0.1, "eval_dataset"),
    ],
)
def test_another_value_is_refused_with_bondlms_own_word(name: str, value: Any, word: str) -> None:
    for command in COMMANDS:
        with pytest.raises(ConfigError, match=rf"^{name}=.*: .*\b{word}\b"):
            known_options(command, {name: value})


def test_what_the_commands_do_anyway_is_accepted() -> None:
    given = {"completion_only_loss": True, "lora_task_type": "SEQ_CLS", "packing": False, "group_by_length": False}
    for command in COMMANDS:
        assert known_options(command, given) == {}
