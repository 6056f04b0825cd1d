"""`bondlm eval`: the Best-of-N that one sample of a policy equals; writes samples and `eval.json`, prints tables."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from bondlm.cli.console import Counter, make_console, make_progress, say, say_json
from bondlm.cli.judge_costs import say_costs
from bondlm.cli.report import write_page
from bondlm.cli.sampling import check_sampling, reward_limits
from bondlm.cli.start import adapter_config, load_kwargs, start_kwargs
from bondlm.cli.training import quiet
from bondlm.data.paths import as_seen_from, refuse_absent_folder
from bondlm.errors import ConfigError, DataError
from bondlm.runs.ending import describe_ending, step_of_weights
from bondlm.runs.folder import CONFIG_FILE, METRICS_FILE, locked, refuse_unfinished, run_config, run_environment, run_of

DEFAULTS = {
    **{"num_samples": 8, "num_reference_samples": 32, "max_completion_length": 256, "seed": 42},
    **{"truncate_prompt": "never", "max_rows": None, "cuda_graphs": True},
}
OF_REWARDS = ("reward_weights", "reward_aggregation", "reward_tolerances")
# Options whose values a run folder supplies from its settings, with their names there.
FROM_RUN = {
    "reference": "model",
    "dataset": "eval_dataset",
    **{name: name for name in ("reward_funcs", *OF_REWARDS, "max_completion_length", "max_prompt_length")},
    **{name: name for name in ("truncate_prompt", "cuda_graphs", "judges", "reward_timeout_s", "reward_outage_s")},
}


def run(options: dict[str, Any]) -> int:
    """Draw the samples that are missing, then report the results."""
    settings, config = complete(options)
    folder = Path(settings["output"])
    errors = make_console(stderr=True)
    with locked(folder, "output"):
        with errors.status("loading PyTorch, the models and the rewards"):
            job = load_job(settings)
        result, policy, reference = _evaluate(folder, settings, job, errors)
        result |= _description(settings, config, job)
        try:
            result |= compare_pairs(job, policy, reference, result, errors)
        finally:
            say_costs(errors, [*job["ranking_judges"], *job["rewards"]])
        from bondlm.evaluation.card import write_card
        from bondlm.evaluation.run import side_by_side, write_results
        from bondlm.evaluation.table import print_samples, print_table

        write_results(folder, result, policy, reference)
        console = make_console(stderr=bool(settings.get("json")))
        if config and folder.resolve() == Path(settings["model"]).resolve():
            write_card(folder, result)
            write_page(folder, console)
        print_samples(console, list(side_by_side(policy, reference)))
        print_table(console, result)
        say(console, f"written to {folder}")
    if settings.get("json"):
        say_json(result)
    return 0


def complete(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options, completed from a run folder or an adapter, and the run's own config.

    Raises:
        ConfigError: a required option is missing or out of its range.
    """
    if not options.get("model"):
        raise ConfigError("model is required: set it in the config or with --model")
    model = Path(str(options["model"]))
    refuse_absent_folder(str(model), "model")
    refuse_unfinished(model)
    run = run_of(model)
    config = run_config(run)
    known = _known_of_run(run, config)
    if isinstance(options.get("dataset"), Mapping):
        raise ConfigError("dataset is a dictionary: name one data set, and evaluate each in turn")
    for name in ("reward_funcs", "judges"):
        if name not in options:
            _refuse_code_of(run, name, _list(known.get(name)))
    of_run = [_list(source.get("reward_funcs")) for source in (config, known)]
    if "reward_funcs" in options and _list(options["reward_funcs"]) not in of_run:
        known = {k: v for k, v in known.items() if k not in OF_REWARDS}  # they belong to the run's rewards
    settings = DEFAULTS | known | ({"output": str(model)} if config else {}) | dict(options)
    settings["model"] = str(model)
    settings["is_start"] = str(settings.get("reference")) == str(known.get("reference"))
    settings["init_kwargs"] = _init_kwargs(settings)
    for name in ("reference", "dataset", "reward_funcs", "output"):
        if not settings.get(name):
            shown = repr(str(model))
            what = f"{shown} is not a run folder, so it names none" if model.is_dir() else f"there is no folder {shown}"
            raise ConfigError(f"{name} is required ({what}): add --{name}, or give a run folder as --model")
    if run_of(Path(settings["output"])) != Path(settings["output"]):
        raise ConfigError(
            f"output={settings['output']!r} is a checkpoint: files written into it would make it unusable for "
            "resuming. Choose another folder with --output"
        )
    check_sampling(settings)
    settings["orders"] = _orders(settings.get("orders"), settings["num_reference_samples"])
    return settings, config


