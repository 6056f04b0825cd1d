"""Options of each command: a YAML file, overridden by `--name value`; unknown names are refused with a suggestion."""

import re
from collections.abc import Container, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import yaml

from bondlm.cli.presets import with_preset
from bondlm.data.paths import expanded
from bondlm.errors import ConfigError
from bondlm.migration import STAGES, own_names
from bondlm.migration.names import nearest

_MODEL = {"model": "Model folder or hub name, or an adapter folder. Required."}
_PROMPTS = {
    "prompt_format": "How plain text is given to the model: 'auto' (a chat model gets it as one user message), 'chat', "
    "'plain' or 'rendered'. Default: as in the run's training, else auto.",
    "chat_template_kwargs": "Variables of the chat template. Default: those of the run.",
}
_SAMPLING = {
    "max_completion_length": "Maximum length of a completion in tokens. Default: as in the run's training, else 256.",
    "max_prompt_length": "Longest prompt in tokens; a longer one is an error, see truncate_prompt.",
    "truncate_prompt": "Prompts that do not fit: 'never' refuses them, 'left' cuts off their beginning (text only). "
    "Default: as in the run's training, else never.",
    "temperature": "1 samples the model's own distribution, 0 is greedy. Default: 1.",
    "seed": "Default: 42.",
    "dtype": "'auto' (bf16 where the hardware has it), 'float32' or 'bfloat16'.",
    "max_rows": "Maximum number of completions decoded together. Default: as many as fit into memory (on a CPU, 96).",
    "cuda_graphs": "On CUDA, decode by replaying a recorded step. Default: as in the run's training, else true.",
}
_REWARDS = {
    "reward_funcs": "module:function, file.py:function, a classifier's name, nli:NAME, similarity:NAME, "
    "rank:module:function, judge:URL?model=NAME, a server's http(s)://HOST/PATH, or a list.",
    "reward_weights": "A list of numbers, one per reward.",
    "reward_aggregation": "How several rewards become one: sum (default), quantile, worst or lexicographic.",
    "reward_tolerances": "lexicographic: how far below the best counts as equal, one number per reward.",
    "reward_timeout_s": "Seconds that a request to a reward server or judge, or a call to an async reward function, "
    "may take. Default: as in the run's training, else 60.",
    "reward_outage_s": "Seconds to wait for a reward server or judge that is down. Default: as in the run's training, "
    "else 600.",
}
_JSON = {"json": "Print the result as one JSON object on stdout, everything else on stderr."}
LORA = {
    "use_peft": "Train a LoRA adapter instead of all weights.",
    "lora_r": "Rank. Default: 16.",
    "lora_alpha": "Default: 2 * lora_r.",
    "lora_dropout": "Default: 0.",
    "lora_target_modules": "Default: all-linear.",
}
# Options of `train` in addition to the settings of BONDConfig.
TRAIN = (
    _MODEL
    | {"reward_funcs": _REWARDS["reward_funcs"]}
    | {
        "train_dataset": "Prompts: .jsonl, .json, .csv or .parquet files, a saved data set, or NAME:CONFIG:SPLIT of "
        "the hub. Required.",
        "eval_dataset": "Held-out prompts of the same kinds, evaluated at the end (and every eval_steps).",
        "judges": "Rewards that are not optimised, for the final evaluation; given as reward_funcs. --judge adds one.",
        "resume": "'auto' (default) continues a run in output_dir, 'never' refuses to; or a checkpoint folder.",
        "allow_config_change": "Continue a run with changed settings; env.json keeps the list of changes.",
        "preset": "Values for settings you leave out: paper (the defaults) or fast (for tens of steps).",
    }
    | LORA
)
SFT = (
    {"model": "Model folder or hub name, causal or encoder-decoder. Required."}
    | {
        "train_dataset": "Files with rows {prompt, completion}, text or messages. Required.",
        "eval_dataset": "Held-out rows of the same kind: their loss is measured before and after.",
        "completion_column": "The column with the answers. Default: completion.",
        "max_prompt_length": "Longest prompt in tokens; a longer one is an error.",
        "max_completion_length": "Maximum length of an answer in tokens, end-of-sequence included. Default: 256.",
        "output_dir": "Folder for the model. Default: runs/sft.",
        "prompt_format": "How plain text is given to the model: 'auto' (a chat model gets it as one user message), "
        "'chat', 'plain' or 'rendered'.",
        "chat_template_kwargs": "Variables of the chat template.",
    }
    | LORA
)
REWARD_MODEL = (
    {"model": "An encoder or a language model, folder or hub name. Required."}
    | {
        "train_dataset": "Files with rows {prompt, chosen, rejected}. Required.",
        "eval_dataset": "Pairs on other prompts, to measure accuracy. Default: every tenth prompt is held out.",
        "max_length": "Maximum length of prompt and answer in tokens. Default: the model's.",
        "output_dir": "Folder for the reward model. Default: runs/reward-model.",
        "members": "Train this many from the same start and average their weights (WARM). Default: 1.",
        "member_learning_rates": "Used in turn. Default: learning_rate and half of it.",
        "member_dropouts": "Used in turn. Default: 0.05, 0.1 and 0.",
        "member_starts": "Checkpoints of a fine-tuning run, used in turn. Default: the model.",
        "flip_labels": "Swap chosen and rejected in this share of the training pairs, to see how wrong labels hurt. "
        "Default: 0.",
        "prompt_format": "How plain text is given to the model: 'auto' (messages, if it has a chat template), 'chat' "
        "or 'plain' (prompt and answer joined).",
    }
    | LORA
)
MERGE_CURVE = (
    {
        "curve": "Also evaluate the path to the reference: true (0, 0.2, .. 0.8), or a list of values of "
        "toward_reference. The options below apply only to this, as in `eval`; samples are kept in curve/.",
        "dataset": "Prompts, at least 2. Default: the runs' eval_dataset.",
        "judges": "Rewards that were not optimised. --judge adds one.",
        "num_samples": "Policy samples per prompt and point. Default: 8.",
        "num_reference_samples": "Reference samples per prompt. Default: 32.",
    }
    | _REWARDS
    | _PROMPTS
    | {name: text for name, text in _SAMPLING.items() if name != "temperature"}
)
MERGE = {
    "runs": "At least 2 run folders of one model, written after `merge`.",
    "method": "How task vectors are merged, tensor by tensor: 'slerp' (default; keeps their length) or 'mean'.",
    "toward_reference": "How far to move back toward the reference: 0 (default, the merge itself) up to but below 1.",
    "rank": "Rank of a merged LoRA adapter. Default: the sum of the runs' ranks, which is exact.",
    "reference": "The model that the runs were trained from. Default: the one that the runs name.",
    "output_dir": "Folder for the merged run. Required.",
} | MERGE_CURVE
COMMANDS: dict[str, tuple[str, dict[str, str]]] = {
    "train": ("Distil Best-of-N into a model.", TRAIN),
    "sample": (
        "Answer prompts, with one sample or the best of N.",
        _MODEL
        | _REWARDS
        | {
            "prompt": "One prompt as text.",
            "dataset": "Or prompts from files or a data set.",
            "best_of": "Draw this many and keep the one with the highest reward. Default: 1.",
            "output": "Write JSONL rows {prompt, completion} here instead of printing.",
        }
        | _PROMPTS
        | _SAMPLING,
    ),
    "score": (
        "Write many scored samples per prompt as JSONL rows {prompt, completion, reward}.",
        _MODEL
        | _REWARDS
        | {
            "dataset": "Prompts. Required.",
            "num_samples": "Samples per prompt. Default: 16.",
            "output": "The file to write. Required.",
        }
        | _PROMPTS
        | _SAMPLING
        | _JSON,
    ),
    "eval": (
        "Measure the N for which one sample of a policy matches Best-of-N, and its KL.",
        {
            "model": "The policy: a run folder, an adapter folder or a model. Required.",
            "reference": "What to compare with. Default: the model that the run or adapter was trained from.",
            "dataset": "Prompts, at least 2. Default: the run's eval_dataset.",
            "judges": "Rewards that were not optimised, given as reward_funcs, to report as well. --judge adds one.",
            "opponent": "Another policy; the win rate against one sample of it is reported as well.",
            "orders": "A list of n: the policy is compared with Best-of-n for each. Default: 1, 2, 4, ..",
            "reference_column": "A text column of the data; ROUGE-L against it becomes one more judge.",
            "num_samples": "Policy samples per prompt. Default: 8.",
            "num_reference_samples": "Reference samples per prompt; N can be measured up to this. Default: 32.",
            "output": "Folder for samples, eval.json and eval_samples.jsonl. Default: the run folder.",
        }
        | _REWARDS
        | _PROMPTS
        | {name: text for name, text in _SAMPLING.items() if name != "temperature"}
        | _JSON,
    ),
    "check": ("Check config, data, tokenizer, reward and disk with one dry step; nothing is trained.", TRAIN | _JSON),
    "sft": ("Fine-tune on answers, the stage before BOND.", SFT),
    "reward-model": ("Train a reward model from preference pairs (Bradley-Terry).", REWARD_MODEL),
    "prefer": (
        "Pick the better of two answers on a local page: bondlm prefer RUN, or a file written by `score`.",
        {
            "runs": "A run folder (its samples.jsonl) or a file of samples, written after `prefer`.",
            "output": "The file that choices are added to. Default: preferences.jsonl next to the samples.",
            "pairs_per_prompt": "Maximum number of pairs per prompt. Default: 1.",
            "seed": "Seed for pairs, sides and the order of prompts. Default: 42.",
            "port": "Port of the page, on this machine only. Default: any free one.",
        },
    ),
    "merge": ("Merge several runs of one model into one: bondlm merge RUN RUN [RUN ...] --output_dir OUT.", MERGE),
    "report": (
        "Write one HTML page about run folders: bondlm report RUN [RUN ...].",
        {
            "runs": "Run folders with an eval.json, written after `report`. Details are about the first.",
            "output": "The page to write. Default: report.html in the first folder.",
        },
    ),
}


