"""`bondlm reward-model`: a reward model from preference pairs, or the mean of several, with its held-out accuracy."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bondlm.cli.console import make_console, say
from bondlm.cli.options import REWARD_MODEL
from bondlm.cli.train import lora_config, require
from bondlm.errors import DataError
from bondlm.objectives.rules import Rule, off, one_of
from bondlm.runs.folder import is_main_process, locked

Rows = list[dict[str, Any]]

_MEASURED_ONCE = "the accuracy is measured once, after training; remove it"
RULES: dict[str, Rule] = {
    "label_smoothing_factor": off("the loss is Bradley-Terry's, without labels; remove it (flip_labels swaps pairs)"),
    "remove_unused_columns": off("every pair would be empty, as it has none of the model's columns; remove it"),
    "train_sampling_strategy": one_of("random", "sequential", why="a pair has two lengths"),
    "length_column_name": off("pairs are not sorted by length; remove it"),
    "eval_strategy": Rule(lambda value: value in ("no", False), _MEASURED_ONCE),
    "save_strategy": Rule(lambda value: value != "best", _MEASURED_ONCE),
    "lr_scheduler_type": Rule(lambda value: value not in ("reduce_lr_on_plateau", "greedy"), _MEASURED_ONCE),
    **dict.fromkeys(("eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps"), off(_MEASURED_ONCE)),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), off(_MEASURED_ONCE)),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), off("the accuracy is as precise as the training; remove it")),
}


def run(options: dict[str, Any]) -> int:
    """Read and check the pairs, train, save a classifier folder for `reward_funcs`, and print its accuracy."""
    from bondlm.cli.training import checked, fresh_folder, quiet, training_arguments, write_facts

    require(options)
    options = checked(options, RULES)
    train_rows, eval_rows, flipped = _rows(options)
    folder, console = fresh_folder(options, "runs/reward-model"), make_console()
    with locked(folder):
        if count := sum("margin" in row for row in train_rows):
            console.print(f"margin: the loss uses the margin of {count} of {len(train_rows)} training pairs")
        with console.status("loading PyTorch and the model"):
            from bondlm.rewards.classifier import FACTS_FILE
            from bondlm.stages.reward_model import load_base
            from bondlm.stages.warm import members_of

            quiet()
            rate = 2e-4 if options.get("use_peft") else 5e-5
            members = members_of(options, rate)
            training_arguments(options, folder, REWARD_MODEL, rate, len(train_rows))  # refused before a model is loaded
            base, tokenizer = load_base(str(options["model"]), seed=members[0].seed)
        if flipped:
            swapped = f"{flipped} of {len(train_rows)} training pairs"
            console.print(f"flip_labels: chosen and rejected are swapped in {swapped}")
        job = _Job(options, folder, console, train_rows, eval_rows, base, tokenizer)
        facts = job.one(members[0]) if len(members) == 1 else job.mean_of(members)
        known = {"model": str(options["model"]), "train_pairs": len(train_rows), "flipped_pairs": flipped}
        write_facts(folder, FACTS_FILE, known | facts)
        say(console, f"reward model: {folder} (use it as reward_funcs: {folder})")
    return 0


@dataclass
class _Job:
    """The parts of the command, in order."""

    options: Mapping[str, Any]
    folder: Path
    console: Console
    train_rows: Rows
    eval_rows: Rows
    base: Any  # the model to train; of several reward models, the one whose head they share
    tokenizer: Any

    def one(self, member: Any) -> dict[str, Any]:
        """Train and save one reward model; returns facts about it."""
        trainer, margin_B, facts = self._fit(self.base, member, self.folder)
        measured = self._measured(margin_B, "held-out accuracy")
        trainer.save_model(str(self.folder))
        return facts | measured

    def mean_of(self, members: list[Any]) -> dict[str, Any]:
        """Train several and save the mean of their weights; returns facts about each, the mean, and mean scores."""
        from torch import stack
        from torch.optim.swa_utils import AveragedModel

        from bondlm.stages.reward_model import margins_of
        from bondlm.stages.warm import load_member, probe_head

        device, pairs = self._arguments(members[0], self.folder).device, self._pairs()
        with self.console.status("fitting the head that the members share"):
            probe_head(self.base.to(device), pairs, self.train_rows, **self._batches())
        mean, margins, found = AveragedModel(self.base.cpu()), [], []
        for number, member in enumerate(members, 1):
            differs = ", ".join(f"{name} {value}" for name, value in asdict(member).items())
            say(self.console, f"member {number} of {len(members)}: {differs}")
            model = load_member(member, self.base, self.tokenizer, seed=members[0].seed)
            trainer, margin_B, facts = self._fit(model, member, self.folder / f"member-{number}")
            mean.update_parameters(trainer.model.cpu())
            margins.append(margin_B)
            found.append(asdict(member) | facts | self._measured(margin_B, f"member {number}: held-out accuracy"))
        trainer.model = mean.module.to(device)
        ensemble = self._measured(stack(margins).mean(dim=0), "mean of the scores: held-out accuracy")
        margin_B = margins_of(trainer.model, pairs, self.eval_rows, **self._batches())
        facts = self._measured(margin_B, "mean of the weights: held-out accuracy")
        trainer.save_model(str(self.folder))
        self._warn_if_apart(facts, found)
        took = {name: sum(member[name] for member in found) for name in ("steps", "seconds")}
        return {"prompt_format": pairs.prompt_format} | took | facts | {"ensemble": ensemble, "members": found}

    def _pairs(self) -> Any:
        from bondlm.stages.reward_model import Pairs

        return Pairs(self.base, self.tokenizer, **self._encoding())

    def _encoding(self) -> dict[str, Any]:
        return {
            "max_length": self.options.get("max_length"),
            "prompt_format": self.options.get("prompt_format", "auto"),
        }

    def _batches(self) -> dict[str, int]:
        return {"batch_size": self.options.get("per_device_eval_batch_size") or 32}

    def _arguments(self, member: Any, folder: Path) -> Any:
        from bondlm.cli.training import training_arguments

        own = {"seed": member.seed, "learning_rate": member.learning_rate}
        return training_arguments(
            {**self.options, **own}, folder, REWARD_MODEL, member.learning_rate, len(self.train_rows)
        )

    def _fit(self, model: Any, member: Any, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
        """Train; returns the trainer with one whole model, the margins of the held-out pairs, and training facts."""
        from bondlm.cli.training import fit, silence
        from bondlm.stages.reward_model import margins_of, preference_trainer

        trainer, pairs = preference_trainer(
            model,
            self.tokenizer,
            self.train_rows,
            self._arguments(member, folder),
            peft_config=lora_config(self.options),
            **self._encoding(),
        )
        pairs.encode(self.eval_rows)  # a held-out pair that is too long is refused before the training
        silence(trainer)
        seconds = fit(trainer, self.console)
        trained: Any = trainer.model
        margin_B = margins_of(trained, pairs, self.eval_rows, **self._batches())
        if self.options.get("use_peft"):
            trainer.model = trained.merge_and_unload()  # rewards are loaded as whole models
        if is_main_process():  # another one would remove the folder that this one is about to write into
            with suppress(OSError):  # a member's folder has checkpoints, if these were requested
                folder.rmdir()
        facts = {"prompt_format": pairs.prompt_format, "steps": trainer.state.global_step, "seconds": seconds}
        return trainer, margin_B, facts

    def _measured(self, margin_B: Any, what: str) -> dict[str, Any]:
        """Compute and print the accuracy from these margins."""
        from bondlm.stages.reward_model import accuracy_of

        found = accuracy_of(margin_B, self.eval_rows)
        value, low, high = found.accuracy.value, found.accuracy.low, found.accuracy.high
        interval = f" [{low:.3f}, {high:.3f}]" if math.isfinite(low) else ""  # with one prompt there is none
        of = f"{found.pairs} pair{'s' * (found.pairs != 1)} of {found.prompts} prompt{'s' * (found.prompts != 1)}"
        say(self.console, f"{what} {value:.3f}{interval} on {of}")
        return {
            "accuracy": {"value": value, "low": low, "high": high},
            "margin": found.margin,
            "held_out_pairs": found.pairs,
            "held_out_prompts": found.prompts,
        }

    def _warn_if_apart(self, mean: Mapping[str, Any], members: list[dict[str, Any]]) -> None:
        worst = min(member["accuracy"]["value"] for member in members)
        if mean["accuracy"]["high"] < worst:
            say(
                self.console,
                f"warning: the mean of the weights is worse than its worst member ({worst:.3f}): they have moved too "
                "far apart to be averaged. Lower learning_rate, or train fewer steps",
            )


def _rows(options: dict[str, Any]) -> tuple[Rows, Rows, int]:
    """Training and held-out pairs, and the number of flipped training pairs.

    Raises:
        ConfigError: `flip_labels` is invalid.
        DataError: there are unusable pairs, or prompts in both parts.
    """
    from bondlm.data.prompts import overlap
    from bondlm.stages.rows import flip_labels, hold_out, read_preferences

    train_rows = read_preferences(options["train_dataset"])
    if options.get("eval_dataset"):
        eval_rows = read_preferences(options["eval_dataset"])
        if common := overlap(train_rows, eval_rows):
            raise DataError(
                f"{options['eval_dataset']}: {common} of {len(eval_rows)} rows have a prompt that is also in "
                f"{options['train_dataset']}: an accuracy on these says little. Split by prompt, or leave eval_dataset "
                "out"
            )
    else:
        train_rows, eval_rows = hold_out(train_rows)
    train_rows, flipped = flip_labels(train_rows, options.get("flip_labels", 0), int(options.get("seed", 42)))
    return train_rows, eval_rows, flipped
