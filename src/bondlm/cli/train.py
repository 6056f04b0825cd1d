"""`bondlm train`: train from a config, and write a run folder with its evaluation."""

import errno
import json
import os
import platform
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from bondlm.cli import INTERRUPTED, STOPPED
from bondlm.cli.console import make_console, say
from bondlm.cli.ending import ending
from bondlm.cli.judge_costs import judge_costs
from bondlm.cli.options import LORA, TRAIN
from bondlm.cli.report import write_page
from bondlm.cli.training import quiet
from bondlm.errors import CheckpointError, ConfigError, Terminated
from bondlm.objectives.rules import Rule, above, between, check, whole
from bondlm.runs.folder import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    is_main_process,
    locked,
    run_config,
    run_environment,
    write_whole,
)
from bondlm.runs.manifest import newest_checkpoint, refuse_other_steps, remove_unfinished, unfinished, verify
from bondlm.runs.prompting import adopt_prompting
from bondlm.runs.redact import redacted

RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SECRET_NAMES = ("hub_token",)
LORA_RULES = {
    "use_peft": Rule(lambda value: isinstance(value, bool), "must be true or false"),
    "lora_r": whole(1),
    "lora_alpha": above(0),
    "lora_dropout": between(0, 1),
}
RUN_NAME = re.compile(r"[A-Za-z0-9._-]{1,80}")


def run(options: dict[str, Any]) -> int:
    """Train, evaluate, save. Exit codes: 0 done, 75 stopped by SIGTERM and saved, 130 by Ctrl-C and saved."""
    require(options)
    console = make_console()
    folder = Path(str(options.get("output_dir") or "runs/bond"))
    options = options | {"output_dir": str(folder)}
    with _stop_on_signals() as watched, locked(folder):
        with console.status("loading PyTorch and transformers"):
            from bondlm.cli.progress import ProgressReporter
            from bondlm.engines.choose import engine_choice
            from bondlm.training.processes import World, decided_by_main
            from bondlm.training.settings import fingerprints
        rewards = fingerprints(options.get("reward_funcs")) if is_main_process() else []
        args = training_arguments(options)  # the processes of a run connect here
        checkpoint, changes = decided_by_main(
            lambda: _resume_point(folder, options, console, rewards), World.of(args), wait_s=args.ddp_timeout
        )
        with console.status(Text(f"loading {options.get('model')}, data and rewards")):
            trainer = build_trainer(options, args)
            judges = load_judges(options, trainer)
        engine, held = engine_choice(trainer.args), _weights_held(trainer.args)
        for line in (engine, *_signal(trainer), held):
            say(console, line)

        def write_settings() -> None:
            begun = {"resumed_from": _begun_from(folder, options, checkpoint), "config_changes": changes}
            write_whole(folder / CONFIG_FILE, yaml.safe_dump(redacted(options), sort_keys=False))
            _note_environment(folder / ENVIRONMENT_FILE, begun, engine, held, rewards)

        trainer.writes_settings = write_settings
        watched.append(trainer.stop)
        with (
            closing(trainer.engine),
            ProgressReporter(console, trainer) as reporter,
            judge_costs(console, trainer, judges),
        ):
            allowed = bool(options.get("allow_config_change"))
            trainer.train(resume_from_checkpoint=checkpoint, allow_config_change=allowed)
            if trainer.stop.stopped:
                return _say_stopped(console, folder, trainer.stop.signal)
            trainer.save_model(_internal_call=True)  # it is uploaded once, with its card
            trainer.stop.finished = True
            if trainer.stop.agree(args)[0]:  # the signal came during the save
                return _say_stopped(console, folder, trainer.stop.signal)
            reporter.close_training()
            result = _evaluate(trainer, folder, console, reporter, judges)
            if args.push_to_hub:
                trainer.push_to_hub()
        for line in ending(folder, trainer.state.global_step, reporter, result):
            say(console, line)
    return 0


