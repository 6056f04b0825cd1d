"""The numbers of `eval.json` from scored samples (docs/evaluation.md lists them)."""

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from typing import Any

import bondlm
from bondlm.bestofn import EffectiveN, Estimate, bootstrap_mean, effective_n, log_quantile, win_rates
from bondlm.bestofn.bootstrap import bootstrap_win_rate
from bondlm.bestofn.comparison import Against, Comparison, compare_samples
from bondlm.bestofn.effective import never_falls_short
from bondlm.bestofn.matching import winner_log_quantile
from bondlm.data.fingerprints import rows_fingerprint
from bondlm.evaluation.samples import text_metrics
from bondlm.rollout.samples import Samples

BEST_OF = (2, 4, 8)
FEW_PROMPTS = 30
CUT_WARNED, LONGER_WARNED = 0.5, 1.5
REPEATED_WARNED = 0.9  # distinct prompts per row: below, intervals are more than 5% too narrow


def summarize(
    policy: Samples,
    reference: Samples,
    others: Mapping[str, Samples],
    *,
    orders: Sequence[int] | None = None,
    opponent: Samples | None = None,
) -> dict[str, Any]:
    """All statistics of the samples, in the format of `eval.json`.

    Args:
        policy: m samples of each of P prompts, with their log-ratios.
        reference: M samples of each. If they have log-ratios, these give the forward KL to Best-of-n.
        others: baselines by name, compared with the same reference samples.
        orders: the n of each Best-of-n that the policy is compared with; None is 1, 2, 4, .. up to M.
        opponent: samples of another policy to compare with.

    Raises:
        ValueError: the policy's log-ratios are missing, or numbers are not finite.
    """
    if policy.log_ratio_PM is None:
        raise ValueError("the policy's samples need their log-ratios: score them under policy and reference")
    result = compare_samples(
        *(policy.rewards_PM, reference.rewards_PM, policy.log_ratio_PM, policy.lengths_PM, reference.log_ratio_PM),
        orders=orders,
    )
    numbers = _numbers(result) | text_metrics(policy)
    numbers |= {
        "num_prompts": len(policy.prompts),
        "prompts_sha256": rows_fingerprint([{"prompt": prompt} for prompt in policy.prompts])["sha256"],
        "num_samples": policy.rewards_PM.shape[1],
        "num_reference_samples": reference.rewards_PM.shape[1],
        "baselines": _baselines(result, reference, others),
        "goals": {name: _goal(*values) for name, values in policy.goals(reference).items()},
        "judges": {name: _judge(policy.judges[name], reference.judges[name]) for name in policy.judges},
        "cost": _cost(policy, reference, result.matched["win_rate"].value),
        "versions": versions(),
    }
    if opponent is not None:
        numbers["opponent"] = _opponent(policy, opponent)
    return numbers | {"warnings": _warnings(result, numbers, policy, reference)}


def interval(estimate: Estimate | EffectiveN) -> dict[str, Any]:
    """`{value, low, high}`, plus a text for an effective N."""
    ends = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return ends | {"text": str(estimate)} if isinstance(estimate, EffectiveN) else ends


def versions() -> dict[str, str]:
    """Versions of the packages that computed the numbers."""
    names = ("torch", "transformers")
    return {"bondlm": bondlm.__version__} | {name: importlib.metadata.version(name) for name in names}


def _numbers(result: Comparison) -> dict[str, Any]:
    worth = result.matched["win_rate"]
    needed = result.kl_of_best_of_n
    known = math.isfinite(worth.value) and needed > 0 and not worth.low <= 1  # near N = 1 any KL is a large multiple
    known = known and not result.kl.low <= 0  # an estimate of a KL may be negative
    simple = ("win_rate", "kl", "reward", "log_quantile", "kl_k3", "kl_per_token", "kl_k3_per_token")
    bins = len(result.histogram)
    return {
        "effective_n": interval(worth),
        **{name: interval(getattr(result, name)) for name in simple},
        "matched": {name: interval(found) for name, found in result.matched.items()},
        "kl_of_best_of_n": needed,
        "kl_ratio": result.kl.value / needed if known else None,
        "curve": [
            {"n": p.n, "reward": interval(p.reward)}
            | {name: getattr(p, name) for name in ("win_rate", "log_quantile", "kl", "policy_win_rate")}
            for p in result.curve
        ],
        "against_best_of": [_against(p) for p in result.against],
        "quantile_histogram": {"edges": [i / bins for i in range(bins + 1)], "policy": result.histogram},
    }


def _against(point: Against) -> dict[str, Any]:
    names = ("win_rate", "forward_kl", "backward_kl")
    return {"n": point.n} | {name: interval(getattr(point, name)) for name in names}


def _baselines(result: Comparison, reference: Samples, others: Mapping[str, Samples]) -> dict[str, Any]:
    among_others = bootstrap_mean(winner_log_quantile(reference.rewards_PM, 1).mean(dim=1))
    own = {"reward": interval(result.reference_reward), "log_quantile": interval(among_others)}
    rows: dict[str, Any] = {"reference": own | text_metrics(reference)}
    for name, samples in others.items():
        rows[name] = {
            "reward": interval(bootstrap_mean(samples.rewards_PM.mean(dim=1))),
            "win_rate": interval(bootstrap_win_rate(win_rates(samples.rewards_PM, reference.rewards_PM))),
            "effective_n": interval(effective_n(samples.rewards_PM, reference.rewards_PM)),
            "log_quantile": interval(bootstrap_mean(_log_quantiles(samples, reference))),
            **_texts_of(name, samples),
        }
    for n in BEST_OF:
        if n <= len(result.curve):
            rows[f"reference, best of {n}"] = {"reward": interval(result.curve[n - 1].reward)}
    return rows


