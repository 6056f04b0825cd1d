"""Measuring a policy while it trains: against reference samples that all runs of a task share.

The reference's samples, rewards and judge scores are made once per task and budget and kept in a file, so a measurement
costs only the policy's samples. Its seconds do not count as training time.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from bondlm.engines import Completion
from bondlm.evaluation.rouge import rouge_judge
from bondlm.evaluation.statistics import summarize
from bondlm.rewards import NamedReward, load_rewards
from bondlm.rollout.samples import Samples, score_samples
from bondlm.runs.folder import append_jsonl, plain

CURVE_FILE = "curve.jsonl"
KEPT = (
    *("effective_n", "win_rate", "kl", "kl_k3", "reward", "log_quantile", "matched", "kl_of_best_of_n", "kl_ratio"),
    *("judges", "against_best_of", "completions/mean_length", "completions/clipped_ratio", "entropy", "distinct_2"),
    *("num_prompts", "num_samples", "num_reference_samples"),
)


def load_judges(specs: Sequence[str], rows: Sequence[Any], column: str | None, device: Any) -> list[NamedReward]:
    """Rewards that are reported but not optimised."""
    judges = load_rewards(list(specs), [0.0] * len(specs), device=device, dtype=torch.float32) if specs else []
    return judges + ([rouge_judge(rows, column)] if column is not None else [])


class Bench:
    """Held-out prompts with their reference samples, and the judges."""

    def __init__(self, trainer: Any, judges: list[NamedReward], folder: Path, key: str, num_reference: int) -> None:
        """Read the reference's samples, or draw them (the trainer's reference is the untouched model)."""
        self._trainer, self.judges = trainer, judges
        self.rows: list[dict[str, Any]] = trainer.eval_dataset.to_list()
        prompts = json.dumps([row["prompt"] for row in self.rows], sort_keys=True)
        digest = hashlib.sha256(f"{key} {num_reference} {prompts}".encode()).hexdigest()[:12]
        path = folder / f"reference-{digest}.json"
        if not path.exists():
            samples = trainer.sample(self.rows, "reference", num_reference)
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".tmp")
            partial.write_text(json.dumps(_to_json(samples, self._judge(samples))), encoding="utf-8")
            partial.replace(path)
        self.reference, self._reference_judges = _from_json(json.loads(path.read_text(encoding="utf-8")), self.rows)

    def _judge(self, samples: Samples) -> dict[str, torch.Tensor]:
        if not self.judges:
            return {}
        scored = score_samples(self.judges, self.rows, samples.completions, encoder=self._trainer.encoder)
        return scored.by_name

    def measure(self, num_samples: int, *, both_kls: bool) -> dict[str, Any]:
        """The numbers of `eval.json` (docs/evaluation.md) for the weights that the run would save now.

        With `average_weights`, these are the averaged weights.
        """
        with self._trainer.average.in_place():
            samples = self._trainer.sample(self.rows, "policy", num_samples)
            policy = self._scored(samples, self._judge(samples), self._trainer.log_ratio(samples))
            # The reference's log-probabilities of its samples are those recorded at sampling.
            sampled = torch.tensor([[c.logprob for c in row] for row in self.reference.completions])
            ratio = self._trainer.log_probability(self.reference, "policy") - sampled if both_kls else None
        result = summarize(policy, self._scored(self.reference, self._reference_judges, ratio), {})
        return {name: result[name] for name in KEPT if name in result}

    def _scored(self, samples: Samples, judges: dict[str, torch.Tensor], ratio: torch.Tensor | None) -> Samples:
        return replace(samples, log_ratio_PM=None if ratio is None else ratio.double().cpu(), judges=judges)


def _to_json(samples: Samples, judges: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {
        "ids": [[c.ids for c in row] for row in samples.completions],
        "logprobs": [[c.logprobs for c in row] for row in samples.completions],
        "finished": [[c.finished for c in row] for row in samples.completions],
        "texts": samples.texts,
        "rewards": samples.rewards_PM.tolist(),
        "by_name": {name: values.tolist() for name, values in samples.by_name.items()},
        "judges": {name: values.tolist() for name, values in judges.items()},
    }


def _from_json(kept: dict[str, Any], rows: Sequence[Any]) -> tuple[Samples, dict[str, torch.Tensor]]:
    completions = [
        [Completion(*parts) for parts in zip(*row, strict=True)]
        for row in zip(kept["ids"], kept["logprobs"], kept["finished"], strict=True)
    ]

    def number(values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    by_name = {name: number(values) for name, values in kept["by_name"].items()}
    samples = Samples.of_rows(rows, completions, number(kept["rewards"]), texts=kept["texts"], by_name=by_name)
    return samples, {name: number(values) for name, values in kept["judges"].items()}


class Curve(TrainerCallback):
    """Measures at chosen steps and appends a row to the run's curve: step, tokens drawn, training seconds (wall
    clock and CPU) and the measured numbers."""

    def __init__(self, bench: Bench, path: Path, at_steps: set[int], num_samples: int, *, both_kls: bool) -> None:
        """Nothing is measured before training starts."""
        self._bench, self._path, self._at = bench, path, at_steps
        self._num_samples, self._both_kls = num_samples, both_kls
        self._began = self._measuring = self._tokens = 0.0
        self._cpu_began = self._cpu_measuring = 0.0
        self._last = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Start the clock."""
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        """Count tokens, and measure: a step's numbers are logged after it has ended."""
        if not logs or "num_tokens" not in logs:
            return
        self._tokens += float(logs["num_tokens"]) * args.logging_steps
        if state.global_step in self._at:
            self.take(state.global_step)

    def take(self, step: int) -> None:
        """Measure now."""
        if step == self._last:
            return
        self._last = step
        began, cpu_began = time.perf_counter(), time.process_time()
        seconds = began - self._began - self._measuring
        cpu_seconds = cpu_began - self._cpu_began - self._cpu_measuring
        # Both KLs need the policy's log-probability of every reference sample: computed once, at the end.
        result = self._bench.measure(self._num_samples, both_kls=self._both_kls and step >= max(self._at))
        row = {"step": step, "tokens": self._tokens, "seconds": seconds, "cpu_seconds": cpu_seconds} | result
        append_jsonl(self._path, [plain(row)])
        self._measuring += time.perf_counter() - began
        self._cpu_measuring += time.process_time() - cpu_began
