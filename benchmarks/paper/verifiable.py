"""Rewards that are 0 or 1: sums of two numbers and a model that gets a third of them right; pass@1, pass@k and KL.

    python benchmarks/paper/verifiable.py --seeds 0 1 2 3 4      # finished runs are skipped; minutes per run on a core
    python benchmarks/paper/verifiable.py --steps 400            # longer runs
    python benchmarks/paper/verifiable.py --learning_rate 2e-4   # four times the default
    python benchmarks/paper/verifiable.py --table

Every method draws 192 completions per step for the same training prompts; held-out sums are in no training set. The
start is a Llama of 0.4 M parameters, trained on sums until it gets about a third of them right at temperature 1.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))

from facts import run_missing

from bondlm import BONDConfig, BONDTrainer

OUT = Path(__file__).parent / "results" / "verifiable.jsonl"
SYMBOLS = ["<pad>", "<end>", *"0123456789+="]
PAD, END = 0, 1
COMPLETIONS, HELD_OUT, SAMPLES = 192, 256, 16
METHODS: dict[str, dict[str, Any]] = {
    "self_bond n=4": {"objective": "self_bond", "n": 4, "num_samples": 8, "log_quantile": "best_of_n"},
    "self_bond n=16": {"objective": "self_bond", "n": 16, "num_samples": 8, "log_quantile": "best_of_n"},
    "self_bond n=4, adaptive": {
        **{"objective": "self_bond", "n": 4, "num_samples": 8, "log_quantile": "best_of_n"},
        **{"adaptive_strength": True},
    },
    "grpo beta_rl=0.04": {"objective": "grpo", "beta_rl": 0.04, "num_samples": 8},
    "rloo beta_rl=0.1": {"objective": "rloo", "beta_rl": 0.1, "num_samples": 8, "anchor": "fixed"},
    "rloo beta_rl=0.3": {"objective": "rloo", "beta_rl": 0.3, "num_samples": 8, "anchor": "fixed"},
    "jbond eta=0.1": {"objective": "jbond", "eta": 0.1, "beta": 0.5, "gamma": 0.0},
    "listwise n=4": {"objective": "listwise", "n": 4, "num_samples": 8, "anchor": "fixed"},
    "listwise n=2, eta=0.1": {"objective": "listwise", "n": 2, "num_samples": 4, "eta": 0.1},
    "bond n=4, corrected": {
        **{"objective": "bond", "n": 4, "num_anchor_samples": 7, "anchor": "fixed"},
        **{"correction": True, "log_quantile": "harmonic"},
    },
}
# Completions per prompt; 8 for all other methods.
DRAWN = {"jbond eta=0.1": 3, "listwise n=2, eta=0.1": 4, "self_bond n=4, adaptive": 9}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    inner = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")


def sums() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Training and held-out pairs of numbers below 100."""
    pairs = [(a, b) for a in range(100) for b in range(100)]
    random.Random(0).shuffle(pairs)
    return pairs[HELD_OUT:], pairs[:HELD_OUT]


def rows(pairs: Iterable[tuple[int, int]]) -> list[dict[str, str]]:
    """The sums as dataset rows."""
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]


