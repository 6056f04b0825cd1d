"""`bondlm score`: many scored samples per prompt, as JSONL rows {prompt, completion, reward, finished, token_ids}.

Beside the file stands `FILE.meta.json`: which model drew them behind which prompts, and which rewards scored them.
"""

import json
from typing import Any

from bondlm.cli.console import make_console, say_json
from bondlm.cli.sample import answer_length, fresh_file, generate, growing
from bondlm.cli.sampling import check_sampling
from bondlm.errors import ConfigError


def run(options: dict[str, Any]) -> int:
    """Write `output`, a chunk of prompts at a time."""
    for name in ("model", "reward_funcs", "dataset", "output"):
        if not options.get(name):
            raise ConfigError(f"{name} is required: set it in the config or with --{name}")
    check_sampling(options)
    if options.get("temperature", 1.0) != 1.0:
        raise ConfigError(f"temperature={options['temperature']}: scored samples are the model's own, drawn at 1")
    num_samples = options.get("num_samples", 16)
    path = fresh_file(str(options["output"]))
    from bondlm.data.fingerprints import model_fingerprint, reward_fingerprint
    from bondlm.data.origin import origin_file, prompting_of
    from bondlm.runs.folder import append_jsonl, write_whole

    def note_origin(sampler: Any) -> None:
        """Say beside the file what its rows were made from, once the model is loaded."""
        specs = options["reward_funcs"]
        origin = {
            "model": model_fingerprint(str(options["model"]), getattr(sampler.model.config, "_commit_hash", None)),
            "rewards": [reward_fingerprint(spec) for spec in (specs if isinstance(specs, list) else [specs])],
            "prompting": prompting_of(sampler.encoder.rendering),
            "reward_weights": options.get("reward_weights"),
            **{name: options[name] for name in ("reward_aggregation", "reward_tolerances") if options.get(name)},
            "num_samples": num_samples,
            "max_completion_length": answer_length(options),
            "seed": int(options.get("seed", 42)),
        }
        write_whole(origin_file(path), json.dumps(origin, indent=2) + "\n")

    console = make_console(stderr=True)
    prompts, rewards, finished = 0, 0.0, 0
    with growing(path, console) as partial:
        for groups in generate(options, options["dataset"], num_samples, console, note_origin, token_ids=True):
            rows = [row for group in groups for row in group]
            append_jsonl(partial, rows)
            prompts += len(groups)
            rewards += sum(row["reward"] for row in rows)
            finished += sum(row["finished"] for row in rows)
    if options.get("json"):
        drawn = prompts * num_samples
        means = {"reward": rewards / drawn, "finished": finished / drawn}
        say_json({"output": str(path), "num_prompts": prompts, "num_samples": num_samples, **means})
    return 0
