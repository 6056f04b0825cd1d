"""`bondlm score`: many scored samples per prompt, as JSONL rows {prompt, completion, reward}."""

from typing import Any

from bondlm.cli.console import make_console
from bondlm.cli.sample import fresh_file, generate
from bondlm.errors import ConfigError


def run(options: dict[str, Any]) -> int:
    """Write `output`, a chunk of prompts at a time."""
    for name in ("model", "reward_funcs", "dataset", "output"):
        if not options.get(name):
            raise ConfigError(f"{name} is required: set it in the config or with --{name}")
    if options.get("temperature", 1.0) != 1.0:
        raise ConfigError(f"temperature={options['temperature']}: scored samples follow the model's own law, at 1")
    num_samples = int(options.get("num_samples", 16))
    if num_samples < 1:
        raise ConfigError(f"num_samples={num_samples}: must be >= 1")
    path = fresh_file(str(options["output"]))
    from bondlm.runfolder import append_jsonl

    for groups in generate(options, options["dataset"], num_samples, make_console(stderr=True)):
        append_jsonl(path, [row for group in groups for row in group])
    return 0
