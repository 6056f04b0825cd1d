"""What the mathematics costs: objectives against a model's step, quantiles and order statistics on large batches.

    OMP_NUM_THREADS=1 python benchmarks/objectives.py [--prompts 16] [--prompt-tokens 32] [--tokens 32]

1. For every objective: select + returns + baseline + loss + backward to the log-probabilities on a batch of prompts,
   as a share of a forward and backward pass of a Llama with about 10 million parameters over the completions that the
   objective learns from (timed with one completion per prompt, times the completions learned from). Sampling and
   scoring cost more still and are left out, so the shares are upper bounds.
2. Quantiles and order statistics for 10,000 prompts x 256 samples: seconds and peak additional memory.
"""

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bondlm import bestofn
from bondlm.objectives import BOND, GRPO, JBOND, RLOO, VBON, BestOfNRegression, BestOfNSFT, BoNBoN, Listwise, Reinforce

OBJECTIVES: dict[str, Any] = {
    "jbond": JBOND(),
    "bond (n=8, k=16)": BOND(n=8),
    "bond (correction)": BOND(n=8, correction=True, log_quantile="harmonic"),
    "best_of_n_sft (n=8)": BestOfNSFT(n=8),
    "reinforce": Reinforce(beta_rl=0.1),
    "rloo": RLOO(beta_rl=0.1),
    "grpo": GRPO(beta_rl=0.1),
    "vbon (n=8, M=16)": VBON(n=8, num_anchor_samples=16),
    "bonbon (n=8)": BoNBoN(n=8),
    "regression (M=16)": BestOfNRegression(n=8, num_samples=16),
    "listwise (K=8)": Listwise(n=8, num_samples=8),
}
NUM_PROMPTS, NUM_SAMPLES = 10_000, 256


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Best time of a call after one warm-up call: other work on the machine only adds to it."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def make_model() -> Any:
    """A random Llama of about 10 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=12288,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def model_step(model: Any, num_rows: int, prompt_tokens: int, tokens: int) -> None:
    """Forward and backward pass of the completions' log-probabilities; the head runs on the completions only."""
    ids = torch.randint(0, model.config.vocab_size, (num_rows, prompt_tokens + tokens))
    logits = model(input_ids=ids, logits_to_keep=tokens + 1, use_cache=False).logits[:, :-1]
    logits.log_softmax(-1).gather(2, ids[:, -tokens:, None]).sum().backward()
    model.zero_grad(set_to_none=True)


def objective_step(objective: Any, num_prompts: int) -> Callable[[], object]:
    """Everything the objective computes in a step of that many prompts."""
    plan, generator = objective.plan, torch.Generator().manual_seed(0)
    rewards, noise = (torch.rand(num_prompts, plan.total, generator=generator).double() for _ in range(2))
    logp = torch.randn(num_prompts, plan.learn, generator=generator, requires_grad=True)
    anchor_logp = torch.randn(num_prompts, plan.compare, generator=generator)

    def step() -> None:
        signal = objective.select(rewards, noise).signal_PC.float()
        baseline = objective.baseline(objective.returns(signal, logp[:, : plan.compare].detach(), anchor_logp))
        objective.loss(logp, anchor_logp, signal, baseline).loss_P.sum().backward()

    return step


def print_objectives(num_prompts: int, prompt_tokens: int, tokens: int) -> None:
    model = make_model()
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    one_s = seconds(lambda: model_step(model, num_prompts, prompt_tokens, tokens), 3)
    print(f"Llama, {size:.1f} M parameters; {num_prompts} prompts of {prompt_tokens} tokens, completions of {tokens}")
    print(f"{'objective':22} {'samples':>8} {'learned':>8} {'model ms':>10} {'loss ms':>9} {'share':>8}")
    for name, objective in OBJECTIVES.items():
        plan = objective.plan
        loss_s = seconds(objective_step(objective, num_prompts), 50)
        model_s = one_s * plan.learn
        columns = f"{plan.total:8} {plan.learn:8} {1e3 * model_s:10.0f} {1e3 * loss_s:9.3f} {loss_s / model_s:8.3%}"
        print(f"{name:22} {columns}", flush=True)


STATISTICS: dict[str, Callable[[Any], object]] = {
    "quantile": lambda r: bestofn.quantile(r, r),
    "log_quantile, clamped": lambda r: bestofn.log_quantile(r, r, "clamped"),
    "log_quantile, harmonic": lambda r: bestofn.log_quantile(r, r, "harmonic"),
    "log_quantile, harmonic, others": lambda r: bestofn.log_quantile(r, None, "harmonic"),
    "log_collision_correction": lambda r: bestofn.log_collision_correction(r, r, 16),
    "expected_best_of_n": lambda r: bestofn.expected_best_of_n(r, 16),
    "best_of_n_probs": lambda r: bestofn.best_of_n_probs(torch.full_like(r, 1 / r.shape[1]), r, 16),
}


def peak_mib(function: Callable[[], object]) -> float:
    """Peak resident memory during a call beyond that before it, sampled every half millisecond."""
    statm, done, seen = Path("/proc/self/statm"), threading.Event(), []

    def watch() -> None:
        while not done.wait(0.0005):
            seen.append(int(statm.read_text().split()[1]))

    before, watcher = int(statm.read_text().split()[1]), threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return (max(seen) - before) * 4096 / 2**20


def print_statistic(name: str) -> None:
    """Measure one statistic in a fresh process, so that no leftover memory counts."""
    rewards = torch.rand(NUM_PROMPTS, NUM_SAMPLES, dtype=torch.float64)
    STATISTICS[name](rewards[:8])
    peak = peak_mib(lambda: STATISTICS[name](rewards))
    print(f"{name:32} {seconds(lambda: STATISTICS[name](rewards), 3):8.3f} {peak:12.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--statistic", choices=list(STATISTICS), help="measure only this one, in this process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.statistic:
        print_statistic(options.statistic)
        return
    print_objectives(options.prompts, options.prompt_tokens, options.tokens)
    rewards_mib = NUM_PROMPTS * NUM_SAMPLES * 8 / 2**20
    cube_mib = NUM_PROMPTS * NUM_SAMPLES**2 / 2**20
    print(
        f"\n{NUM_PROMPTS} prompts x {NUM_SAMPLES} samples, one thread ({rewards_mib:.0f} MiB of rewards; P x M x M, one"
    )
    print(f"byte each, would be {cube_mib:.0f} MiB)\n{'statistic':32} {'seconds':>8} {'peak MiB':>12}", flush=True)
    for name in STATISTICS:
        subprocess.run([sys.executable, __file__, "--statistic", name], check=True)


if __name__ == "__main__":
    main()
