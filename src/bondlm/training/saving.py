"""What a run leaves: its model, and the upload of its folder, at the end and without users' texts unless asked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import GenerationConfig, Trainer

from bondlm.errors import ConfigError
from bondlm.runs.folder import ENVIRONMENT_FILE, LOCK_FILE, METRICS_FILE, OWNER_FILE
from bondlm.runs.manifest import SEALED_FILE

# With the HTTP library's own: httpx's or httpx2's, by the age of huggingface_hub, when the hub cannot be reached.
HUB_ERRORS: Any = (*HfHubHTTPError.__bases__, ValueError)
PAGE_FILE, CARD_FILE = "report.html", "README.md"  # the page shows prompts and completions


class SavingTrainer(Trainer):
    """Trainer, whose saves and uploads are those of a run folder."""

    roles: Any
    average: Any
    encoder: Any
    writes_settings: Callable[[], None] | None = None  # a command's, which has compared them

    def __init__(self, model: Any, **arguments: Any) -> None:
        """As `Trainer`, which turns the model's `use_cache` off: each pass here says what it wants."""
        config = model.config
        is_cached = getattr(config, "use_cache", None)
        super().__init__(model=model, **arguments)
        if is_cached is not None:  # or what is saved would not generate as what was given
            config.use_cache = is_cached

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: a rollout's work is not that of one forward pass."""
        return 0

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a folder that `from_pretrained` loads; of the adapters the policy's alone.

        Averaged weights, where there are such; a checkpoint holds the last step's, and the average beside them.
        """
        with nullcontext() if _internal_call else self.average.in_place():
            self._save_policy(output_dir, _internal_call)
        if self.args.should_save:
            answering(self.encoder).save_pretrained(str(output_dir if output_dir is not None else self.args.output_dir))

    def _save_policy(self, output_dir: str | None, _internal_call: bool) -> None:
        if not (self.roles.is_peft or self.is_fsdp_enabled or self.is_deepspeed_enabled):
            super().save_model(output_dir, _internal_call)
            return
        output_dir = str(output_dir if output_dir is not None else self.args.output_dir)
        self.roles.save(output_dir, is_main=self.args.should_save)
        if self.args.should_save:
            self.encoder.tokenizer.save_pretrained(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def init_hf_repo(self, token: str | None = None, *more: Any, **named: Any) -> None:
        """Make the repository, at start: a run whose result has nowhere to go ends before it begins.

        What else there is depends on the version of transformers.

        Raises:
            ConfigError: it cannot be made.
        """
        with _asking_the_hub(str(self.args.hub_model_id or self.args.output_dir)):
            super().init_hf_repo(token, *more, **named)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's card, unless there is one that says what was measured."""
        if (Path(str(self.args.output_dir)) / CARD_FILE).is_file():
            return
        if "dataset_name" in kwargs:  # TRL's name
            kwargs["dataset"] = kwargs.pop("dataset_name")
        settings: Any = self.args
        given = settings.per_device_eval_batch_size
        if given is None:  # the card multiplies it: all held-out prompts are answered together
            held_out: Any = self.eval_dataset
            settings.per_device_eval_batch_size = len(held_out) if isinstance(held_out, Dataset) else 0
        try:
            super().create_model_card(*args, **kwargs)
        finally:
            settings.per_device_eval_batch_size = given

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """There is nothing to predict: completions have no labels.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("predict: completions have no labels. evaluate() measures held-out prompts, sample() draws")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Save the model and upload the run folder with its card; samples only with `hub_samples`.

        Raises:
            ConfigError: the repository cannot be written.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            # Older versions of transformers do not take `private`.
            self.init_hf_repo(token, **({} if private is None else {"private": private}))
        self.save_model(_internal_call=True)
        self.create_model_card(**card)
        if not self.is_world_process_zero():
            return None
        args: Any = self.args
        folder, repository = Path(str(args.output_dir)), str(self.hub_model_id)
        hub: Any = HfApi(library_name="bondlm")
        with _asking_the_hub(repository):
            return hub.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=commit_message,
                token=token or args.hub_token,
                revision=revision or args.hub_revision,
                run_as_future=not blocking,
                ignore_patterns=kept_back(folder, samples=args.hub_samples),
            )


def answering(encoder: Any) -> GenerationConfig:
    """How whoever loads the folder answers as the evaluated policy did: from its own distribution, to the same ends."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=encoder.max_completion_length,
        eos_token_id=list(encoder.eos_ids),
        pad_token_id=encoder.pad_id,
        bos_token_id=encoder.tokenizer.bos_token_id,
        decoder_start_token_id=encoder.start_id,
    )


def kept_back(folder: Path, *, samples: bool) -> list[str]:
    """Patterns of what stays here: checkpoints, locks, pickles; and, unless `samples`, files with users' texts."""
    patterns = [f"{LOCK_FILE}*", OWNER_FILE, SEALED_FILE, "_*", "*.tmp", "checkpoint-*", "training_args.bin"]
    patterns.append(ENVIRONMENT_FILE)  # it has a path of this machine
    if not samples:
        texts = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jsonl"))
        patterns += [name for name in texts if name != METRICS_FILE] + [PAGE_FILE]
    return patterns


@contextmanager
def _asking_the_hub(name: str) -> Iterator[None]:
    try:
        yield
    except HUB_ERRORS as error:
        raise ConfigError(
            f"push_to_hub: the repository {name!r} cannot be written ({str(error).strip().partition(chr(10))[0]}). "
            "Log in with `hf auth login` or set HF_TOKEN, see that hub_model_id is yours, or remove push_to_hub"
        ) from error