# Paths and names, which YAML may misread as numbers, dates or booleans.
NAMES = ("output_dir", "dataset", "train_dataset", "eval_dataset", "reward_funcs", "judges", "run_name", "hub_model_id")
# Options with several values, of which one that is given again must not drop the first; else the last one counts.
SEVERAL = (
    *("reward_funcs", "reward_weights", "reward_tolerances", "judges", "dataset", "train_dataset", "eval_dataset"),
    *("orders", "runs", "curve", "report_to", "lora_target_modules", "vllm_base_url", "vllm_server_args"),
    *("member_starts", "member_learning_rates"),
)
NEED_TEXT = (*NAMES, "config", "judge", "model", "reference", "opponent", "output", "prompt")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number (YAML 1.1 requires 1.0e-4), and a duplicate name is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def parse(command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Merge the file and the command line; names may be written with `-` or `_`.

    Raises:
        ConfigError: the command or a name is unknown, an option with several values is given twice, a value is missing,
            or the file is not a YAML mapping.
    """
    if command not in COMMANDS:
        raise ConfigError(f"unknown command {command!r}{nearest(command, COMMANDS)}; see `bondlm --help`")
    given: dict[str, Any] = {}
    judges: list[str] = []
    folders: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--") and command in ("prefer", "merge", "report"):
            folders.append(word)
            continue
        if not word.startswith("--"):
            raise ConfigError(
                f"{word!r} has no option name before it: write --name value, or --name '[a, b]' for a list"
            )
        name, equals, text = word[2:].partition("=")
        has_value = bool(equals) or (bool(words) and not words[0].startswith("--"))
        if not equals:
            text = words.pop(0) if has_value else "true"
        name = name.replace("-", "_")
        if name in NEED_TEXT and not (has_value and text):
            raise ConfigError(f"{word.partition('=')[0]} has no value, or an empty one: write --{name} VALUE")
        if name == "judge" and "judges" in COMMANDS[command][1]:
            judges.append(text)
        else:
            _refuse_twice(name, given)
            given[name] = _value(name, text)
    if folders:
        _refuse_twice("runs", given)
        given["runs"] = folders
    path = given.pop("config", None)
    options = (_read(Path(path).expanduser()) if path is not None else {}) | given
    if judges:
        named = options.get("judges") or []
        options["judges"] = [*(named if isinstance(named, list) else [named]), *judges]
    known = known_options(command, options)
    _refuse_other_than_text(known)
    return with_preset({name: value if name == "prompt" else expanded(value) for name, value in known.items()})


def _refuse_twice(name: str, given: Container[str]) -> None:
    if name not in given or name not in (*SEVERAL, "config"):
        return
    if name == "runs":
        raise ConfigError("--runs is given beside run folders without an option name: write all of them without one")
    todo = "give one file" if name == "config" else f"give it once, and several values as a list, --{name} '[A, B]'"
    raise ConfigError(f"--{name} is given twice: {todo}")


def known_options(command: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without names of TRL that ask for what bondlm does anyway.

    Raises:
        ConfigError: the command does not know a name; the message suggests bondlm's own or the nearest one.
    """
    known = set(COMMANDS[command][1])
    if command in ("train", "check"):
        return own_names(options, known | _training_names(), command=command)
    plain = _plain_training_names() if command in ("sft", "reward-model") else set()
    _refuse_names_of_train(command, options.keys() - known - plain - STAGES.keys())
    if plain:
        return own_names(options, known | plain, command=command)
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}{nearest(name, known)}; see `bondlm {command} --help`")
    return dict(options)


