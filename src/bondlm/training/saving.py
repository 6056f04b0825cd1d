"""Save a run's model and upload its folder, at the end and without users' texts unless requested."""

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

# Errors if the hub cannot be reached, including those of the HTTP library: httpx or httpx2, depending on the version of
# huggingface_hub.
HUB_ERRORS: Any = (*HfHubHTTPError.__bases__, ValueError)
PAGE_FILE, CARD_FILE = "report.html", "README.md"  # the report shows prompts and completions


class SavingTrainer(Trainer):
    """A Trainer that saves and uploads a run folder."""

    roles: Any
    average: Any
    encoder: Any
    writes_settings: Callable[[], None] | None = None  # set by a command that has compared them

    def __init__(self, model: Any, **arguments: Any) -> None:
        """As `Trainer`, but restore the `use_cache` that it turns off: each pass here sets it explicitly."""
        config = model.config
        is_cached = getattr(config, "use_cache", None)
        super().__init__(model=model, **arguments)
        if is_cached is not None:  # otherwise the saved model would not generate like the given one
            config.use_cache = is_cached

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: a rollout costs more than the one forward pass that Trainer assumes."""
        return 0

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a folder that `from_pretrained` loads, with only the policy's adapter.

        It has the averaged weights, if there are any; a checkpoint has the last step's weights and the average
        separately.
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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
            (folder / "training_args.bin").unlink(missing_ok=True)  # an unused pickle that contains access tokens

    def init_hf_repo(self, token: str | None = None, *more: Any, **named: Any) -> None:
        """Create the repository at the start, so that a run that could not upload its result fails at once.

        Further arguments depend on the version of transformers.

        Raises:
            ConfigError: it cannot be created.
        """
        with _asking_the_hub(str(self.args.hub_model_id or self.args.output_dir)):
            super().init_hf_repo(token, *more, **named)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write Trainer's card, unless there is already a card with measured results."""
        if (Path(str(self.args.output_dir)) / CARD_FILE).is_file():
            return
        if "dataset_name" in kwargs:  # TRL's name
            kwargs["dataset"] = kwargs.pop("dataset_name")
        settings: Any = self.args
        given = settings.per_device_eval_batch_size
        if given is None:  # the card multiplies it, but all held-out prompts are answered together
            held_out: Any = self.eval_dataset
            settings.per_device_eval_batch_size = len(held_out) if isinstance(held_out, Dataset) else 0
        try:
            super().create_model_card(*args, **kwargs)
        finally:
            settings.per_device_eval_batch_size = given

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not available, since completions have no labels.

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
            # Older versions of transformers do not accept `private`.
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
    """A generation config to answer as in the evaluation: by the model's own distribution, to the same end tokens."""
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
    """Patterns of files not to upload: checkpoints, locks, pickles; and, unless `samples`, files with users' texts."""
    patterns = [f"{LOCK_FILE}*", OWNER_FILE, SEALED_FILE, "_*", "*.tmp", "checkpoint-*", "training_args.bin"]
    patterns.append(ENVIRONMENT_FILE)  # it contains a path of this machine
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
