"""What a trained policy's weight change is made of: scaled down, its largest entries, its leading singular values.

    python benchmarks/paper/directions.py --seed 1 --threads 1       # trains X9's jbond-eta0.3, then measures

If part of the change were noise, leaving that part out would save KL at the same win rate. Prints a line per variant.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import run as study
import torch
from plans import Run, jbond
from tasks import TASKS
from torch import Tensor

Change = dict[str, Tensor]  # by parameter name
LARGEST_VOCABULARY = 10_000  # larger matrices are embeddings, too slow for an SVD
SAMPLED = 1_000_000  # entries that set a threshold


def variants(change: Change) -> Iterator[tuple[str, Change]]:
    """(what was done, the remaining change)."""
    yield "whole", change
    for factor in (0.8, 0.6):
        yield f"scaled by {factor}", {name: factor * part for name, part in change.items()}
    for share in (0.5, 0.2, 0.1, 0.05):
        yield f"largest {share:.0%}", largest(change, share)
    yield "leading singular values", {name: leading(part) for name, part in change.items()}


def largest(change: Change, share: float) -> Change:
    """Only the entries of largest absolute value over all weights; the others are 0."""
    entries = torch.cat([part.abs().flatten() for part in change.values()])
    limit = entries[:: max(1, len(entries) // SAMPLED)].quantile(1 - share)
    return {name: part * (part.abs() >= limit) for name, part in change.items()}


def leading(part: Tensor, times_median: float = 2.2) -> Tensor:
    """A matrix reduced to its singular values above `times_median` times their median; anything else unchanged."""
    if part.ndim != 2 or max(part.shape) > LARGEST_VOCABULARY:
        return part
    left, values, right = torch.linalg.svd(part, full_matrices=False)
    kept = values > times_median * values.median()
    return (left[:, kept] * values[kept]) @ right[kept]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    chosen, rest = parser.parse_known_args(argv)
    args = study.arguments(["x9", *rest])
    task = TASKS["summarization"]
    with tempfile.TemporaryDirectory() as folder:
        run = Run(name="jbond", settings=jbond(0.3))
        trainer, bench = study.prepare(task, study.config_of(task, run, chosen.seed, Path(folder), args), None, args)
        weights = dict(trainer.roles.model.named_parameters())
        start = {name: weight.detach().clone() for name, weight in weights.items()}
        trainer.train()
        change = {name: weight.detach() - start[name] for name, weight in weights.items()}
        for name, part in variants(change):
            with torch.no_grad():
                for key, weight in weights.items():
                    weight.copy_(start[key] + part[key])
            result = bench.measure(args.samples, both_kls=False)
            print(f"{name:26} win rate {result['win_rate']['value']:.3f}, KL {result['kl']['value']:.3f}", flush=True)


if __name__ == "__main__":
    main()
