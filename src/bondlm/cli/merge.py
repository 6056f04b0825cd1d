"""`bondlm merge RUN RUN ...`: merge several runs from one model (WARP), and evaluate the path back to the reference."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from bondlm.cli.console import make_console, make_progress, say
from bondlm.cli.eval import (
    FROM_RUN,
    compare_pairs,
    complete,
    draw_set,
    fingerprint,
    load_job,
    rendering_of_job,
)
from bondlm.cli.judge_costs import say_costs
from bondlm.cli.options import MERGE_CURVE
from bondlm.cli.sampling import check_sampling
from bondlm.cli.start import adapter_config, load_kwargs, start_kwargs
from bondlm.cli.training import fresh_folder, quiet, write_facts
from bondlm.data.paths import found_in
from bondlm.errors import ConfigError
from bondlm.runs.folder import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    locked,
    plain,
    refuse_unfinished,
    run_config,
    run_environment,
    run_of,
    weights_file,
    write_whole,
)
from bondlm.runs.foreign import foreign_file
from bondlm.runs.prompting import adopt_prompting, read_prompting
from bondlm.runs.redact import redacted

MERGE_FILE, CURVE_FILE, CURVE_FOLDER = "merge.json", "curve.json", "curve"
OF_FILES = ("model", "train_dataset", "eval_dataset", "reward_funcs", "judges")
POINTS = [0.0, 0.2, 0.4, 0.6, 0.8]
NUMBERS = ("win_rate", "effective_n", "kl", "kl_of_best_of_n", "kl_ratio", "reward")


def run(options: dict[str, Any]) -> int:
    """Merge, write a run folder, and with `curve` evaluate the path from the merge to the reference."""
    runs = options.get("runs") or []
    folders = [Path(str(name)) for name in (runs if isinstance(runs, list) else [runs])]
    check_sampling(options)
    toward, points = _toward(options.get("toward_reference", 0.0)), _points(options)
    if not options.get("output_dir"):
        raise ConfigError("output_dir is required: set it in the config or with --output_dir")
    output, console = Path(str(options["output_dir"])), make_console()
    references = [_reference(folder, options.get("reference")) for folder in folders]
    init_kwargs = _init_kwargs(folders, options.get("reference"))
    config = _config(folders, references, init_kwargs, options | {"toward_reference": toward})
    goes_on = bool(points) and run_config(output).get("merge") == config["merge"]
    if not goes_on:  # otherwise the merge exists, and its curve is unfinished or another one is requested
        fresh_folder(options, "")
        if (name := foreign_file(output)) is not None:
            raise ConfigError(f"{output / name} would be replaced by the merge: choose another output_dir")
    with locked(output):
        with console.status("loading PyTorch and the runs"):
            from bondlm.models.merge import merge_folders

            quiet()
            how: dict[str, Any] = {"method": options.get("method", "slerp"), "rank": options.get("rank")}
            how["init_kwargs"] = init_kwargs
            merge = merge_folders(folders, references, **how)
        if goes_on and json.loads((output / MERGE_FILE).read_text(encoding="utf-8"))["sha256"] != merge.digests:
            raise ConfigError(f"{output} holds a merge of other weights of these runs: choose another output_dir")
        if not goes_on:
            _write(output, merge, config, toward, console)
        if points:
            _evaluate_curve(output, merge, options, points, console)
    say(console, f"run folder: {output}; `bondlm eval --model {output}` evaluates it")
    return 0


# -- options


def _toward(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(
            f"toward_reference={value!r}: must be at least 0 (the merge itself) and below 1 (the reference itself)"
        )
    return float(value)


def _points(options: Mapping[str, Any]) -> list[float]:
    """The values of toward_reference to evaluate; empty without `curve`."""
    curve = options.get("curve", False)
    if curve is False:
        unused = [name for name in MERGE_CURVE if name in options and name != "curve"]
        if unused:
            raise ConfigError(f"{unused[0]} is set, but only --curve uses it: add --curve, or remove it")
        return []
    if curve is True:
        return sorted({*POINTS, _toward(options.get("toward_reference", 0.0))})
    points = curve if isinstance(curve, list) else [curve]
    return sorted({_toward(point) for point in points})


def _reference(folder: Path, given: Any) -> str:
    """The model that a run was trained from."""
    if not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} is not a folder: name run folders, as `bondlm train` leaves them")
    refuse_unfinished(folder)
    found = given or _began_at(folder)
    if weights_file(folder) is None:
        raise ConfigError(f"{str(folder)!r} holds no trained model: name a folder that `bondlm train` has finished")
    if not found:
        raise ConfigError(f"{str(folder)!r} does not say what it was trained from: give it with --reference")
    return str(found)


def _began_at(folder: Path) -> Any:
    return _settings(folder).get("model") or adapter_config(folder).get("base_model_name_or_path")


def _settings(folder: Path) -> dict[str, Any]:
    """The run's settings, with absolute paths, so that they are valid in any directory and comparable."""
    if not (config := run_config(run_of(folder))):
        return {}
    directory = Path(str(run_environment(run_of(folder)).get("directory") or Path.cwd()))
    named = {name: found_in(directory.absolute(), config[name]) for name in OF_FILES if name in config}
    return {"objective": "jbond"} | config | named


