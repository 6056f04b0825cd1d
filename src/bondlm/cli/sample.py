"""`bondlm sample`: one answer per prompt, or the best of N by any reward."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from bondlm.cli.console import Counter, make_console, make_progress, say
from bondlm.cli.draft import Draft, drafted
from bondlm.cli.judge_costs import costs_said
from bondlm.cli.sampling import check_sampling, reward_limits
from bondlm.cli.training import quiet
from bondlm.errors import ConfigError
from bondlm.runs.folder import refuse_unfinished, run_config, run_of

NEED_REWARDS = ("reward_weights", "reward_aggregation", "reward_tolerances", "reward_timeout_s", "reward_outage_s")
CHUNK = 16  # prompts between two writes


def run(options: dict[str, Any]) -> int:
    """Print the answers, or write them as JSONL rows {prompt, completion}; with their rewards if any were requested."""
    check_sampling(options)
    best_of = options.get("best_of", 1)
    if not options.get("model"):
        raise ConfigError("model is required: set it in the config or with --model")
    refuse_unfinished(Path(str(options["model"])))
    if (options.get("prompt") is None) == (options.get("dataset") is None):
        raise ConfigError("give either --prompt TEXT or --dataset FILE")
    if best_of > 1 and not options.get("reward_funcs"):
        raise ConfigError(f"best_of={best_of}: above 1 it needs reward_funcs to choose by")
    _refuse_idle(options)
    if best_of > 1 and options.get("temperature") == 0:
        raise ConfigError("temperature=0 draws the same answer every time: best_of needs a temperature above 0")
    source = options["dataset"] if options.get("prompt") is None else [{"prompt": options["prompt"]}]
    errors = make_console(stderr=True)
    if options.get("output"):
        with drafted(str(options["output"]), 1, errors) as draft:
            for rows in generate(options, source, best_of, errors, draft=draft):
                draft.add([best(group) for group in rows])
            draft.finish()
        return 0
    console = make_console()
    for rows in generate(options, source, best_of, errors):
        for group in rows:
            _show(best(group), console, errors, with_prompt=options.get("prompt") is None)
    return 0


def _refuse_idle(options: Mapping[str, Any]) -> None:
    """Refuse options of rewards where there are none."""
    if not options.get("reward_funcs") and (idle := [name for name in NEED_REWARDS if options.get(name) is not None]):
        raise ConfigError(f"{idle[0]}={options[idle[0]]!r}: there are no reward_funcs, remove it or add them")


def _show(row: Mapping[str, Any], console: Any, errors: Any, *, with_prompt: bool) -> None:
    """Print an answer, and its reward on stderr, so that stdout has only answers."""
    from bondlm.evaluation.table import visible

    if with_prompt:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        say(console, visible(f"> {prompt}"))
    say(console, visible(row["completion"]))
    if "reward" in row:
        errors.print(f"reward {row['reward']:.4g}")


def best(group: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer with the highest reward; the first one if nothing was scored."""
    return max(group, key=lambda row: row.get("reward", 0.0))


def answer_length(options: Mapping[str, Any]) -> int:
    """Maximum tokens of an answer: as requested, else as in the run folder's training and evaluation, else 256."""
    of_run = run_config(run_of(Path(str(options["model"])))).get("max_completion_length", 256)
    return int(options.get("max_completion_length", of_run))


def prompt_limits(options: Mapping[str, Any]) -> dict[str, Any]:
    """How long prompts may be: as requested; without a request prompts are cut as in the run folder's training."""
    of_run = run_config(run_of(Path(str(options["model"]))))
    truncate = options.get("truncate_prompt", of_run.get("truncate_prompt", "never"))
    longest = None if truncate == "never" else of_run.get("max_prompt_length")
    return {"truncate_prompt": truncate, "max_prompt_length": options.get("max_prompt_length", longest)}


def made_from(options: Mapping[str, Any], sampler: Any, rows: Any, num_samples: int) -> dict[str, Any]:
    """The inputs that determine the answers, apart from software versions."""
    from bondlm.data.fingerprints import model_fingerprint, reward_fingerprint, rows_fingerprint
    from bondlm.data.origin import prompting_of

    rewards = options.get("reward_funcs") or []
    return {
        "model": model_fingerprint(str(options["model"]), getattr(sampler.model.config, "_commit_hash", None)),
        "rewards": [reward_fingerprint(spec) for spec in (rewards if isinstance(rewards, list) else [rewards])],
        "prompting": prompting_of(sampler.encoder.rendering),
        "prompts": rows_fingerprint(rows),
        "eos_ids": list(sampler.encoder.eos_ids),
        **{name: options.get(name) for name in ("reward_weights", "reward_aggregation", "reward_tolerances")},
        "num_samples": num_samples,
        "max_completion_length": answer_length(options),
        "temperature": float(options.get("temperature", 1.0)),
        "seed": int(options.get("seed", 42)),
        "dtype": str(sampler.model.dtype).removeprefix("torch."),
    }


