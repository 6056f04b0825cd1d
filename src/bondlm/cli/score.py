"""`bondlm score`: many scored samples per prompt, as JSONL rows {prompt, completion, reward, finished, token_ids}.

`FILE.meta.json`, next to the file, states which model drew them for which prompts, and which rewards scored them.
"""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from bondlm.cli.console import make_console, say_json
from bondlm.cli.draft import drafted
from bondlm.cli.sample import generate
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
    from bondlm.data.origin import origin_file

    console = make_console(stderr=True)
    path = Path(options["output"])
    with drafted(str(path), num_samples, console) as draft:
        for groups in generate(options, options["dataset"], num_samples, console, draft=draft, token_ids=True):
            draft.add([row for group in groups for row in group])
        draft.finish(origin_file(path))
    if options.get("json"):
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        means = {name: fmean(row[name] for row in rows) for name in ("reward", "finished")}
        say_json({"output": str(path), "num_prompts": len(rows) // num_samples, "num_samples": num_samples, **means})
    return 0
