"""The model card of a run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CITATION = """```bibtex
@inproceedings{sessa2025bond,
  title = {{BOND}: Aligning {LLMs} with Best-of-N Distillation},
  author = {Sessa, Pier Giuseppe and others},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  note = {arXiv:2407.14622}
}
```"""


def write_card(folder: Path, trainer: Any, result: Mapping[str, Any]) -> None:
    """Write README.md: base model, objective, the measured numbers, how to load it, the paper."""
    args, core = trainer.args, trainer.roles.core
    base = core.config._name_or_path
    rewards = ", ".join(f"{reward.name} (weight {reward.weight:g})" for reward in trainer.rewards)
    kind = "LoRA adapter" if trainer.roles.is_peft else "model"
    numbers = "\n".join(
        f"| {label} | {_shown(result[key])} |"
        for label, key in (
            ("effective N", "effective_n"),
            ("win rate against the base model", "win_rate"),
            ("KL to the base model, nats per completion", "kl"),
            ("reward", "reward"),
        )
    )
    header = f"---\nbase_model: {base}\nlibrary_name: {'peft' if trainer.roles.is_peft else 'transformers'}\n"
    header += "tags: [bondlm, bond, best-of-n, rlhf]\n---\n"
    text = f"""{header}
# {kind.capitalize()} aligned with {args.objective} (Best-of-N Distillation)

One sample of this {kind} was measured to be worth Best-of-{result["effective_n"]["text"]} of `{base}`,
on {result["num_prompts"]} held-out prompts at temperature 1, judged by the reward that it was trained on.

| measured | value and 95% interval |
|---|---|
{numbers}

- objective: {args.objective}, beta {args.beta}, gamma {args.gamma}, anchor {args.anchor} (eta {args.eta})
- reward: {rewards}
- training: {result["steps"]} steps, learning rate {args.learning_rate:g}, at most {args.max_completion_length} tokens

A reward is not a person: a higher reward says nothing about facts or safety that the reward does not measure.

{CITATION}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _shown(numbers: Mapping[str, Any]) -> str:
    return str(numbers.get("text") or "{value:.3f} [{low:.3f}, {high:.3f}]".format(**numbers))