def correct(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 for the right sum, else 0."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def start_model(steps: int = 20000, wanted: float = 0.33) -> LlamaForCausalLM:
    """Learn sums by maximum likelihood until a third of the held-out ones are right."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"vocab_size": len(SYMBOLS), "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "max_position_embeddings": 64},
        **{"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": None},
    )
    model, encode = LlamaForCausalLM(config), {symbol: i for i, symbol in enumerate(SYMBOLS)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train, held_out = sums()
    for step in range(1, steps + 1):
        texts = [(f"{a}+{b}=", str(a + b)) for a, b in random.Random(step).sample(train, 128)]
        width = max(len(q) + len(r) for q, r in texts) + 1
        ids = torch.full((len(texts), width), PAD)
        labels = torch.full_like(ids, -100)
        for i, (question, right) in enumerate(texts):
            whole = [encode[c] for c in question + right] + [END]
            ids[i, : len(whole)] = torch.tensor(whole)
            labels[i, len(question) : len(whole)] = ids[i, len(question) : len(whole)]
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 and chance_of_right(model, held_out) >= wanted:
            print(f"start: {step} steps, {chance_of_right(model, held_out):.3f} right", flush=True)
            return model
    raise SystemExit(f"the start gets {chance_of_right(model, held_out):.3f} right after {steps} steps")


@torch.no_grad()
def chance_of_right(model: LlamaForCausalLM, pairs: Sequence[tuple[int, int]]) -> float:
    """The exact probability of the right answer at temperature 1, averaged over the sums."""
    encode, chances = {symbol: i for i, symbol in enumerate(SYMBOLS)}, []
    for a, b in pairs:
        question, right = f"{a}+{b}=", str(a + b)
        ids = torch.tensor([[encode[c] for c in question + right] + [END]])
        logp = model(input_ids=ids).logits[0, len(question) - 1 : -1].log_softmax(-1)
        chances.append(float(logp.gather(1, ids[0, len(question) :, None]).sum().exp()))
    return mean(chances)


def pass_at(rewards_PM: Tensor, k: int) -> float:
    """Unbiased pass@k (Chen et al. 2021, arXiv 2107.03374): 1 - C(m - c, k) / C(m, k), mean over prompts."""
    m = rewards_PM.shape[1]
    wrong = m - rewards_PM.sum(dim=1)
    i = torch.arange(k, dtype=torch.float64)
    return float(1 - ((wrong[:, None] - i).clamp(min=0) / (m - i)).prod(dim=1).mean())


def trainer_of(method: str, seed: int, start: Path, folder: str, steps: int = 100, rate: float = 5e-5) -> BONDTrainer:
    """The trainer of a method."""
    settings = METHODS[method]
    train, held_out = sums()
    args = BONDConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=COMPLETIONS // DRAWN.get(method, 8),
        max_completion_length=5,
        learning_rate=rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        logging_steps=steps,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
        report_to="none",
        eval_num_samples=SAMPLES,
        eval_num_reference_samples=SAMPLES,
        average_weights=0.0,
        **settings,
    )
    data = {"train_dataset": rows(train), "eval_dataset": rows(held_out)}
    return BONDTrainer(str(start), correct, args, processing_class=tokenizer(), **data)


def run(method: str, seed: int, folder: str, *, start: Path, steps: int, rate: float) -> dict[str, Any]:
    """Train, then measure; "start" measures the model before training."""
    facts = {"method": method, "seed": seed, "learning_rate": rate}
    if method == "start":
        return (
            pass_at_each(trainer_of("jbond eta=0.1", seed, start, folder), "reference") | {"kl": 0.0, "step": 0} | facts
        )
    trainer = trainer_of(method, seed, start, folder, steps, rate)
    trainer.train()
    evaluated = trainer.evaluate()
    measured = {"kl": evaluated["eval_kl"], "win_rate": evaluated["eval_win_rate"], "step": steps}
    return pass_at_each(trainer, "policy") | measured | facts


def pass_at_each(trainer: BONDTrainer, role: Literal["policy", "reference"]) -> dict[str, float]:
    """pass@1, @4 and @16 on held-out sums."""
    found = trainer.sample(list(trainer.eval_dataset), role, SAMPLES)
    return {f"pass@{k}": pass_at(found.rewards_PM, k) for k in (1, 4, 16)}


def table() -> None:
    """Print means over seeds, with the spread between them."""
    found = [json.loads(line) for line in OUT.read_text().splitlines()]
    print(
        "| method | steps | learning rate | seeds | pass@1 | pass@4 | pass@16 | KL |\n|---|---|---|---|---|---|---|---|"
    )
    for step, rate in sorted({(row["step"], rate_of(row)) for row in found}):
        for method in ["start", *METHODS]:
            own = [row for row in found if (row["method"], row["step"], rate_of(row)) == (method, step, rate)]
            if own:
                cells = [spread([row[key] for row in own]) for key in ("pass@1", "pass@4", "pass@16", "kl")]
                print(f"| {method} | {step} | {rate:g} | {len(own)} | " + " | ".join(cells) + " |")


def rate_of(row: dict[str, Any]) -> float:
    """The learning rate of a row; rows without one used 2e-4."""
    return float(row.get("learning_rate", 2e-4))


def spread(values: Sequence[float]) -> str:
    """Mean, and the range over seeds."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--only", nargs="*", default=list(METHODS), help='methods, or "start": no training')
    parser.add_argument("--start", type=Path, default=Path("runs/verifiable/start"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        table()
        return
    torch.set_num_threads(1)
    if not (options.start / "config.json").exists():
        start_model().save_pretrained(options.start)
    lines = OUT.read_text().splitlines() if OUT.exists() else []
    length = options.steps, options.learning_rate
    done = {(row["method"], row["seed"]) for row in map(json.loads, lines) if (row["step"], rate_of(row)) == length}
    how = {"start": options.start, "steps": options.steps, "rate": options.learning_rate}
    run_missing(str(OUT), options.only, options.seeds, done, partial(run, **how))


if __name__ == "__main__":
    main()
