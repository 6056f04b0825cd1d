"""Which N a method reaches for its setting, and at what KL; the T5 of the summarization example.

    python examples/summarization/prepare.py --out models --data data --sft-steps 60
    python benchmarks/paper/dial.py --seeds 0            # finished runs are skipped; half an hour per run on one core
    python benchmarks/paper/dial.py --table

The reward is cheap, so that runs can be long: how similar a synopsis' words are to its description's. Every method
draws 96 completions per step (90 where 10 of them are the reference's), and its learning rate falls to 0 over the last
third.
"""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from facts import run_missing

from bondlm import BONDConfig, BONDTrainer
from bondlm.bestofn import kl_bound
from bondlm.data.prompts import load_prompts
from bondlm.evaluation.rouge import rouge_l
from bondlm.rollout.samples import Samples

OUT = Path(__file__).parent / "results" / "dial.jsonl"
LENGTH = 16
COMPLETIONS, HELD_OUT, SAMPLES, REFERENCE_SAMPLES = 96, 150, 4, 16


def own(n: int, *, adaptive: bool) -> dict[str, Any]:
    """Best-of-n as a fixed point, with the strength solved for n or adapted to the measured N."""
    return {"objective": "self_bond", "n": n, "num_samples": 8, "adaptive_strength": adaptive}


def rloo(beta_rl: float) -> dict[str, Any]:
    """The baseline, which sets a price on KL instead of an N."""
    return {"objective": "rloo", "beta_rl": beta_rl, "num_samples": 8, "anchor": "fixed"}


METHODS: dict[str, dict[str, Any]] = {
    "self_bond n=4": own(4, adaptive=False),
    "self_bond n=8": own(8, adaptive=False),
    "self_bond n=4, adaptive": own(4, adaptive=True),
    "self_bond n=8, adaptive": own(8, adaptive=True),
    **{f"rloo beta_rl={beta}": rloo(beta) for beta in (0.02, 0.04)},
}


class Likeness:
    """The reward: cosine between the mean word vectors of a synopsis and of its description.

    Word vectors are MiniLM's input embeddings, centred, with more weight on rare words; no encoder runs.
    """

    def __init__(self, minilm: Path, texts: list[str]) -> None:
        """Word rarity is counted in `texts`."""
        self._tokenizer = AutoTokenizer.from_pretrained(minilm)
        vectors = AutoModel.from_pretrained(minilm).get_input_embeddings().weight.detach()
        counts = torch.ones(len(vectors))
        for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]:
            counts[list(set(ids))] += 1
        self._vectors = normalize(vectors - vectors.mean(dim=0)) * (len(texts) / counts).log()[:, None]

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        """One number in [-1, 1] per completion; 0 for an empty one."""
        whole = [prompt.removeprefix("summarize: ") for prompt in prompts]
        likeness: list[float] = cosine_similarity(self._mean(completions), self._mean(whole)).tolist()
        return likeness

    def _mean(self, texts: list[str]) -> Tensor:
        encoded = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return torch.stack([self._vectors[ids].sum(dim=0) for ids in encoded])


def trainer_of(method: str, seed: int, options: argparse.Namespace, folder: str) -> BONDTrainer:
    """The trainer of a method."""
    settings, steps = METHODS[method], options.steps
    drawn = 8 + bool(settings.get("adaptive_strength"))
    args = BONDConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=COMPLETIONS // drawn,
        max_completion_length=LENGTH,
        learning_rate=options.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps // 3, "decay_type": "linear"},
        warmup_steps=5,
        logging_steps=20,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
        report_to="none",
        eval_num_samples=SAMPLES,
        eval_num_reference_samples=REFERENCE_SAMPLES,
        **settings,
    )
    train, held_out = (load_prompts(str(options.data / f"{name}.jsonl")) for name in ("train", "heldout"))
    held_out = held_out.select(range(HELD_OUT))
    likeness = Likeness(options.minilm, list(train["prompt"]))
    return BONDTrainer(str(options.policy), likeness, args, train_dataset=train, eval_dataset=held_out)


def run(method: str, seed: int, folder: str, *, options: argparse.Namespace) -> dict[str, Any]:
    """Train, then measure."""
    trainer = trainer_of(method, seed, options, folder)
    trainer.train()
    found = trainer.evaluate()
    policy, reference = trainer.held_out_samples(trainer.eval_dataset)
    written = list(trainer.eval_dataset["reference"])
    judges = {"rouge_l": judged(policy, written), "rouge_l_reference": judged(reference, written)}
    names = ("win_rate", "effective_n", "kl")
    measured = {n + end: found[f"eval_{n}{end}"] for n in names for end in ("", "_low", "_high")}
    n = found["eval_effective_n"]
    kl_ratio = found["eval_kl"] / kl_bound(n) if 1 < n < math.inf else None
    curve = [
        {key: round(row[key], 4) for key in ("step", "kl", "bond/effective_n", "bond/signal_factor") if key in row}
        for row in trainer.state.log_history
        if "kl" in row
    ]
    facts = {"method": method, "seed": seed, "step": options.steps, "learning_rate": options.learning_rate}
    return facts | measured | judges | {"kl_ratio": kl_ratio, "curve": curve}


def judged(samples: Samples, written: list[str]) -> float:
    """Mean ROUGE-L against what a person wrote, which no run optimises."""
    return mean(rouge_l(text, one) for texts, one in zip(samples.texts, written, strict=True) for text in texts)


def mean_of(rows: list[dict[str, Any]], key: str) -> str:
    """The mean over the rows that have a number there; a ratio is None where N is 1 or beyond the samples."""
    found = [row[key] for row in rows if row[key] is not None]
    if not found:
        return "-"
    return f"{mean(found):.3f}" + (f" ({len(found)} of {len(rows)})" if len(found) < len(rows) else "")


def table() -> None:
    """Print means over seeds."""
    found = [json.loads(line) for line in OUT.read_text().splitlines()]
    print(
        "| method | steps | learning rate | seeds | N | win rate | KL | KL / exact |\n|---|---|---|---|---|---|---|---|"
    )
    for step, rate in sorted({(row["step"], row["learning_rate"]) for row in found}):
        for method in METHODS:
            rows = [r for r in found if (r["method"], r["step"], r["learning_rate"]) == (method, step, rate)]
            if rows:
                cells = [mean_of(rows, key) for key in ("effective_n", "win_rate", "kl", "kl_ratio")]
                print(f"| {method} | {step} | {rate:g} | {len(rows)} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--only", nargs="*", default=list(METHODS))
    parser.add_argument("--policy", type=Path, default=Path("models/t5-debian-sft"))
    parser.add_argument("--data", type=Path, default=Path("data/debian"))
    parser.add_argument("--minilm", type=Path, default=Path("models/all-minilm-l6-v2"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        table()
        return
    torch.set_num_threads(1)
    lines = OUT.read_text().splitlines() if OUT.exists() else []
    length = options.steps, options.learning_rate
    done = {(r["method"], r["seed"]) for r in map(json.loads, lines) if (r["step"], r["learning_rate"]) == length}
    run_missing(str(OUT), options.only, options.seeds, done, partial(run, options=options))


if __name__ == "__main__":
    main()
