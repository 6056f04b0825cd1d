"""The data of a run: prompts or scored samples to train on, prompts held out, and what of them is left out."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from bondlm.data.held_out import main_set
from bondlm.data.origin import check_rendering, origins_of, time_of
from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.data.scored import check_inputs, is_scored, samples_per_prompt
from bondlm.data.sources import named_sets
from bondlm.errors import ConfigError
from bondlm.training.dropped import DropBudget


class RunData:
    """Reads what a run trains on, and says before a model is loaded what cannot be used."""

    def __init__(self, args: Any, source: Any, held_out: Any, *, model: str, reward_funcs: Any) -> None:
        """Data as the constructor of the trainer takes them; `model` is the policy's name.

        Raises:
            ConfigError: settings and data do not fit.
            DataError: rows that cannot be used.
        """
        self._args, self._held_out = args, held_out
        self.drops = DropBudget(args.max_skipped_frac, Path(str(args.output_dir)), skips_rows=args.on_bad_row == "skip")
        takes_ids = args.prompt_format == "rendered"
        prompts = None if source is None else self.drops.load(source, token_ids=takes_ids)
        self._is_scored = prompts is not None and is_scored(prompts)
        self._origins = origins_of(source) if self._is_scored else []
        self.main_eval = main_set(args, held_out)
        check_inputs(args, prompts, self._origins, model, reward_funcs, has_held_out=held_out is not None)
        self.prompts = self.drops.usable(prompts, args) if prompts is not None and self._is_scored else prompts
        self.num_logged = samples_per_prompt(self.prompts)
        self.drawn = time_of(self._origins)

    def encoded(self, encoder: PromptEncoder, num_samples: int) -> Dataset | None:
        """The training prompts with their ids, scored ones with their first `num_samples` samples.

        Raises:
            ConfigError, DataError: prompts that cannot be used, or too few for a step.
        """
        prompts = self.prompts
        if prompts is None:
            return None
        if self._is_scored:
            check_rendering(self._origins, encoder, prompts[0]["prompt"])
            prompts = self.drops.group(prompts, encoder, num_samples)
        encoded = self.drops.encode(prompts, encoder)
        _check_number(len(encoded), self._args)
        return encoded

    def encoded_for_evaluation(self, encoder: PromptEncoder) -> Any:
        """The held-out prompts, or each named set of them; None without any.

        Raises:
            ConfigError, DataError: prompts that cannot be used.
        """
        if self._held_out is None:
            return None
        if (sets := named_sets(self._held_out)) is None:
            return encoder.encoded(self._held_out, held_out=True)
        return {name: encoder.encoded(part, held_out=True) for name, part in sets.items()}


def _check_number(num_prompts: int, args: Any) -> None:
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and num_prompts < batch:
        raise ConfigError(
            f"dataloader_drop_last=True leaves out the only batch: {num_prompts} prompts are fewer than the {batch} of "
            "one (per_device_train_batch_size on each process). Set it to False, or lower the batch size"
        )
