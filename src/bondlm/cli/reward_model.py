"""`bondlm reward-model`: a reward model from preference pairs, with its held-out accuracy."""

from typing import Any

from bondlm.cli.console import make_console
from bondlm.cli.options import REWARD_MODEL
from bondlm.cli.train import lora_config
from bondlm.errors import ConfigError, DataError
from bondlm.runs.folder import locked


def run(options: dict[str, Any]) -> int:
    """Read and check the pairs, train, save a classifier folder for `reward_funcs`, say how often it is right."""
    from bondlm.cli.training import fit, fresh_folder, quiet, silence, training_arguments, write_facts

    train_rows, eval_rows = _rows(options)
    folder, console = fresh_folder(options, "runs/reward-model"), make_console()
    with locked(folder):
        with console.status("loading PyTorch and the model"):
            from bondlm.rewards.classifier import FACTS_FILE
            from bondlm.stages.reward_model import held_out_accuracy, preference_trainer

            quiet()
            rate = 2e-4 if options.get("use_peft") else 5e-5
            trainer, pairs = preference_trainer(
                str(options["model"]),
                train_rows,
                training_arguments(options, folder, REWARD_MODEL, rate),
                peft_config=lora_config(options),
                max_length=options.get("max_length"),
                prompt_format=options.get("prompt_format", "auto"),
            )
        silence(trainer)
        seconds = fit(trainer, console)
        model: Any = trainer.model
        result = held_out_accuracy(model, pairs, eval_rows)
        if options.get("use_peft"):
            trainer.model = model.merge_and_unload()  # a reward is loaded as one model
        trainer.save_model(str(folder))
        accuracy = result.accuracy
        write_facts(
            folder,
            FACTS_FILE,
            {
                "model": str(options["model"]),
                "train_pairs": len(train_rows),
                "prompt_format": pairs.prompt_format,
                "steps": trainer.state.global_step,
                "seconds": seconds,
                "accuracy": {"value": accuracy.value, "low": accuracy.low, "high": accuracy.high},
                "margin": result.margin,
                "held_out_pairs": result.pairs,
                "held_out_prompts": result.prompts,
            },
        )
        console.print(
            f"held-out accuracy {accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}] on {result.pairs} pairs "
            f"of {result.prompts} prompts",
            highlight=False,
        )
        console.print(f"reward model: {folder} (use it as reward_funcs: {folder})", soft_wrap=True)
    return 0


def _rows(options: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out pairs.

    Raises:
        ConfigError: a required option is missing.
        DataError: pairs that cannot be used, or prompts that are in both parts.
    """
    from bondlm.data.prompts import overlap
    from bondlm.stages.rows import hold_out, read_preferences

    for name in ("model", "train_dataset"):
        if not options.get(name):
            raise ConfigError(f"{name} is required: set it in the config or with --{name}")
    train_rows = read_preferences(options["train_dataset"])
    if not options.get("eval_dataset"):
        return hold_out(train_rows)
    eval_rows = read_preferences(options["eval_dataset"])
    common = overlap(train_rows, eval_rows)
    if common:
        raise DataError(
            f"{options['eval_dataset']}: {common} of {len(eval_rows)} rows have a prompt that is also in "
            f"{options['train_dataset']}: an accuracy on these says little. Split by prompt, or leave eval_dataset out"
        )
    return train_rows, eval_rows
