"""The model card of a run folder."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from bondlm.config import BONDConfig
from bondlm.evaluation.usage import usage
from bondlm.runs.folder import run_config, write_whole
from bondlm.runs.worth import below

MAX_COMPLETION_LENGTH = BONDConfig.max_completion_length
CITATION = """```bibtex
@inproceedings{sessa2025bond,
  title = {{BOND}: Aligning {LLMs} with Best-of-N Distillation},
  author = {Sessa, Pier Giuseppe and others},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  note = {arXiv:2407.14622}
}
```"""


def write_card(folder: Path, result: Mapping[str, Any]) -> None:
    """Write README.md: base model, data, objective, the measured numbers, the paper.

    Args:
        folder: a run folder; its config.yaml, if there is one, has the run's settings.
        result: the contents of `eval.json`.
    """
    config, objective = run_config(folder), dict(result["objective"])
    base = str(config.get("model") or result["reference"])
    is_adapter = (folder / "adapter_config.json").is_file()
    kind, held_out = "LoRA adapter" if is_adapter else "model", _held_out(result)
    rewards = ", ".join(str(name) for name in result["rewards"])
    name = objective.pop("name")
    numbers = "\n".join(f"| {label} | {_shown(result[key])} |" for label, key in _measured(result))
    data = ModelCardData(
        base_model=base,
        library_name="peft" if is_adapter else "transformers",
        tags=["bondlm", "bond", "best-of-n", "rlhf"],
        model_name=folder.resolve().name,
        eval_results=_eval_results(result, held_out.replace("`", "") or "held-out prompts"),
    )
    text = f"""---
{data.to_yaml()}
---

# {kind[0].upper()}{kind[1:]} aligned with {name} (Best-of-N Distillation)

One sample of this {kind} was measured to be {_worth(result)},
on {result["num_prompts"]} held-out prompts at temperature 1{_at_most(result)}, judged by {rewards}.

| measured | value and 95% interval |
|---|---|
{numbers}
{_judges(result)}
- base model: `{base}`
- objective: {name} ({", ".join(f"{key} {_plain(value)}" for key, value in objective.items())})
- reward: {_list(config.get("reward_funcs")) or rewards}{_weights(config)}
- data: {_list(config.get("train_dataset")) or "not recorded"}; held out: {held_out or "given"}
- weights: {_held(config, objective, result)}
- training: {_steps(result)}, at most {_length(config)} tokens

## How to use

{usage(folder, config)}
`generation_config.json` makes it answer from the distribution that was measured: at temperature 1, without top-k or
top-p, with the same end tokens, and at most {_length(config)} tokens{_measured_at(config, result)}.

A higher reward says nothing about facts or safety that the reward does not measure.

{CITATION}
"""
    write_whole(folder / "README.md", str(ModelCard(text)))


MEASURED = (
    ("effective N", "effective_n"),
    ("win rate against the reference", "win_rate"),
    ("KL to the reference, nats per completion", "kl"),
    ("reward", "reward"),
)


def _measured(result: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return MEASURED if below(result) is None else MEASURED[1:]  # without an N


def _worth(result: Mapping[str, Any]) -> str:
    reference = f"`{result['reference']}`"
    return below(result, reference) or f"worth Best-of-{result['effective_n']['text']} of {reference}"


def _eval_results(result: Mapping[str, Any], dataset: str) -> list[EvalResult]:
    """The measured numbers in the format of model hubs, without those that are not finite."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=key,
            metric_name=label,
            metric_value=result[key]["value"],
            metric_args={end: result[key][end] for end in ("low", "high") if math.isfinite(result[key][end])},
        )
        for label, key in _measured(result)
        if math.isfinite(result[key]["value"])
    ]


def _shown(numbers: Mapping[str, Any]) -> str:
    return str(numbers.get("text") or "{value:.3f} [{low:.3f}, {high:.3f}]".format(**numbers))


def _judges(result: Mapping[str, Any]) -> str:
    judges = result.get("judges", {})
    rows = [f"| gain before the judge {name} | {_shown(numbers['gain'])} |" for name, numbers in judges.items()]
    rows += [
        f"| win rate against {opponent}, pairs judged by {name} | {_shown(wins)} |"
        for name, numbers in result.get("pairwise", {}).items()
        for opponent, wins in numbers["win_rate"].items()
    ]
    return "".join(f"{row}\n" for row in rows)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _list(value: Any) -> str:
    if isinstance(value, Mapping):  # several eval sets
        return ", ".join(f"{name} `{item}`" for name, item in value.items())
    values = value if isinstance(value, list | tuple) else [value]
    return ", ".join(f"`{item}`" for item in values if item is not None)


def _weights(config: Mapping[str, Any]) -> str:
    weights, how = config.get("reward_weights"), config.get("reward_aggregation", "sum")
    said = [f"weights {', '.join(_plain(w) for w in weights)}"] if isinstance(weights, list) else []
    said += [f"combined by `{how}`"] if how != "sum" else []
    return f" ({'; '.join(said)})" if said else ""


def _held(config: Mapping[str, Any], objective: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    if "merge" in config:
        return "merged, as `merge.json` says"
    if fraction := objective.get("average_weights"):
        return f"the running average of the run's weights, over about the last {fraction:.0%} of its steps"
    if "last_step" in result:
        return f"those of step {result['steps']}, the best by `{config.get('metric_for_best_model')}`"
    return "those that were saved last" if result["steps"] is None else "those of the last step"


def _steps(result: Mapping[str, Any]) -> str:
    """Steps taken, the planned number, and why the run stopped earlier, as far as the run states it."""
    planned, reason = result.get("planned_steps"), result.get("stopped")
    steps = result.get("last_step", result["steps"])
    if steps is None:
        return "number of steps not recorded"
    taken = f"{steps} steps" if planned in (None, steps) else f"{steps} of {planned} steps"
    return taken + (f" (stopped: {reason})" if reason else "")


def _length(config: Mapping[str, Any]) -> int:
    """Maximum tokens of an answer in training, which is also in `generation_config.json`."""
    return int(config.get("max_completion_length", MAX_COMPLETION_LENGTH))


def _at_most(result: Mapping[str, Any]) -> str:
    """The maximum length of the measured answers, if the result states it."""
    length = result.get("max_completion_length")
    return "" if length is None else f" with answers of at most {length} tokens"


def _measured_at(config: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """The maximum length of the measured answers, if it is not that of `generation_config.json`."""
    length = result.get("max_completion_length")
    return "" if length in (None, _length(config)) else f" (measured with at most {length})"


def _held_out(result: Mapping[str, Any]) -> str:
    """The evaluated prompts, with the name of their set."""
    name = f"{result['held_out']} " if "held_out" in result else ""
    return f"{name}{_list(result['dataset'])}".strip()
