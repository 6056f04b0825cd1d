"""A baseline without training: the reference at lower temperatures, measured by win rate and KL like the study's runs.

    python benchmarks/paper/sharpened.py summarization       # or dialogue; writes results/sharpened.json

`write_up.py` draws it as a dotted line. A method whose curve lies on it has learned to sharpen, not the reward.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import run as study
import torch
from plans import Run, jbond
from tasks import TASKS

TEMPERATURES = (0.9, 0.8, 0.7, 0.6, 0.5)


def point(trainer: Any, bench: Any, temperature: float, num_samples: int) -> dict[str, float]:
    """Win rate and KL of the reference at `temperature`, against the reference at T = 1."""
    samples = trainer.sample(bench.rows, "reference", num_samples, temperature=temperature)
    drawn = torch.tensor([[c.logprob for c in row] for row in samples.completions])
    mine, theirs = samples.rewards_PM.unsqueeze(2), bench.reference.rewards_PM.unsqueeze(1)
    return {
        "temperature": temperature,
        "win_rate": float(((mine > theirs).double() + (mine == theirs).double() / 2).mean()),
        "kl": float((drawn - trainer.log_probability(samples, "reference")).mean()),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--file", type=Path, default=study.RESULTS.parent / "sharpened.json")
    chosen, rest = parser.parse_known_args(argv)
    args = study.arguments(["x9", *rest])
    task = TASKS[chosen.task]
    with tempfile.TemporaryDirectory() as folder:
        config = study.config_of(task, Run(name="none", settings=jbond()), 0, Path(folder), args)
        trainer, bench = study.prepare(task, config, None, args)
        points = [point(trainer, bench, temperature, args.samples) for temperature in TEMPERATURES]
    for each in points:
        print(f"T = {each['temperature']}: win rate {each['win_rate']:.3f}, KL {each['kl']:.3f}")
    known = json.loads(chosen.file.read_text(encoding="utf-8")) if chosen.file.exists() else {}
    known[chosen.task] = {"points": points} | study.facts(args)
    chosen.file.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
