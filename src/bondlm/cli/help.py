"""The help texts of the commands, 80 columns wide.

The names, texts and defaults of `BONDConfig`'s fields are read from its source, so that help needs no heavy imports.
"""

import ast
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bondlm import __version__
from bondlm.cli.options import COMMANDS, LORA

WIDTH, INDENT = 80, 26
SECTION = "# -- "  # a comment in the source of `BONDConfig` that begins a section of its fields
# The fields of `transformers.TrainingArguments` that most runs need; all its other fields are options too.
OF_TRANSFORMERS = {
    "output_dir": "The run folder. Default: runs/bond.",
    "max_steps": "Optimizer steps; -1 goes by num_train_epochs. Default: -1.",
    "num_train_epochs": "Passes over train_dataset. Default: 3.",
    "per_device_train_batch_size": "Prompts per process in a batch. Default: 8.",
    "gradient_accumulation_steps": "Batches per optimizer step. Default: 1.",
    "seed": "For samples, order and a new adapter. Default: 42.",
    "bf16": "Compute in bf16 (autocast). Default: false.",
    "gradient_checkpointing": "Trade time for memory. Default: off.",
    "use_cpu": "Use the CPU even if there is a GPU. Default: false.",
    "eval_strategy": "'steps' evaluates every eval_steps, 'epoch' after each pass. Default: 'no', only at the end.",
    "eval_steps": "Steps between two evaluations. Default: logging_steps.",
    "save_steps": "Steps between two checkpoints. Default: 500.",
    "save_total_limit": "Checkpoints to keep, at least 2. Default: 2.",
    "push_to_hub": "Upload the run folder at the end. Default: false.",
}
# Options that come before the fields of a section in the group of that name.
GROUPS: dict[str, tuple[str, ...]] = {
    "basics": (
        *("model", "reward_funcs", "train_dataset", "eval_dataset", "output_dir", "preset", "max_steps"),
        *("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
    ),
    "adapter": tuple(LORA),
    "objective": (),
    "data": (),
    "rewards": (),
    "engine": ("bf16", "gradient_checkpointing", "use_cpu"),
    "evaluation": ("judges", "eval_strategy", "eval_steps"),
    "saving and logging": ("resume", "allow_config_change", "save_steps", "save_total_limit", "push_to_hub"),
}


class OwnField(NamedTuple):
    """A field of `BONDConfig`, read from its source."""

    section: str
    default: Any
    text: str


def bond_fields() -> dict[str, OwnField]:
    """Every field that `BONDConfig` defines or redefines, in order."""
    source = (Path(__file__).parents[1] / "config" / "bond_config.py").read_text(encoding="utf-8")
    sections = {i: line.strip().removeprefix(SECTION) for i, line in enumerate(source.splitlines()) if SECTION in line}
    tree = ast.parse(source)
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "BONDConfig")
    return {
        node.target.id: OwnField(
            sections[max(i for i in sections if i < node.lineno)],
            *(ast.literal_eval(argument) for argument in node.value.args[:2]),
        )
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call)
    }


def greeting() -> str:
    """The output of `bondlm` without a command."""
    return f"""bondlm {__version__}: Best-of-N quality from one sample.

  bondlm check --config run.yaml              try everything once, in a minute
  bondlm train --config run.yaml              train, measure, write a run folder
  bondlm sample --model RUN --prompt TEXT     ask the trained model

run.yaml needs model, reward_funcs and train_dataset; `bondlm train --help` has
the rest, `bondlm --help` all commands."""


def main_help() -> str:
    """The output of `bondlm --help`."""
    rows = [_entry(name, text, dashes="", indent=16) for name, (text, _) in COMMANDS.items()]
    usage = "usage: bondlm COMMAND [--config FILE.yaml] [--name value ...]"
    return "\n".join([usage, "", "commands:", *rows, "", _EXAMPLES, ""])


def command_help(command: str) -> str:
    """The output of `bondlm COMMAND --help`."""
    text, names = COMMANDS[command]
    sections = [f"usage: bondlm {command} [--config FILE.yaml] [--name value ...]", "", textwrap.fill(text, WIDTH)]
    if command in ("train", "check"):
        for group, entries in _train_groups(names):
            sections += ["", f"{group}:", *(_entry(name, about) for name, about in entries)]
        sections += ["", "Every other field of transformers.TrainingArguments is an option, too."]
        return "\n".join(sections)
    sections += ["", *(_entry(name, about) for name, about in names.items())]
    if command in ("sft", "reward-model"):
        more = (
            "Every field of transformers.TrainingArguments is an option, such as learning_rate, max_steps, bf16, seed."
        )
        sections += ["", textwrap.fill(more, WIDTH)]
    return "\n".join(sections)


def _train_groups(names: Mapping[str, str]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Each group with the names and texts of its options."""
    own = bond_fields()
    texts = OF_TRANSFORMERS | dict(names) | {name: _with_default(field) for name, field in own.items()}
    grouped = {name for group in GROUPS.values() for name in group}
    for group, first in GROUPS.items():
        rest = [name for name, field in own.items() if field.section == group and name not in grouped]
        rest += [name for name in names if group == "basics" and name not in grouped]
        yield group, [(name, texts[name]) for name in (*first, *rest)]


def _with_default(field: OwnField) -> str:
    """The text of a field, with its default unless the text states it."""
    if field.default is None or "default" in field.text.lower():
        return field.text
    value = yaml.safe_dump(field.default).removesuffix("\n...\n").strip()
    return f"{field.text} Default: {value}."


def _entry(name: str, about: str, *, dashes: str = "--", indent: int = INDENT) -> str:
    """An option or a command with its text next to it, or below if the name is long."""
    lines = textwrap.wrap(about, WIDTH - indent, break_long_words=False, break_on_hyphens=False)
    head = f"  {dashes}{name}"
    if len(head) <= indent - 2:
        head += " " * (indent - len(head)) + lines.pop(0)
    return "\n".join([head, *(" " * indent + line for line in lines)])


_EXAMPLES = """examples:
  bondlm check  --config examples/everyday/jbond.yaml
  bondlm train  --config examples/everyday/jbond.yaml --eta 0.1
  bondlm sample --model runs/everyday --prompt "How do I boil an egg?"
  bondlm score  --model Qwen/Qwen3-0.6B --reward_funcs org/reward-model \\
                --dataset prompts.jsonl --output scored.jsonl
  bondlm eval   --model runs/everyday --judge similarity:models/all-minilm-l6-v2
  bondlm prefer scored.jsonl
  bondlm merge  runs/one runs/two --output_dir runs/merged
  bondlm report runs/everyday"""
