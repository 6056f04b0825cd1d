"""What the statistics of an evaluation cost: seconds and peak resident memory, bootstrap included.

    python benchmarks/eval_statistics.py [--prompts 10000] [--samples 64] [--no-baselines]

Measures the whole `eval.json`: comparison with the reference, Best-of-n curve, four baselines (two of them with as many
samples as the policy) and two judges. `--no-baselines` measures the comparison alone.
"""

import argparse
import resource
import time

import torch

from bondlm.evaluation.statistics import summarize
from bondlm.rollout.samples import Samples

TEXT = "a short answer of eight words or so"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=64, help="per prompt, for policy and reference each")
    parser.add_argument("--no-baselines", action="store_true")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)

    def normal(count: int) -> torch.Tensor:
        return torch.randn(options.prompts, count, dtype=torch.float64, generator=generator)

    def samples(count: int, shift: float = 0.0, *, main: bool = False) -> Samples:
        rewards = normal(count) + shift
        return Samples(
            prompts=[TEXT] * options.prompts,
            texts=[[TEXT] * count] * options.prompts,
            rewards_PM=rewards,
            lengths_PM=normal(count).abs() * 100 + 1,
            finished_PM=torch.ones_like(rewards),
            logprobs_PM=-normal(count).abs(),
            log_ratio_PM=normal(count) if main else None,
            judges={name: normal(count) for name in ("first", "second")} if main and not options.no_baselines else {},
        )

    policy, reference = samples(options.samples, 1.0, main=True), samples(options.samples, main=True)
    counts = {} if options.no_baselines else {"greedy": 1, "T=0.3": options.samples, "T=0.7": options.samples}
    others = {f"reference, {name}": samples(count) for name, count in counts.items()}
    if counts:
        others["policy, greedy"] = samples(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    result = summarize(policy, reference, others)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{options.prompts} prompts x {options.samples} samples, {len(others)} baselines, {len(policy.judges)} judges"
    )
    print(f"2000 resamples, {torch.get_num_threads()} threads: {seconds:.1f} s")
    print(f"peak resident memory: {peak:.0f} MiB, {before:.0f} MiB of them before (PyTorch and the samples)")
    print({name: found["text"] for name, found in result["matched"].items()})


if __name__ == "__main__":
    main()
