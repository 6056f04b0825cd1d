"""The evaluation that ends a run: `eval.json`, `samples_eval.jsonl`, a table, and the model card.

Every row of the table is judged by the same two measures, against the same M reference samples at temperature 1: the
mean reward, and the win rate with the N that it is worth. The untouched model at lower temperatures is there because
sharpening alone also raises the reward: a sceptic's first question.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bondlm.bestofn import bootstrap_mean, effective_n, expected_best_of_n, kl_bound, win_rates
from bondlm.evaluation.card import write_card
from bondlm.evaluation.table import print_phases, print_samples, print_table
from bondlm.held_out import compare
from bondlm.rollout import Samples, completion_metrics
from bondlm.runfolder import append_jsonl, plain

BASELINES = {
    "reference, greedy": ("reference", 0.0),
    "reference, T=0.7": ("reference", 0.7),
    "policy, greedy": ("policy", 0.0),
}
BEST_OF = (2, 4, 8)
EVAL_FILE, EVAL_SAMPLES_FILE = "eval.json", "eval_samples.jsonl"


def evaluate_run(trainer: Any, folder: Path, console: Any, reporter: Any) -> dict[str, Any]:
    """Evaluate the trainer's policy on its held-out prompts and write the run folder's `eval.json`."""
    rows = trainer.eval_dataset.to_list()
    args = trainer.args
    with _counted(trainer, reporter, "held-out samples of the policy", len(rows)):
        policy = trainer.sample(rows, "policy", args.eval_num_samples)
    with _counted(trainer, reporter, "held-out samples of the reference", len(rows)):
        reference = trainer.sample(rows, "reference", args.eval_num_reference_samples)
    with _counted(trainer, reporter, "baselines", len(rows) * len(BASELINES)):
        others = {
            name: trainer.sample(rows, role, 1 if temperature == 0 else args.eval_num_samples, temperature=temperature)
            for name, (role, temperature) in BASELINES.items()
        }
    result = summarize(policy, reference, trainer.log_ratio(policy), others)
    result |= {"num_prompts": len(rows), "steps": trainer.state.global_step}
    if trainer.is_world_process_zero():
        (folder / EVAL_FILE).write_text(json.dumps(plain(result), indent=2) + "\n", encoding="utf-8")
        (folder / EVAL_SAMPLES_FILE).unlink(missing_ok=True)
        append_jsonl(folder / EVAL_SAMPLES_FILE, list(side_by_side(rows, policy, reference)))
        write_card(folder, trainer, result)
        print_samples(console, list(side_by_side(rows, policy, reference)))
        print_table(console, result)
        print_phases(console, *reporter.mean_phases())
    return result


@contextmanager
def _counted(trainer: Any, reporter: Any, description: str, total: int) -> Iterator[None]:
    counter = reporter.counting(description, total)
    trainer.engine.on_prompts_done = counter
    try:
        yield
    finally:
        trainer.engine.on_prompts_done = None
        counter.close()


def summarize(
    policy: Samples, reference: Samples, log_ratio_Pm: torch.Tensor, others: Mapping[str, Samples]
) -> dict[str, Any]:
    """The numbers of `eval.json`: `effective_n`, `win_rate`, `kl`, `reward` as {value, low, high}, and `baselines`."""
    held_out = compare(policy, reference, log_ratio_Pm)
    effective = held_out.effective_n
    num_ref = reference.rewards_PM.shape[1]
    result: dict[str, Any] = {
        "effective_n": _interval(effective) | {"text": str(effective)},
        "win_rate": _interval(held_out.win_rate),
        "kl": _interval(held_out.kl),
        "reward": _interval(held_out.reward),
        # The KL that exact Best-of-N needs at this N; log N - (N - 1)/N holds for continuous rewards.
        "kl_of_best_of_n": kl_bound(min(effective.value, num_ref)),
        **completion_metrics(policy.flat),
    }
    result["baselines"] = {
        "reference": {"reward": _interval(held_out.reference_reward), **completion_metrics(reference.flat)},
        **{name: _against(samples, reference) for name, samples in others.items()},
        **{
            f"reference, best of {n}": {
                "reward": _interval(bootstrap_mean(expected_best_of_n(reference.rewards_PM, n)))
            }
            for n in BEST_OF
            if n <= num_ref
        },
    }
    return result


def _against(samples: Samples, reference: Samples) -> dict[str, Any]:
    effective = effective_n(samples.rewards_PM, reference.rewards_PM)
    return {
        "reward": _interval(bootstrap_mean(samples.rewards_PM.mean(dim=1))),
        "win_rate": _interval(bootstrap_mean(win_rates(samples.rewards_PM, reference.rewards_PM))),
        "effective_n": _interval(effective) | {"text": str(effective)},
        **completion_metrics(samples.flat),
    }


def _interval(estimate: Any) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def side_by_side(
    rows: list[dict[str, Any]], policy: Samples, reference: Samples, best_of: int = 8
) -> Iterator[dict[str, Any]]:
    """Per prompt: one reference sample, the reference's best of 8, one policy sample, each with its reward."""
    best_of = min(best_of, reference.rewards_PM.shape[1])
    best = reference.rewards_PM[:, :best_of].argmax(dim=1).tolist()
    for i, row in enumerate(rows):
        yield {
            "prompt": row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"],
            "reference": _sample(reference, i, 0),
            f"reference_best_of_{best_of}": _sample(reference, i, best[i]),
            "policy": _sample(policy, i, 0),
        }


def _sample(samples: Samples, i: int, j: int) -> dict[str, Any]:
    return {"text": samples.texts[i][j], "reward": float(samples.rewards_PM[i, j])}
