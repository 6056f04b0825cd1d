"""Settings that a script parses with transformers' or TRL's parser, and those that mean something else than in TRL."""

import dataclasses
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from bondlm import BONDConfig
from bondlm.config import SETTINGS
from bondlm.errors import ConfigError


@dataclass
class ScriptArguments:
    """Of TRL's own, the names that might meet one of ours."""

    dataset_name: str | None = None
    dataset_train_split: str = "train"


@dataclass
class ModelConfig:
    """Of TRL's own, the names that might meet one of ours."""

    model_name_or_path: str | None = None
    dtype: str | None = field(default="float32", metadata={"choices": ["auto", "bfloat16", "float32"]})
    use_peft: bool = False


def config(tmp_path: Path, **settings: Any) -> BONDConfig:
    return BONDConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_three_dataclasses_parse_together(tmp_path: Path) -> None:
    parser = HfArgumentParser([ScriptArguments, BONDConfig, ModelConfig])
    words = ["--dataset_name", "prompts.jsonl", "--output_dir", str(tmp_path), "--use_cpu", "--objective", "grpo"]
    words += ["--beta-rl", "0.04", "--num_samples", "4", "--anchor", "periodic", "--model_name_or_path", "tiny"]
    words += ["--reward_weights", "1", "0.5", "--model_init_kwargs", json.dumps({"revision": "main"})]
    script, args, model = parser.parse_args_into_dataclasses([*words, "--dtype", "bfloat16", "--no_cuda_graphs"])
    assert (script.dataset_name, model.model_name_or_path, model.dtype) == ("prompts.jsonl", "tiny", "bfloat16")
    assert (args.objective, args.beta_rl, args.num_samples, args.anchor) == ("grpo", 0.04, 4, "periodic")
    assert (args.reward_weights, args.model_init_kwargs, args.cuda_graphs) == ([1.0, 0.5], {"revision": "main"}, False)
    assert args.dtype == "auto"
    assert "--scale_rewards" in parser.format_help()


def test_what_is_parsed_without_options_is_what_is_made_without_settings(tmp_path: Path) -> None:
    (parsed,) = HfArgumentParser(BONDConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu"])
    made = config(tmp_path)
    different = {n for n in SETTINGS if str(getattr(parsed, n)) != str(getattr(made, n))}
    assert different == set()


def test_a_copy_keeps_every_setting(tmp_path: Path) -> None:
    made = config(tmp_path, dtype="float32", eta=0.3)
    copy = dataclasses.replace(made, seed=7)
    assert {n for n in SETTINGS if str(getattr(copy, n)) != str(getattr(made, n))} == {"seed"}


def test_a_subclass_has_the_same_names(tmp_path: Path) -> None:
    @dataclass
    class Mine(BONDConfig):
        more: int = 3

    assert Mine(output_dir=str(tmp_path), use_cpu=True, temperature=1.0, more=4).more == 4  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"num_generations=4: .*num_samples"):
        Mine(output_dir=str(tmp_path), num_generations=4)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("objective", "beta", "warns"), [("jbond", 0.04, True), ("bond", 0.0, True), ("jbond", 0.1, False)]
)
def test_a_beta_that_looks_like_a_kl_coefficient_warns(
    objective: str, beta: float, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="bondlm.config.bond_config"):
        config(tmp_path, objective=objective, beta=beta)
    assert ("beta_rl" in caplog.text) == warns


@pytest.mark.parametrize("objective", ["rloo", "grpo", "reinforce"])
def test_where_beta_is_not_used_the_error_names_the_kl_coefficient(objective: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^beta=0\.04: .*beta_rl"):
        config(tmp_path, objective=objective, beta=0.04)


def test_trls_words_for_scaling(tmp_path: Path) -> None:
    assert config(tmp_path, objective="grpo", scale_rewards=False).scale_rewards == "none"
    assert config(tmp_path, objective="grpo", scale_rewards=True).scale_rewards == "group"
    for word in ("group", "batch", "none", True, False):  # an objective that looks at the order alone
        config(tmp_path, objective="bond", scale_rewards=word)
    config(tmp_path, objective="rloo", scale_rewards=False)
    for objective, word in (("grpo", "batch"), ("rloo", "batch"), ("jbond", "std")):
        with pytest.raises(ConfigError, match=f"^scale_rewards={word!r}: "):
            config(tmp_path, objective=objective, scale_rewards=word)


def test_code_that_comes_with_a_model_is_refused_wherever_it_is_asked_for(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = [{"trust_remote_code": True}, {"model_init_kwargs": {"trust_remote_code": True}}]
    for settings in asked:
        with pytest.raises(ConfigError, match=r"trust_remote_code.*would run code"):
            config(tmp_path, **settings)
    config(tmp_path, trust_remote_code=False, model_init_kwargs={"trust_remote_code": False})
