"""`bondlm train`: from a config to a run folder with its evaluation."""

import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from bondlm.cli.console import make_console
from bondlm.errors import CheckpointError, ConfigError
from bondlm.manifest import newest_checkpoint
from bondlm.runfolder import locked

PREEMPTED, INTERRUPTED = 75, 130
CONFIG_FILE = "config.yaml"
RUN_NAMES = ("model", "reward_funcs", "train_dataset", "eval_dataset", "resume")
LORA_NAMES = ("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
# What may differ when a run goes on: how long it lasts and what it prints, not what it computes.
FREE_NAMES = {
    *(
        "max_steps",
        "num_train_epochs",
        "logging_steps",
        "save_steps",
        "eval_steps",
        "eval_strategy",
        "save_total_limit",
    ),
    *("num_logged_samples", "max_rows", "resume", "output_dir", "eval_dataset", "eval_num_samples", "target_n"),
    *("eval_num_reference_samples", "report_to"),
}


def run(options: dict[str, Any]) -> int:
    """Train, evaluate, save. Exit codes: 0 done, 75 stopped by SIGTERM and saved, 130 by Ctrl-C and saved."""
    require(options)
    console = make_console()
    with console.status("loading PyTorch and transformers"):
        from bondlm.cli.progress import ProgressReporter
        from bondlm.evaluation import evaluate_run
        from bondlm.evaluation.table import print_phases
    folder = Path(str(options.get("output_dir") or "runs/bond"))
    options = options | {"output_dir": str(folder)}
    with locked(folder):
        checkpoint = _resume_point(folder, options, console)
        with console.status(f"loading {options.get('model')}, data and rewards"):
            trainer = build_trainer(options)
        (folder / CONFIG_FILE).write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
        reporter = ProgressReporter(console, trainer)
        with reporter, _stop_on_signals(trainer) as stopped_by:
            trainer.train(resume_from_checkpoint=checkpoint)
            if stopped_by():
                return _say_stopped(console, folder, stopped_by())
            trainer.save_model()
            reporter.close_training()
            if trainer.is_world_process_zero():
                print_phases(console, *reporter.mean_phases(), reporter.evaluation_seconds)
            if trainer.eval_dataset is not None:
                evaluate_run(trainer, folder, console, reporter)
                _write_report(folder, console)
        console.print(f"run folder: {folder}", soft_wrap=True)
    return 0


def _write_report(folder: Path, console: Console) -> None:
    if find_spec("jinja2") is None or find_spec("matplotlib") is None:
        console.print("no report.html: pip install 'bondlm[report]', then bondlm report", highlight=False)
        return
    from bondlm.report import write_report

    write_report([folder])


def require(options: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a required option that is missing."""
    for name in ("model", "train_dataset"):  # rewards are optional where the samples are scored already
        if not options.get(name):
            raise ConfigError(f"{name} is required: set it in the config or with --{name}")


def build_trainer(options: Mapping[str, Any]) -> Any:
    """The trainer that the options describe.

    Raises:
        ConfigError: a value is refused.
    """
    from transformers import PrinterCallback
    from transformers.utils import logging as transformers_logging

    from bondlm.config import BONDConfig
    from bondlm.trainer import BONDTrainer

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    settings = {name: value for name, value in options.items() if name not in RUN_NAMES + LORA_NAMES}
    try:
        args = BONDConfig(**{"disable_tqdm": True, "save_total_limit": 2} | settings)
    except (ValueError, TypeError, ImportError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"a setting was refused: {error}") from error
    trainer = BONDTrainer(
        model=str(options["model"]),
        reward_funcs=options.get("reward_funcs"),
        args=args,
        train_dataset=options["train_dataset"],
        eval_dataset=options.get("eval_dataset"),
        peft_config=_lora(options),
    )
    trainer.remove_callback(PrinterCallback)  # the command prints its own lines
    return trainer


def _lora(options: Mapping[str, Any]) -> Any:
    if not options.get("use_peft"):
        extra = [name for name in LORA_NAMES if name in options and name != "use_peft"]
        if extra:
            raise ConfigError(f"{extra[0]} is set but use_peft is not: add use_peft: true or remove it")
        return None
    from peft import LoraConfig

    rank = int(options.get("lora_r", 16))
    return LoraConfig(
        r=rank,
        lora_alpha=int(options.get("lora_alpha", 2 * rank)),
        lora_dropout=float(options.get("lora_dropout", 0.0)),
        target_modules=options.get("lora_target_modules", "all-linear"),
    )


def _resume_point(folder: Path, options: Mapping[str, Any], console: Console) -> str | None:
    """The checkpoint to continue from, if any.

    Raises:
        CheckpointError: `resume: never`, but the folder holds a run, or the named checkpoint is not there.
        ConfigError: the run in the folder was made with other settings.
    """
    wish = str(options.get("resume", "auto"))
    if wish not in ("auto", "never"):
        if not Path(wish).is_dir():
            raise CheckpointError(f"resume={wish!r} is not a checkpoint folder")
        return wish
    path, rejected = newest_checkpoint(folder)
    if path is None:
        return None
    if wish == "never":
        raise CheckpointError(f"{folder} already holds a run: choose another output_dir, or resume: auto")
    _refuse_other_settings(folder / CONFIG_FILE, options)
    for reason in rejected:
        console.print(f"not resumed from {reason}", highlight=False, soft_wrap=True)
    return str(path)


def _refuse_other_settings(path: Path, options: Mapping[str, Any]) -> None:
    if not path.is_file():
        return
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = sorted((set(before) | set(options)) - FREE_NAMES)
    changed = [f"{n}: {before.get(n)!r} -> {options.get(n)!r}" for n in names if before.get(n) != options.get(n)]
    if changed:
        raise ConfigError(
            f"{path.parent} holds a run with other settings ({'; '.join(changed)}): give the same ones to continue it, "
            "or choose another output_dir"
        )


@contextmanager
def _stop_on_signals(trainer: Any) -> Iterator[Any]:
    """The first SIGINT or SIGTERM lets the step finish and saves; a second one stops at once. SIGUSR1 saves alone."""

    def note(number: int, frame: Any) -> None:
        trainer.stop.signal = number
        signal.signal(number, before[number])

    def save(number: int, frame: Any) -> None:
        trainer.stop.save_requested = True

    before: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, save)
    try:
        yield lambda: trainer.stop.signal
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say_stopped(console: Console, folder: Path, number: int) -> int:
    console.print(
        f"stopped by {signal.Signals(number).name}; saved in {folder}. The same command continues the run.",
        soft_wrap=True,
    )
    return INTERRUPTED if number == signal.SIGINT else PREEMPTED