def _texts_of(name: str, samples: Samples) -> dict[str, float]:
    """`text_metrics`, without an entropy that is not known: greedy answers' log-probabilities are of temperature 1."""
    found = text_metrics(samples)
    is_known = math.isfinite(found["entropy"]) and not name.endswith("greedy")
    return found if is_known else {key: value for key, value in found.items() if key != "entropy"}


def _log_quantiles(samples: Samples, reference: Samples) -> Any:
    return log_quantile(samples.rewards_PM, reference.rewards_PM, method="harmonic").mean(dim=1)


def _opponent(policy: Samples, opponent: Samples) -> dict[str, Any]:
    return {
        "reward": interval(bootstrap_mean(opponent.rewards_PM.mean(dim=1))),
        "win_rate": interval(bootstrap_win_rate(win_rates(policy.rewards_PM, opponent.rewards_PM))),
        "num_samples": opponent.rewards_PM.shape[1],
        **text_metrics(opponent),
    }


def _goal(mine: Any, refs: Any) -> dict[str, Any]:
    """One of several rewards on its own, on the prompts that it applies to."""
    return _judge(mine, refs) | {"effective_n": interval(effective_n(mine, refs)), "num_prompts": len(mine)}


def _judge(mine: Any, refs: Any) -> dict[str, Any]:
    return {
        "reward": interval(bootstrap_mean(mine.mean(dim=1))),
        "reference_reward": interval(bootstrap_mean(refs.mean(dim=1))),
        "gain": interval(bootstrap_mean(mine.mean(dim=1) - refs.mean(dim=1))),
        "win_rate": interval(bootstrap_win_rate(win_rates(mine, refs))),
    }


def _cost(policy: Samples, reference: Samples, worth: float) -> dict[str, float]:
    """Tokens per answer; Best-of-n draws n answers of the reference.

    There are no times: policy and reference draw in batches of different sizes, so their times are not comparable.
    """
    n = math.ceil(min(worth, reference.rewards_PM.shape[1]) - 1e-9)
    return {
        "tokens": float(policy.lengths_PM.mean()),
        "best_of_n_tokens": n * float(reference.lengths_PM.mean()),
        "n": n,
    }


def _warnings(result: Comparison, numbers: Mapping[str, Any], policy: Samples, reference: Samples) -> list[str]:
    """Caveats that a reader must know about the headline."""
    worth = result.matched["win_rate"]
    num_rows, distinct = len(policy.prompts), len({repr(prompt) for prompt in policy.prompts})
    length, ref_length = float(policy.lengths_PM.mean()), float(reference.lengths_PM.mean())
    found = [
        (
            distinct < FEW_PROMPTS,
            f"only {distinct} prompts: the intervals are rough (with one prompt there is none)",
        ),
        (
            distinct < REPEATED_WARNED * num_rows,
            f"of {num_rows} held-out prompts only {distinct} are distinct: the intervals are too narrow, as they count "
            "each repetition as a prompt of its own. Give each prompt once",
        ),
        (
            any(n.low > worth.high or n.high < worth.low for n in result.matched.values()),
            "the effective N depends on how it is measured: "
            + ", ".join(f"{name.replace('_', '-')} {n}" for name, n in result.matched.items())
            + ". Rewards that tie, or a policy narrower or wider than Best-of-N",
        ),
        (
            never_falls_short(policy.rewards_PM, reference.rewards_PM),
            "none of the policy's samples is below the best of the reference's for its prompt, so N is bounded from "
            "below only. Harder prompts, or a reward with more levels, would measure it",
        ),
        (
            numbers["completions/clipped_ratio"] > CUT_WARNED,
            f"{numbers['completions/clipped_ratio']:.0%} of the policy's answers were cut at the token budget",
        ),
        (
            length > LONGER_WARNED * ref_length,
            f"the policy's answers are longer than the reference's: {length:.0f} tokens against {ref_length:.0f}",
        ),
    ]
    return [text for holds, text in found if holds] + _over_optimised(result, numbers) + _sharpened(numbers)


def _over_optimised(result: Comparison, numbers: Mapping[str, Any]) -> list[str]:
    """Warn if the optimised reward rose and a judge's reward fell, both significantly, per prompt."""
    if not result.gain.low > 0:
        return []
    fallen = [name for name, judge in numbers["judges"].items() if judge["gain"]["high"] < 0]
    return [
        f"over-optimisation: the optimised reward rose by {result.gain.value:.3g}, but the judge {name!r} fell by "
        f"{-numbers['judges'][name]['gain']['value']:.3g}"
        for name in fallen
    ]


def _sharpened(numbers: Mapping[str, Any]) -> list[str]:
    """Warn if the untouched model at a lower temperature does as well, since that needs no training."""
    rows = {k: v for k, v in numbers["baselines"].items() if k.startswith("reference, ") and "win_rate" in v}
    if not rows:
        return []
    name = max(rows, key=lambda row: rows[row]["win_rate"]["value"])
    best, own = rows[name]["win_rate"]["value"], numbers["win_rate"]["value"]
    if best < own:
        return []
    return [f"sharpening alone does as well: {name!r} wins {best:.3f}, the policy {own:.3f}"]
