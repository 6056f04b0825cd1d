"""`bondlm prefer RUN`: a person picks the better of two answers, pair by pair, on a local page."""

from pathlib import Path
from typing import Any

from bondlm.cli.console import make_console, say
from bondlm.errors import ConfigError

OUTPUT = "preferences.jsonl"


def run(options: dict[str, Any]) -> int:
    """Serve the page until all pairs are decided or the person ends it; print what `reward-model` can read."""
    from bondlm.stages.prefer.choices import Choices, held
    from bondlm.stages.prefer.pairs import read_pairs, samples_file
    from bondlm.stages.prefer.server import PreferServer

    sources = options.get("runs") or []
    if len(sources) != 1:
        raise ConfigError("name one run folder or one file of samples: bondlm prefer RUN")
    count, port = _whole(options, "pairs_per_prompt", 1, 1), _whole(options, "port", 0, 0)
    seed = _whole(options, "seed", 42, 0)
    samples = samples_file(Path(str(sources[0])))
    path = Path(str(options.get("output") or samples.with_name(OUTPUT)))
    console = make_console()
    with held(path):
        choices = Choices(path)
        pairs = read_pairs(samples, count, seed)
        try:
            server = PreferServer(choices, pairs, port)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"port={port}: cannot listen on it: {error}") from error
        with server:
            if server.num_left:
                say(
                    console,
                    f"{server.num_left} of {len(pairs)} pairs to decide: open {server.url}\n"
                    "Keys: left and right arrow, t (tie), s (skip), q (end). Ctrl-C ends it, too.",
                )
                try:
                    server.serve_forever(poll_interval=0.05)
                except KeyboardInterrupt:
                    pass  # every choice is already saved
            left, kept = server.num_left, server.kept
    say(console, f"{kept} more choices, {left} of {len(pairs)} pairs left: {path}")
    return 0


def _whole(options: dict[str, Any], name: str, default: int, least: int) -> int:
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r}: must be a whole number, at least {least}")
    return value