def _refuse_names_of_train(command: str, unknown: Set[str]) -> None:
    """Say of a run's config, given to another command, which of its names this one does not have."""
    found = sorted(unknown & (TRAIN.keys() | _training_names())) if len(unknown) > 1 else []
    if len(found) > 1:  # a single one is rather meant for an option of this command
        todo = "; --model RUN takes what it needs from the run" if command in ("sample", "score", "eval") else ""
        raise ConfigError(f"bondlm {command} has no {', '.join(found)}, which bondlm train has: leave them out{todo}")


def _value(name: str, text: str) -> Any:
    # YAML would take the "*" of a pattern for an alias.
    if name in ("config", "prompt", "model", "reference", "opponent", "output") or text.startswith("*"):
        return text
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--{name} {text!r} is not a YAML value: {error}") from error
    return text if name in NAMES and _is_other_than_text(value) else value


def _is_other_than_text(value: Any) -> bool:
    """Whether YAML turned a name into something else: 2024_01_15 into a number, no into false."""
    return value is not None and not isinstance(value, str | list | dict)


def _refuse_other_than_text(options: Mapping[str, Any]) -> None:
    for name in NAMES:
        if _is_other_than_text(value := options.get(name)):
            raise ConfigError(f"{name}={value!r}: YAML reads this as {type(value).__name__}, write the name in quotes")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise ConfigError(f"--config {str(path)!r} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {str(path)!r} is not YAML: {error}") from error
    if content is None:
        raise ConfigError(f"--config {str(path)!r} is empty: write `name: value` lines, or leave it out")
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        kind = "but has names that are not text" if isinstance(content, dict) else f"not a {type(content).__name__}"
        raise ConfigError(f"--config {str(path)!r} must hold `name: value` lines, {kind}")
    return content


def _training_names() -> set[str]:
    """All fields of `BONDConfig`, including those of `transformers.TrainingArguments`."""
    from bondlm.config import SETTINGS

    return set(SETTINGS) - {"resume_from_checkpoint"}


def _plain_training_names() -> set[str]:
    """All fields of `transformers.TrainingArguments`."""
    import dataclasses

    from transformers import TrainingArguments

    return {field.name for field in dataclasses.fields(TrainingArguments)}
