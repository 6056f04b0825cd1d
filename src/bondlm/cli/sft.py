"""`bondlm sft`: supervised fine-tuning on prompts with answers, the stage before BOND."""

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from bondlm.cli.console import make_console, say
from bondlm.cli.options import SFT
from bondlm.cli.train import lora_config, require
from bondlm.errors import ConfigError, NonFiniteError
from bondlm.runs.ending import best_step
from bondlm.runs.folder import locked

FACTS_FILE = "sft.json"


def run(options: dict[str, Any]) -> int:
    """Read and check the rows, train, save an ordinary model or adapter folder, and print the held-out loss."""
    from bondlm.cli.training import checked, fit, fresh_folder, quiet, silence, training_arguments, write_facts
    from bondlm.data.prompts import overlap
    from bondlm.stages.rows import read_answers

    require(options)
    options = checked(options, {})
    _require_evaluations(options)
    column = str(options.get("completion_column", "completion"))
    train_rows = read_answers(options["train_dataset"], column)
    eval_rows = read_answers(options["eval_dataset"], column) if options.get("eval_dataset") else []
    folder, console = fresh_folder(options, "runs/sft"), make_console()
    with locked(folder):
        with console.status("loading PyTorch and the model"):
            from bondlm.cli.prompting import rendering_of
            from bondlm.stages.sft import sft_trainer

            quiet()
            rate = 2e-4 if options.get("use_peft") else 1e-4
            trainer = sft_trainer(
                str(options["model"]),
                train_rows,
                eval_rows,
                training_arguments(options, folder, SFT, rate, len(train_rows)),
                peft_config=lora_config(options),
                max_prompt_length=options.get("max_prompt_length"),
                max_completion_length=int(options.get("max_completion_length", 256)),
                rendering=rendering_of(options),
            )
        if common := overlap(train_rows, eval_rows):
            say(
                console,
                f"warning: {common} of {len(eval_rows)} rows of eval_dataset have a prompt that is also in "
                "train_dataset: the loss on these says little",
            )
        silence(trainer)
        before = _loss(trainer) if eval_rows else None
        seconds = fit(trainer, console)
        after = _loss(trainer) if eval_rows else None
        if after is not None and not isfinite(after):
            raise NonFiniteError(f"the held-out loss is {after} after training: lower learning_rate")
        best = best_step(trainer.args, trainer.state)
        trainer.save_model(str(folder))
        write_facts(
            folder,
            FACTS_FILE,
            {
                "model": str(options["model"]),
                "rows": len(train_rows),
                "steps": trainer.state.global_step,
                **({} if best is None else {"weights_of_step": best}),
                "seconds": seconds,
                "held_out_loss": None if after is None else {"before": before, "after": after, "rows": len(eval_rows)},
            },
        )
        if best is not None:
            console.print(f"weights: of step {best}, the best by the held-out loss")
        if after is not None:
            console.print(f"held-out loss per token: {before:.3f} -> {after:.3f}")
        say(console, f"model: {Path(folder)}")
    return 0


def _loss(trainer: Any) -> float:
    return float(trainer.evaluate()["eval_loss"])


def _require_evaluations(options: Mapping[str, Any]) -> None:
    """Check that the evaluations that settings refer to exist.

    Raises:
        ConfigError: there are none.
    """
    from bondlm.config.checks import MEASURING

    is_during = (options.get("eval_strategy") or "no") != "no"
    if not options.get("eval_dataset"):
        for name, asks in {"eval_strategy": is_during, "eval_on_start": options.get("eval_on_start")}.items():
            if asks:
                raise ConfigError(f"{name}={options[name]!r}: there is no eval_dataset; set it, or remove {name}")
    askers = {
        "load_best_model_at_end": options.get("load_best_model_at_end"),
        "save_strategy": options.get("save_strategy") == "best",
        "lr_scheduler_type": options.get("lr_scheduler_type") in MEASURING,
        "eval_steps": options.get("eval_steps"),
    }
    for name, asks in askers.items():
        if asks and not is_during:
            raise ConfigError(
                f"{name}={options[name]!r} needs evaluations: set eval_strategy='steps' with eval_steps, and an "
                "eval_dataset"
            )
