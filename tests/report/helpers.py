"""A complete run folder with made-up numbers that hang together: a policy near Best-of-6 of a flat reference."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

M, N = 16, 6.3
CONFIG = "model: org/model\nobjective: jbond\nhub_token: hf_verysecret\neta: 0.05\n"
WORDS = "the boil an egg water minutes please gently answer sentence river stamp paper often because".split()


def interval(value: float, arm: float) -> dict[str, float]:
    return {"value": value, "low": value - arm, "high": value + arm}


def order(value: float, arm: float) -> dict[str, Any]:
    return interval(value, arm) | {"text": f"{value:.1f} [{value - arm:.1f}, {value + arm:.1f}]"}


def kl(n: float) -> float:
    return math.log(n) - (n - 1) / n


def reward(n: float) -> float:
    """Mean of the best of n uniform rewards on [0, 2]."""
    return 2 * n / (n + 1)


def eval_json(n: float = N) -> dict[str, Any]:
    edges = [i / 10 for i in range(11)]
    u = np.array(edges)
    baselines = {"reference": {"reward": interval(1.0, 0.02), "completions/mean_length": 40.2, "distinct_2": 0.91}}
    for name, worth in {"reference, greedy": 2.9, "reference, T=0.3": 2.6, "reference, T=0.7": 1.7}.items():
        baselines[name] = {
            "reward": interval(reward(worth), 0.03),
            "win_rate": interval(worth / (worth + 1), 0.02),
            "effective_n": order(worth, 0.4),
            "completions/mean_length": 38.0,
            "completions/clipped_ratio": 0.07,
            "distinct_2": 0.84,
        }
    baselines["policy, greedy"] = baselines["reference, greedy"] | {"effective_n": order(8.1, 1.1)}
    baselines["reference, best of 8"] = {"reward": interval(reward(8), 0.02)}
    return {
        "effective_n": order(n, 1.3),
        "win_rate": interval(n / (n + 1), 0.0213),
        "kl": interval(1.4 * kl(n), 0.11),
        "reward": interval(reward(n) + 0.012, 0.0234),
        "matched": {"win_rate": order(n, 1.3), "log_quantile": order(n - 0.4, 1.2), "reward": order(n + 0.5, 1.5)},
        "log_quantile": interval(-1 / n, 0.02),
        "kl_k3": interval(1.38 * kl(n), 0.09),
        "kl_per_token": interval(1.4 * kl(n) / 41, 0.003),
        "kl_of_best_of_n": kl(n),
        "kl_ratio": 1.4,
        "num_prompts": 200,
        "num_samples": 4,
        "num_reference_samples": M,
        "steps": 200,
        "curve": [
            {"n": i, "reward": interval(reward(i), 0.02), "win_rate": i / (i + 1), "log_quantile": -1 / i, "kl": kl(i)}
            for i in range(1, M + 1)
        ],
        "against_best_of": [
            {
                "n": i,
                "win_rate": interval(n / (n + i), 0.02),
                "forward_kl": interval(abs(math.log(n / i)) + 0.1, 0.05),
                "backward_kl": interval(abs(math.log(n / i)) + 0.2, 0.05),
            }
            for i in (1, 2, 4, 8, 16)
        ],
        "quantile_histogram": {"edges": edges, "policy": np.diff(0.9 * u**n + 0.1 * u).tolist()},
        "baselines": baselines,
        "completions/mean_length": 41.3,
        "completions/clipped_ratio": 0.0525,
        "entropy": 2.1,
        "distinct_1": 0.41,
        "distinct_2": 0.83,
        "reward_length_correlation": 0.12,
        "judges": {
            "nli:small": {"reward": interval(0.62, 0.03), "reference_reward": interval(0.66, 0.02)}
            | {"win_rate": interval(0.47, 0.03)}
        },
        "pairwise": {
            "judge": {
                "win_rate": {"reference": interval(0.62, 0.05), "reference, best of 4": interval(0.51, 0.05)},
                "num_pairs": 380,
                "num_failed": 3,
                "agreement": 0.83,
            }
        },
        "warnings": ["the optimised reward rose while judge 'nli:small' fell: likely over-optimisation <b>"],
        "cost": {"tokens": 41.3, "best_of_n_tokens": 281.4, "n": 7},
        "objective": {"name": "jbond", "beta": 0.5, "gamma": 0.0, "eta": 0.05},
        "rewards": ["similarity:all-minilm-l6-v2", "reward.py:complete"],
        "model": "runs/x",
        "reference": "org/model",
        "versions": {"bondlm": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    }


def metrics(steps: int, n: float, seed: int) -> list[dict[str, Any]]:
    noise = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        worth = 1 + (n - 1) * (1 - math.exp(-3 * step / steps))
        rows.append(
            {
                "step": step,
                "loss": 1.0,
                "reward": reward(worth) + noise.normal(0, 0.05),
                "kl": 1.4 * kl(worth) + noise.normal(0, 0.05),
                "bond/penalty_rate": 1 / 3 - 0.1 * step / steps + noise.normal(0, 0.03),
                **{
                    f"time/{k}": v for k, v in {"generate": 14.0, "learn": 9.9, "reference": 5.1, "other": 0.04}.items()
                },
            }
        )
        if step % (steps // 4) == 0:
            row: dict[str, Any] = {"step": step}
            measures = (("effective_n", worth, 0.9), ("win_rate", worth / (worth + 1), 0.03))
            for name, value, arm in (*measures, ("kl", 1.4 * kl(worth), 0.2), ("reward", reward(worth), 0.05)):
                row |= {f"eval_{name}": value, f"eval_{name}_low": value - arm, f"eval_{name}_high": value + arm}
            rows.append(row)
    return rows


def sample_rows(count: int, seed: int = 0, words: int = 40) -> list[dict[str, Any]]:
    noise = np.random.default_rng(seed)

    def text(number: int) -> str:
        return " ".join(noise.choice(WORDS, number)).capitalize() + "."

    return [
        {
            "prompt": f"Prompt {i}: {text(12)}",
            "reference": {"text": text(words), "reward": float(noise.uniform(0, 2))},
            "reference_best_of_8": {"text": text(words), "reward": float(2 * noise.uniform() ** (1 / 8))},
            "policy": {"text": text(words), "reward": float(2 * noise.uniform() ** (1 / N))},
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(
    folder: Path, *, n: float = N, prompts: int = 30, steps: int = 40, seed: int = 0, change: Any = None
) -> Path:
    """Write a run folder, its eval.json with what `change` says; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.json").write_text(json.dumps(eval_json(n) | (change or {}), indent=2), encoding="utf-8")
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    write_jsonl(folder / "eval_samples.jsonl", sample_rows(prompts, seed))
    write_jsonl(folder / "metrics.jsonl", metrics(steps, n, seed))
    return folder
