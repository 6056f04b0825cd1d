"""The data of a run: prompts or scored samples to train on, held-out prompts, and rows that are left out."""

import copy
import logging
from pathlib import Path
from typing import Any

from datasets import Dataset

from bondlm.data.held_out import main_set
from bondlm.data.origin import check_rendering, origins_of, time_of
from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.data.scored import check_inputs, is_scored, samples_per_prompt
from bondlm.data.sources import named_sets
from bondlm.data.stream import PromptStream, is_stream
from bondlm.errors import ConfigError
from bondlm.training.dropped import DropBudget

_log = logging.getLogger(__name__)


class RunData:
    """Reads a run's data, and reports unusable data before a model is loaded."""

    def __init__(self, args: Any, source: Any, held_out: Any, *, model: str, reward_funcs: Any) -> None:
        """Take the data arguments of the trainer's constructor; `model` is the policy's name.

        Raises:
            ConfigError: settings and data do not fit together.
            DataError: rows that cannot be used.
        """
        self._args, self._held_out = args, held_out
        self.drops = DropBudget(args.max_skipped_frac, Path(str(args.output_dir)), skips_rows=args.on_bad_row == "skip")
        self._stream = source if args.streaming or is_stream(source) else None
        if self._stream is not None:
            check_streaming(args)
        takes_ids = args.prompt_format == "rendered"
        is_whole = source is not None and self._stream is None
        prompts = self.drops.load(source, token_ids=takes_ids) if is_whole else None
        self._is_scored = prompts is not None and is_scored(prompts)
        self._origins = origins_of(source) if self._is_scored else []
        self.main_eval = main_set(args, held_out)
        has_prompts, has_held_out = source is not None, held_out is not None
        check_inputs(
            args, prompts, self._origins, model, reward_funcs, has_prompts=has_prompts, has_held_out=has_held_out
        )
        self.prompts = self.drops.usable(prompts, args) if prompts is not None and self._is_scored else prompts
        self.num_logged = samples_per_prompt(self.prompts)
        self.drawn = time_of(self._origins)

    def encoded(self, encoder: PromptEncoder) -> Dataset | PromptStream | None:
        """The training prompts with their ids and, if scored, their samples, whose number per prompt is `num_logged`.

        Raises:
            ConfigError, DataError: prompts that cannot be used, or too few for a step.
        """
        if self._stream is not None:
            return self._streamed(self._stream, encoder)
        prompts = self.prompts
        if prompts is None:
            return None
        if self._is_scored:
            check_rendering(self._origins, encoder, prompts[0]["prompt"])
            prompts = self.drops.group(prompts, encoder, self._args)
            self.num_logged = samples_per_prompt(prompts)
        encoded = self.drops.encode(prompts, encoder)
        require_a_batch(len(encoded), self._args)
        return encoded

    def _streamed(self, source: Any, encoder: PromptEncoder) -> PromptStream:
        skips_rows = self._args.on_bad_row == "skip"
        stream = PromptStream(source, encoder, self.drops.note_rows, skips_rows=skips_rows)
        if {"completion", "reward"} <= set(stream.columns):
            raise ConfigError("streaming: scored samples of a prompt may stand anywhere, so they are read whole")
        _log.warning(
            "train_dataset is streamed: unusable rows are found only when their turn comes, and it cannot be "
            "checked whether held-out prompts are among the rows, or whether later rows have changed since a checkpoint"
        )
        return stream

    def encoded_for_evaluation(self, encoder: PromptEncoder) -> Any:
        """The held-out prompts, or a dictionary of named sets; None if there are none.

        Raises:
            ConfigError, DataError: prompts that cannot be used.
        """
        if self._held_out is None:
            return None
        if (sets := named_sets(self._held_out)) is None:
            return encoder.encoded(self._held_out, held_out=True)
        return {name: encoder.encoded(part, held_out=True) for name, part in sets.items()}


def check_streaming(args: Any) -> None:
    """Check that a single process reads the stream, for a known number of steps.

    Raises:
        ConfigError: there are several processes, or no `max_steps`.
    """
    if args.max_steps <= 0:
        raise ConfigError(f"max_steps={args.max_steps}: a streamed train_dataset has no length; set max_steps above 0")
    if args.world_size > 1:
        raise ConfigError(
            f"world_size={args.world_size}: a streamed train_dataset must be read by a single process, otherwise each "
            "prompt would be trained several times. Use one process, or read it whole"
        )
    if args.dataloader_num_workers > 0:
        _log.warning(
            "dataloader_num_workers=%d: a streamed train_dataset is read by the run itself, in its order; 0 is used",
            args.dataloader_num_workers,
        )
        args.dataloader_num_workers, args.dataloader_persistent_workers = 0, False
        args.dataloader_prefetch_factor = args.dataloader_multiprocessing_context = None  # only for workers
    args.accelerator_config = copy.copy(args.accelerator_config)  # the caller's is not changed
    args.accelerator_config.dispatch_batches = False  # rows of text cannot be dispatched as tensors


def require_a_batch(rows: int, args: Any, what: str = "prompts") -> None:
    """Check that an epoch has at least one step.

    Raises:
        ConfigError: `dataloader_drop_last` drops its only batch.
    """
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < batch:
        raise ConfigError(
            f"dataloader_drop_last=True leaves out the only batch: {rows} {what} are fewer than the {batch} of "
            "one (per_device_train_batch_size on each process). Set it to False, or lower the batch size"
        )