def _init_kwargs(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Keyword arguments for loading, by role; the reference's are those of training, if training started from it."""
    model, reference = str(settings["model"]), str(settings.get("reference"))
    found = {
        "policy": load_kwargs(model),
        "reference": start_kwargs(Path(model)) if settings["is_start"] else load_kwargs(reference),
        "opponent": load_kwargs(str(settings["opponent"])) if settings.get("opponent") else {},
    }
    return {role: kwargs for role, kwargs in found.items() if kwargs}


def _known_of_run(model: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a run folder or an adapter supplies; relative names refer to where the run was started."""
    known = {name: config[key] for name, key in FROM_RUN.items() if config.get(key) is not None}
    if isinstance(sets := known.get("dataset"), Mapping):
        known["dataset"] = sets.get(config.get("main_eval") or next(iter(sets)))
    if (directory := run_environment(model).get("directory")) is not None:
        names = ("reference", "dataset", "reward_funcs", "judges")
        known |= {name: as_seen_from(Path(str(directory)), known[name]) for name in names if name in known}
    if "reference" not in known and (base := adapter_config(model).get("base_model_name_or_path")) is not None:
        known["reference"] = str(base)
    return known


def _orders(value: Any, most: int) -> list[int] | None:
    orders = _list(value)
    for n in orders:
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= most:
            raise ConfigError(
                f"orders={value!r}: give whole numbers from 1 to num_reference_samples={most}, several as [2, 4]"
            )
    return sorted(set(orders)) or None


def _refuse_code_of(folder: Path, option: str, rewards: list[Any]) -> None:
    """Refuse rewards from a run folder of unknown origin: they may be any function of any module, or a foreign server.

    They are used only if the user names them too. Models are data and need no confirmation.
    """
    if not rewards:
        return
    from bondlm.rewards.load import is_model

    for spec in map(str, rewards):
        if not is_model(spec):
            again = json.dumps([str(reward) for reward in rewards])
            raise ConfigError(
                f"{folder / CONFIG_FILE} names the reward {spec!r}. Functions run code and servers get your prompts, "
                "so they are not used just because a run folder names them. If you trust them, add "
                f"--{option} {shlex.quote(again)}"
            )


def _list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def load_job(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Load models, rewards and encoded prompts.

    Raises:
        ConfigError: policy and reference do not fit, or something cannot be loaded.
        DataError: prompts that cannot be used, or too few for an interval.
    """
    from bondlm.evaluation.pair import Pair, sample_sets
    from bondlm.evaluation.rouge import rouge_judge
    from bondlm.models.load import fast_dtype
    from bondlm.rewards import aggregation_of, check_room, load_rewards

    quiet()
    pair = Pair(
        settings["model"],
        str(settings["reference"]),
        None if settings.get("opponent") is None else str(settings["opponent"]),
        dtype=str(settings.get("dtype", "auto")),
        max_rows=settings["max_rows"],
        cuda_graphs=settings["cuda_graphs"],
        init_kwargs=settings["init_kwargs"],
        rendering=rendering_of_job(settings),
        is_start=settings["is_start"],
    )
    sampler = pair.samplers["policy"]
    of_lengths = ("max_prompt_length", "max_completion_length", "truncate_prompt")
    lengths: dict[str, Any] = {name: settings.get(name) for name in of_lengths}
    rows = pair.rows(settings["dataset"], **lengths)
    opponent_rows = pair.rows(settings["dataset"], **lengths, for_opponent=True) if pair.opponent is not None else []
    if len(rows) < 2:
        raise DataError(f"{settings['dataset']}: {len(rows)} prompt, but an interval over prompts needs at least 2")
    specs, judge_specs = _list(settings["reward_funcs"]), _list(settings.get("judges"))
    weights = _list(settings.get("reward_weights")) or [1.0] * len(specs)
    aggregation = aggregation_of(settings, weights, len(specs))
    rewards = load_rewards(
        specs + judge_specs,
        weights + [0.0] * len(judge_specs),
        device=sampler.device,
        dtype=fast_dtype(sampler.device),
        **reward_limits(settings),
    )
    check_room(rewards, rows, settings["max_completion_length"])
    names = [reward.name for reward in rewards]
    judges, rewards = rewards[len(specs) :], rewards[: len(specs)]
    column = settings.get("reference_column")
    absolute = [judge for judge in judges if not judge.ranks]
    absolute += [rouge_judge(rows, str(column), names)] if column is not None else []
    return {
        "pair": pair,
        "rows": rows,
        "opponent_rows": opponent_rows,
        "rewards": rewards + absolute,
        "ranking_judges": [judge for judge in judges if judge.ranks],
        "aggregation": aggregation,
        "num_judges": len(absolute),
        "sets": sample_sets(
            settings["num_samples"], settings["num_reference_samples"], opponent=pair.opponent is not None
        ),
    }


def rendering_of_job(settings: Mapping[str, Any]) -> Any:
    """The rendering of the run's prompts; for another model, with the time when the output folder was begun."""
    from bondlm.cli.prompting import rendering_of
    from bondlm.runs.prompting import PROMPTING_FILE, read_prompting, write_prompting

    model, output = Path(settings["model"]), Path(settings["output"])
    rendering = rendering_of(settings, run=model)
    if rendering.now is None:
        before = read_prompting(output)
        rendering = replace(rendering, now=before["now"] if before else datetime.today())
        if not (output / PROMPTING_FILE).is_file():
            write_prompting(output, rendering.prompt_format, rendering.variables, rendering.now)
    return rendering


def fingerprint(settings: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the samples and their scores depend on."""
    from bondlm.data.fingerprints import model_fingerprint, reward_fingerprint, rows_fingerprint
    from bondlm.rewards import is_ranking

    samplers = job["pair"].samplers

    def model(role: str, name: str) -> dict[str, Any]:
        return model_fingerprint(name, _revision(samplers[role]))

    names = ["num_samples", "num_reference_samples", "max_completion_length", "seed", "reference_column"]
    if job["aggregation"].by_order:
        names += ["reward_aggregation", "reward_tolerances"]
    ends = samplers["policy"].encoder.eos_ids
    of_pair = {role: kwargs for role, kwargs in settings["init_kwargs"].items() if role != "opponent"}
    return {
        "policy": model("policy", settings["model"]),
        "reference": model("reference", str(settings["reference"])),
        "dataset": rows_fingerprint(job["rows"]),
        "rewards": [reward_fingerprint(spec) for spec in _list(settings["reward_funcs"])],
        "reward_weights": [reward.weight for reward in job["rewards"]],
        "judges": [reward_fingerprint(s) for s in _list(settings.get("judges")) if not is_ranking(s)],
        "dtype": str(samplers["policy"].model.dtype),
        **({"init_kwargs": of_pair} if of_pair else {}),
        **({} if samplers["reference"].own_eos_ids == ends else {"eos_ids": list(ends)}),
        **{name: settings.get(name) for name in names},
    }


def _revision(sampler: Any) -> str | None:
    revision = getattr(sampler.model.config, "_commit_hash", None)
    return None if revision is None else str(revision)


def _evaluate(
    folder: Path, settings: Mapping[str, Any], job: Mapping[str, Any], console: Console
) -> tuple[dict[str, Any], Any, Any]:
    from bondlm.data.fingerprints import model_fingerprint
    from bondlm.evaluation.files import claim, read_samples
    from bondlm.evaluation.pair import OPPONENT_FILE
    from bondlm.evaluation.samples import from_rows
    from bondlm.evaluation.statistics import summarize

    made_from = fingerprint(settings, job)
    claim(folder, made_from, [wanted.file for wanted in job["sets"] if not wanted.of_opponent])
    if settings.get("opponent"):  # with its own manifest, since another opponent may come later
        who = model_fingerprint(str(settings["opponent"]), _revision(job["pair"].opponent))
        claim(folder, made_from | {"opponent": who}, [OPPONENT_FILE], manifest="opponent-manifest.json")
    with make_progress(console) as progress:
        for number, wanted in enumerate(job["sets"]):
            draw_set(folder, wanted, number, settings, job, progress)
    scored = {wanted.name: from_rows(read_samples(folder / wanted.file), wanted.num_samples) for wanted in job["sets"]}
    policy, reference, opponent = scored.pop("policy"), scored.pop("reference"), scored.pop("opponent", None)
    with console.status("statistics"):
        result = summarize(policy, reference, scored, orders=settings["orders"], opponent=opponent)
    return result, policy, reference


def draw_set(
    folder: Path, wanted: Any, number: int, settings: Mapping[str, Any], job: Mapping[str, Any], progress: Progress
) -> None:
    """Draw and score the missing samples; those of the reference, number 0, come first.

    Rewards that rank, and combinations of rewards by order, count ranks among the reference's samples. Each of several
    rewards must apply to the same prompts as it does there.
    """
    from bondlm.evaluation.pair import fill

    rows, first = job["opponent_rows"] if wanted.of_opponent else job["rows"], job["sets"][0]
    is_compared = len(job["rewards"]) > 1 or job["aggregation"].by_order or job["rewards"][0].ranks
    fill(
        folder / wanted.file,
        wanted,
        job["pair"],
        rows,
        job["rewards"],
        number=number,
        num_judges=job["num_judges"],
        seed=int(settings["seed"]),
        max_completion_length=settings["max_completion_length"],
        on_prompts_done=Counter(progress, f"{wanted.name} x {wanted.num_samples}", len(job["rows"])),
        aggregation=job["aggregation"],
        reference_file=(folder / first.file, first.num_samples) if number and is_compared else None,
    )


def compare_pairs(
    job: Mapping[str, Any], policy: Any, reference: Any, result: Mapping[str, Any], console: Console
) -> dict[str, Any]:
    """The results of ranking judges for the stored samples, which do not depend on the judges."""
    from bondlm.evaluation.pairwise import compared

    judges = job["ranking_judges"]
    names = ", ".join(judge.name for judge in judges)

    def announce(count: int) -> None:
        say(console, f"{names}: {count} pairs in both orders, {2 * count} questions each")

    return compared(judges, job["rows"], policy, reference, result, announce)


def _description(settings: Mapping[str, Any], config: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    from bondlm.evaluation.describe import describe_config, describe_rewards

    rewards, num_judges = job["rewards"], job["num_judges"]
    model = Path(settings["model"])
    is_checkpoint = run_of(model) != model
    last = int(model.resolve().name.partition("-")[2]) if is_checkpoint else _last_step(model / METRICS_FILE)
    return {
        "steps": step_of_weights(model, last),
        **describe_ending(model),
        "objective": describe_config(config) if config else None,
        **describe_rewards(rewards[: len(rewards) - num_judges], job["aggregation"]),
        "model": settings["model"],
        "dataset": settings["dataset"],
        "max_completion_length": settings["max_completion_length"],
        "reference": str(settings["reference"]),
        **({"opponent_model": str(settings["opponent"])} if settings.get("opponent") else {}),
    }


def _last_step(path: Path) -> int | None:
    if not path.is_file():
        return None
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    try:
        return int(json.loads(lines[-1])["step"])
    except (IndexError, ValueError, KeyError, TypeError):
        return None