def _evaluate(trainer: Any, folder: Path, console: Console, reporter: Any, judges: list[Any]) -> dict[str, Any] | None:
    """Print times and dropped prompts; then run the last evaluation, if there is something to evaluate on."""
    from bondlm.evaluation import evaluate_run
    from bondlm.evaluation.table import print_phases

    if trainer.is_world_process_zero():
        seconds, tokens = reporter.mean_phases()
        print_phases(console, seconds, tokens, reporter.evaluation_seconds)
        for line in trainer.drops.summary():
            say(console, line)
    if trainer.eval_dataset is None:
        return None
    result = evaluate_run(trainer, folder, console, reporter, judges)
    if is_main_process():
        write_page(folder, console)
    return result


def require(options: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a missing required option, and for options that must not be set."""
    refuse_unsafe(options)
    for name in ("model", "train_dataset"):  # rewards are optional if the samples are already scored
        if not options.get(name):
            raise ConfigError(f"{name} is required: set it in the config or with --{name}")


def training_arguments(options: Mapping[str, Any]) -> Any:
    """The `BONDConfig` that the options describe.

    Raises:
        ConfigError: a value is refused.
    """
    from bondlm.config import BONDConfig
    from bondlm.config.changes import spelled
    from bondlm.config.checks import refused_plainly

    settings = {name: spelled(name, value) for name, value in options.items() if name not in TRAIN}
    try:
        with refused_plainly():
            return BONDConfig(**{"disable_tqdm": True, "save_total_limit": 2} | settings)
    except RuntimeError as error:  # from PyTorch, if the processes cannot connect
        place = ", ".join(f"{name}={os.environ.get(name)}" for name in RENDEZVOUS)
        raise ConfigError(
            f"the processes of this run could not connect ({place}): {str(error).splitlines()[0]}. The port may be "
            "taken: choose another MASTER_PORT (accelerate launch --main_process_port), and see that every process runs"
        ) from error


def build_trainer(options: Mapping[str, Any], args: Any = None) -> Any:
    """The trainer that the options describe; `args` are their `training_arguments`, if these already exist.

    Raises:
        ConfigError: a value is refused.
    """
    from transformers import PrinterCallback

    from bondlm.trainer import BONDTrainer

    quiet()
    args = training_arguments(options) if args is None else args
    trainer = BONDTrainer(
        model=str(options["model"]),
        reward_funcs=options.get("reward_funcs"),
        args=args,
        train_dataset=options["train_dataset"],
        eval_dataset=options.get("eval_dataset"),
        peft_config=lora_config(options),
    )
    trainer.remove_callback(PrinterCallback)  # the command prints its own lines
    return trainer


def load_judges(options: Mapping[str, Any], trainer: Any) -> list[Any]:
    """The rewards that the last evaluation uses in addition to the optimised ones.

    Raises:
        ConfigError: there is no evaluation, or a reward cannot be loaded.
    """
    specs = options.get("judges") or []
    specs = list(specs) if isinstance(specs, list | tuple) else [specs]
    if not specs:
        return []
    if trainer.eval_dataset is None:
        raise ConfigError(f"judges={specs!r}: the final evaluation needs an eval_dataset for them")
    from bondlm.models.load import fast_dtype
    from bondlm.rewards import check_room, load_rewards
    from bondlm.rollout.samples import longest_rows

    args = trainer.args
    how: dict[str, Any] = {"timeout": args.reward_timeout_s, "outage": args.reward_outage_s}
    how |= {
        "device": args.device,
        "dtype": fast_dtype(args.device),
        "taken": [reward.name for reward in trainer.rewards],
    }
    judges = load_rewards(specs, [0.0] * len(specs), **how)
    check_room(judges, longest_rows(trainer.eval_dataset), args.max_completion_length)
    return judges


def lora_config(options: Mapping[str, Any]) -> Any:
    """The adapter that the options ask for, or None.

    Raises:
        ConfigError: a value is refused, or settings of an adapter are given but no adapter is requested.
    """
    if not options.get("use_peft"):
        extra = [name for name in LORA if name in options and name != "use_peft"]
        if extra:
            raise ConfigError(f"{extra[0]} is set but use_peft is not: add use_peft: true or remove it")
        return None
    from peft import LoraConfig

    given = {name: options[name] for name in LORA_RULES if name in options}
    check(SimpleNamespace(**given), **{name: LORA_RULES[name] for name in given})
    rank = given.get("lora_r", 16)
    return LoraConfig(
        r=rank,
        lora_alpha=given.get("lora_alpha", 2 * rank),
        lora_dropout=given.get("lora_dropout", 0.0),
        target_modules=options.get("lora_target_modules", "all-linear"),
    )


def resume_of(options: Mapping[str, Any], console: Console) -> str | None:
    """The checkpoint that `train` would continue from; its folder is not changed.

    Raises:
        CheckpointError: `train` would refuse the folder, or the checkpoint.
        ConfigError: `train` would refuse settings that differ from the run's, or cannot write the folder.
    """
    from bondlm.data.paths import refuse_own_folder
    from bondlm.training.occupied import refuse_other_files
    from bondlm.training.settings import fingerprints

    folder = Path(str(options.get("output_dir") or "runs/bond"))
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if existing != folder and not (existing.is_dir() and os.access(existing, os.W_OK)):
        number = errno.EACCES if existing.is_dir() else errno.ENOTDIR
        raise ConfigError(f"output_dir={str(folder)!r} cannot be written: {os.strerror(number)}")
    with locked(folder) if existing == folder else nullcontext():
        rewards = fingerprints(options.get("reward_funcs"))
        checkpoint, _ = _resume_point(folder, options, console, rewards, is_real=False)
        refuse_own_folder(str(options["model"]), folder)
        refuse_other_files(folder)
    return checkpoint


def _resume_point(
    folder: Path,
    options: Mapping[str, Any],
    console: Console,
    rewards: Sequence[Mapping[str, Any]],
    *,
    is_real: bool = True,
) -> tuple[str | None, list[str]]:
    """The checkpoint to continue from, if any, and the settings that differ from those of the existing run.

    A run starts from a named checkpoint; the same command then continues from the run's newest one, as `auto` does.
    Unless `is_real`, nothing in the folder is changed.

    Raises:
        CheckpointError: `resume: never` is set but the folder has a run; or the named checkpoint does not exist, or the
            folder has steps that do not come from it.
        ConfigError: the run in the folder was made with other settings.
    """
    named = _named_checkpoint(options)
    if named is not None and run_environment(folder).get("resumed_from") != str(named.resolve()):
        return _first_from(named, folder, options, rewards, is_real=is_real)
    for line in remove_unfinished(folder) if is_real and is_main_process() else []:
        say(console, line)
    path, rejected = newest_checkpoint(folder, but=unfinished(folder))
    path = named if path is None else path
    if path is None:
        return None, []
    if _resume(options) == "never":
        raise CheckpointError(f"{folder} already holds a run: choose another output_dir, or resume: auto")
    changes = _changed_settings(folder / CONFIG_FILE, options, rewards)
    if named is not None and changes:  # a second start, not the same command
        return _first_from(named, folder, options, rewards, is_real=is_real)
    for reason in rejected:
        say(console, f"not resumed from {reason}")
    return str(path), changes


def _named_checkpoint(options: Mapping[str, Any]) -> Path | None:
    wish = _resume(options)
    return None if wish in ("auto", "never") else Path(wish)


def _resume(options: Mapping[str, Any]) -> str:
    """`auto`, `never` or a checkpoint; YAML reads `no` as False, and nothing as None."""
    wish = options.get("resume")
    return ("auto" if wish else "never") if isinstance(wish, bool) else str(wish or "auto")


def _begun_from(folder: Path, options: Mapping[str, Any], checkpoint: str | None) -> str | None:
    """The named checkpoint that the run in `folder` started from, now or before."""
    if (named := _named_checkpoint(options)) is not None:
        return str(named.resolve())
    return None if checkpoint is None else run_environment(folder).get("resumed_from")


def _first_from(
    checkpoint: Path, folder: Path, options: Mapping[str, Any], rewards: Sequence[Mapping[str, Any]], *, is_real: bool
) -> tuple[str, list[str]]:
    """Start in `folder` from a named checkpoint; from another folder, also take that run's rendering and changes."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"resume={str(checkpoint)!r} is not a checkpoint folder")
    verify(checkpoint)
    refuse_other_steps(folder, checkpoint)
    source = checkpoint.resolve().parent
    changes = _changed_settings(source / CONFIG_FILE, options, rewards)
    if source == folder.resolve():
        return str(checkpoint), changes
    if is_real:
        adopt_prompting(source, folder)
    return str(checkpoint), [*run_environment(source).get("config_changes", []), *changes]


def _changed_settings(path: Path, options: Mapping[str, Any], rewards: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """The differences to the stored settings; refused unless `allow_config_change` is set."""
    from bondlm.config import changed_settings
    from bondlm.training.settings import edited_rewards, spell_alike

    before, now = run_config(path.parent), redacted(dict(options))
    if not before:
        return []
    spell_alike(before, now, path.parent)
    edited, allowed = edited_rewards(path.parent, rewards), bool(options.get("allow_config_change"))
    return changed_settings(before, now, path.parent, allowed=allowed, edited=edited)


def _signal(trainer: Any) -> list[str]:
    """The strength of a signal that was solved for n; empty if the objective has none."""
    objective = trainer.objective
    if getattr(objective, "strength", None) is None:
        return []
    form, drawn = objective.log_quantile, f"{objective.num_samples} samples per prompt"
    follows = ", then adapted to the measured N" if objective.adaptive_strength else ""
    return [f"signal: {form!r} of strength {objective.strength:.3g}, solved for n={objective.n} with {drawn}{follows}"]


def _weights_held(args: Any) -> str:
    """Which weights the run folder will have."""
    fraction = args.average_weights
    if args.load_best_model_at_end:
        return f"weights: of the best checkpoint by {args.metric_for_best_model} (load_best_model_at_end)"
    if not fraction:
        return "weights: of the last step"
    return f"weights: a running average is evaluated and saved (average_weights={fraction:.3g}; 0: the last step's)"


def _note_environment(
    path: Path, begun: Mapping[str, Any], engine: str, held: str, rewards: Sequence[Mapping[str, Any]]
) -> None:
    """Store versions, engine, kept weights and rewards of the run, and every allowed change of its settings."""
    before = run_environment(path.parent).get("config_changes", [])
    packages = ("bondlm", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    content: dict[str, Any] = {"versions": versions, "platform": platform.platform(), "engine": engine}
    content["weights"] = held.removeprefix("weights: ")
    content["directory"] = str(Path.cwd())  # base of relative names in config.yaml
    content |= {"rewards": list(rewards), "config_changes": before + begun["config_changes"]}
    content |= {"resumed_from": begun["resumed_from"]} if begun["resumed_from"] else {}
    write_whole(path, json.dumps(content, indent=1) + "\n")


def refuse_unsafe(options: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a secret that would be stored in the run folder, or a name that could lead outside it."""
    for name in SECRET_NAMES:
        if options.get(name):
            raise ConfigError(f"{name} would be written into the run folder: set HF_TOKEN in the environment instead")
    run_name = options.get("run_name")
    if run_name is not None and not RUN_NAME.fullmatch(str(run_name)):
        raise ConfigError(f"run_name={run_name!r}: 1 to 80 letters, digits, dots, dashes or underscores")


@contextmanager
def _stop_on_signals() -> Iterator[list[Any]]:
    """The first SIGINT or SIGTERM lets the step finish and saves; a second one stops at once. SIGUSR1 only saves.

    Yields a list to which the trainer's `stop` is added later. Until then a run has nothing to finish or save: the
    first signal stops it at once, and SIGUSR1 is ignored.
    """
    watched: list[Any] = []

    def note(number: int, frame: Any) -> None:
        if not watched or watched[0].finished:  # after that the model is saved, and only the evaluation is cut short
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        watched[0].signal = number
        signal.signal(number, before[number])
        if is_main_process():  # not with print, which this may have interrupted
            os.write(2, b"bondlm: stopping: the step under way is finished and saved. Once more stops at once.\n")

    def save(number: int, frame: Any) -> None:
        for stop in watched:
            stop.save_requested = True

    before: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    if hasattr(signal, "SIGUSR1"):  # Windows has none
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, save)
    try:
        yield watched
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say_stopped(console: Console, folder: Path, number: int) -> int:
    say(console, f"stopped by {signal.Signals(number).name}; saved in {folder}. The same command continues the run.")
    return INTERRUPTED if number == signal.SIGINT else STOPPED