def _init_kwargs(folders: Sequence[Path], reference: Any) -> dict[str, Any]:
    """Keyword arguments for loading the runs' common start."""
    if reference and any(str(_began_at(folder)) != str(found_in(Path.cwd(), reference)) for folder in folders):
        return load_kwargs(str(reference))
    first, *others = [start_kwargs(folder) for folder in folders] or [{}]  # an empty list is refused by the merge
    for folder, other in zip(folders[1:], others, strict=True):
        if other != first:
            raise ConfigError(
                f"{str(folders[0])!r} was trained from a model that was loaded with model_init_kwargs={first!r}, and "
                f"{str(folder)!r} with {other!r}: only runs from the same base can be merged"
            )
    return first


def _config(
    folders: Sequence[Path], references: Sequence[str], init_kwargs: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings that `eval` reads from a run folder, if all runs agree, and how the merge was made."""
    method, rank = options.get("method", "slerp"), options.get("rank")
    if method not in ("mean", "slerp"):
        raise ConfigError(f"method={method!r}: must be one of mean, slerp")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank={rank!r}: must be a whole number, at least 1")
    _refuse_other_prompting(folders)
    known = [_settings(folder) for folder in folders]
    names = [name for name in (*FROM_RUN.values(), "train_dataset", "objective") if all(name in c for c in known)]
    shared = {name: c[name] for name in names for c in known[:1] if all(other[name] == c[name] for other in known)}
    made = {"runs": [str(folder) for folder in folders], "method": method}
    made |= {"toward_reference": options["toward_reference"]} | ({} if rank is None else {"rank": rank})
    made_from: dict[str, Any] = {"model": found_in(Path.cwd(), references[0])} if references else {}
    made_from |= {"model_init_kwargs": dict(init_kwargs)} if init_kwargs else {}
    return redacted(shared | made_from | {"merge": made})  # type: ignore[no-any-return]


def _refuse_other_prompting(folders: Sequence[Path]) -> None:
    found = [read_prompting(run_of(folder)) or {} for folder in folders]
    for name in ("prompt_format", "chat_template_kwargs"):
        if len(values := {json.dumps(each.get(name), sort_keys=True) for each in found}) > 1:
            raise ConfigError(
                f"the runs were trained with different {name} ({', '.join(sorted(values))}): merge runs that agree"
            )


# -- the merge


def _write(output: Path, merge: Any, config: Mapping[str, Any], toward: float, console: Console) -> None:
    error = merge.write(output, toward_reference=toward)
    adopt_prompting(run_of(merge.folders[0]), output)
    facts = {"norms": merge.norms, "norm": merge.norm, "toward_reference": toward, "sha256": merge.digests}
    if merge.rank is not None:
        facts |= {"rank": merge.rank, "full_rank": merge.full_rank, "rank_error": error}
    write_facts(output, MERGE_FILE, dict(config["merge"]) | facts)
    write_whole(output / CONFIG_FILE, yaml.safe_dump(dict(config), sort_keys=False))
    write_facts(output, ENVIRONMENT_FILE, {"directory": str(Path.cwd())})  # base of relative names, as in a run
    lengths = ", ".join(f"{norm:.3g}" for norm in merge.norms)
    lines = [f"task vectors of length {lengths}; merged: {merge.norm:.3g}, of which {1 - toward:.0%} are kept"]
    if merge.rank is not None:
        lines.append(f"LoRA of rank {merge.rank} (exact: {merge.full_rank}), relative error {error:.2g}")
    for line in lines:
        say(console, line)


# -- the curve


def _evaluate_curve(
    output: Path, merge: Any, options: Mapping[str, Any], points: Sequence[float], console: Console
) -> None:
    """Win rate and KL at several points of theta_0 + (1 - t) * (merged task vector); existing samples are kept."""
    asked = {n: v for n, v in options.items() if n in MERGE_CURVE and n != "curve"}
    asked |= {"reference": options["reference"]} if options.get("reference") else {}
    folder = output / CURVE_FOLDER
    folder.mkdir(exist_ok=True)
    settings, _ = complete(asked | {"model": str(output), "output": str(folder)})
    with console.status("loading the models, prompts and rewards"):
        job = load_job(settings)
    from bondlm.evaluation.files import claim
    from bondlm.evaluation.table import print_curve

    claim(folder, fingerprint(settings, job), [path.name for path in folder.glob("*.jsonl")])
    wanted = {each.role: each for each in job["sets"] if each.is_main}
    with make_progress(console) as progress:
        draw_set(folder, wanted["reference"], 0, settings, job, progress)
    try:
        rows = [_point(point, folder, merge, wanted, settings, job, console) for point in points]
    finally:
        say_costs(console, [*job["ranking_judges"], *job["rewards"]])
    write_whole(output / CURVE_FILE, json.dumps(plain(rows), indent=1, allow_nan=False) + "\n")
    print_curve(console, rows)


def _point(
    point: float,
    folder: Path,
    merge: Any,
    wanted: Mapping[str, Any],
    settings: Mapping[str, Any],
    job: Mapping[str, Any],
    console: Console,
) -> dict[str, Any]:
    """The results of one point; missing samples are drawn."""
    from bondlm.rollout.sampler import Sampler

    policy = replace(wanted["policy"], name=f"toward_reference {point:g}", file=f"policy-{point:g}.jsonl")
    how: dict[str, Any] = {"dtype": str(settings.get("dtype", "auto")), "max_rows": settings["max_rows"]}
    how |= {"cuda_graphs": settings["cuda_graphs"], "init_kwargs": settings["init_kwargs"].get("policy")}
    with tempfile.TemporaryDirectory() as scratch:
        merge.write(Path(scratch), toward_reference=point)
        job["pair"].samplers["policy"] = Sampler(scratch, rendering=rendering_of_job(settings), **how)
        with make_progress(console) as progress:
            draw_set(folder, policy, 1, settings, job, progress)  # the same seeds at every point, so samples are paired
    return {"toward_reference": point} | _numbers(folder, job, wanted["reference"], policy, console)


def _numbers(folder: Path, job: Mapping[str, Any], reference: Any, policy: Any, console: Console) -> dict[str, Any]:
    """The results of one point, including those of ranking judges."""
    from bondlm.evaluation.files import read_samples
    from bondlm.evaluation.samples import from_rows
    from bondlm.evaluation.statistics import summarize

    theirs, mine = (from_rows(read_samples(folder / each.file), each.num_samples) for each in (reference, policy))
    # The reference's samples were scored under the policy of another point.
    result = summarize(mine, replace(theirs, log_ratio_PM=None), {})
    result |= compare_pairs(job, mine, theirs, result, console)
    found = {name: result[name] for name in ("judges", "pairwise") if result.get(name)}
    return {number: result[number] for number in NUMBERS} | found