def generate(
    options: dict[str, Any],
    source: Any,
    num_samples: int,
    console: Console,
    *,
    draft: Draft | None = None,
    token_ids: bool = False,
) -> Any:
    """Yield, per chunk of prompts, a list of each prompt's answers as rows {prompt, completion[, reward]}.

    Prompts that the `draft` already has are left out; with `token_ids`, scored answers also get theirs.
    """
    with console.status("loading PyTorch, the model and the rewards"):
        from bondlm.cli.prompting import rendering_of
        from bondlm.cli.start import load_kwargs
        from bondlm.models.load import fast_dtype
        from bondlm.rewards import SUM, aggregation_of, check_room, load_rewards
        from bondlm.rollout.sampler import Sampler

        quiet()
        rendering = rendering_of(options, run=Path(str(options["model"])), takes_rendered=False)
        now = rendering.now or (draft.now if draft is not None else None)
        sampler = Sampler(
            str(options["model"]),
            dtype=str(options.get("dtype", "auto")),
            max_rows=options.get("max_rows"),
            cuda_graphs=(run_config(run_of(Path(str(options["model"])))) | options).get("cuda_graphs", True),
            init_kwargs=load_kwargs(str(options["model"])),
            rendering=replace(rendering, now=now or datetime.today()),  # the same day, however long it takes
        )
        lengths: dict[str, Any] = {"max_completion_length": answer_length(options)}
        rows = sampler.rows(source, **prompt_limits(options), **lengths)
        rewards = (
            load_rewards(
                options["reward_funcs"],
                options.get("reward_weights"),
                device=sampler.device,
                dtype=fast_dtype(sampler.device),
                **reward_limits(run_config(run_of(Path(str(options["model"])))) | options),
            )
            if options.get("reward_funcs")
            else []
        )
        check_room(rewards, rows, lengths["max_completion_length"])
        aggregation = aggregation_of(options, [r.weight for r in rewards], len(rewards)) if rewards else SUM
    first = 0
    if draft is not None:
        first = draft.begin(made_from(options, sampler, rows, num_samples), len(rows), CHUNK)
    progress = make_progress(console)
    # A live bar takes over stdout, where the answers go unless they are written to a file.
    with costs_said(console, rewards), progress if options.get("output") else nullcontext():
        count = Counter(progress, f"{num_samples} answer(s) to each prompt", len(rows))
        count(first)
        for start in range(first, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            drawn = sampler.sample(
                chunk,
                num_samples,
                temperature=float(options.get("temperature", 1.0)),
                seed=int(options.get("seed", 42)),
                first_position=start,
                **lengths,
            )
            scored = sampler.score(rewards, chunk, drawn, aggregation).rewards_PM if rewards else None
            if start == first and scored is not None:
                _warn_of_constant(scored, sampler.texts(drawn), chunk, console)
            if len(rows) > 1:
                count(len(chunk))
            yield _as_rows(chunk, drawn, sampler.texts(drawn), scored, token_ids=token_ids)


def _warn_of_constant(rewards_PM: Any, texts: Any, rows: Any, console: Console) -> None:
    from bondlm.rewards.constant import constant_rewards

    text = constant_rewards(rewards_PM, texts, [row["prompt"] for row in rows])
    if text is not None:
        say(console, f"warning: {text}")


def _as_rows(
    rows: Any, drawn: Any, texts: list[list[str]], rewards: Any, *, token_ids: bool
) -> list[list[dict[str, Any]]]:
    from bondlm.data.columns import DRAWN_IDS, TEMPLATE_VARIABLES, TOOLS

    groups = []
    for i, row in enumerate(rows):
        columns = {name: row[name] for name in (TOOLS, TEMPLATE_VARIABLES) if row.get(name)}
        group = [{"prompt": row["prompt"], **columns, "completion": text} for text in texts[i]]
        if rewards is not None:
            for answer, reward, completion in zip(group, rewards[i].tolist(), drawn[i], strict=True):
                answer |= {"reward": reward, "finished": completion.finished}
                answer |= {DRAWN_IDS: list(completion.ids)} if token_ids else {}
        groups.append(group)
    return groups
