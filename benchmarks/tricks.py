"""What each trick of sampling and learning saves: seconds without and with it, the best of `--repeats` runs.

    python benchmarks/tricks.py --model runs/peers/6m --threads 1
    python benchmarks/tricks.py --model models/smollm2-135m-instruct --threads 1 --prompts 8
    python benchmarks/tricks.py --model runs/peers/500m --dtype bfloat16      # with a GPU

CPU seconds, which other work on the machine hardly changes; wall clock on a GPU, if there is one. The samples and
log-probabilities are the same either way (tests/engines, tests/models/test_logprobs.py). benchmarks/peers.py makes
`runs/peers/...`. docs/speed.md lists the tricks that were dropped because they saved nothing.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from facts import add_out, append
from peft import LoraConfig
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from bondlm.engines.local.engine import TransformersEngine
from bondlm.models.adapters import wrap_adapter
from bondlm.models.head import exact_head
from bondlm.models.logprobs import collate, row_logprobs, sequence_logprobs
from bondlm.models.roles import Roles

LENGTHS, NEW, SAMPLES, SHARED = (16, 96), 64, 3, 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", default="", help="only tricks whose name contains this")
    add_out(parser, "tricks")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    work = Work(AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval().to(DEVICE), args.prompts)
    rows = {}
    for name, (with_it, without) in work.tricks().items():
        if args.only not in name:
            continue
        try:
            seconds = [seconds_of(run, args.repeats) for run in (without, with_it)]
        except Exception as error:  # noqa: BLE001  transformers' batching needs kernels that not every machine has
            print(f"{name:56} not measured: {type(error).__name__}: {error}", flush=True)
            continue
        rows[name] = {"without": seconds[0], "with": seconds[1], "ratio": seconds[1] / seconds[0]}
        print(f"{name:56} {seconds[0]:7.2f} -> {seconds[1]:7.2f} s  x {seconds[1] / seconds[0]:.2f}", flush=True)
    setting = {name: getattr(args, name) for name in ("model", "threads", "prompts", "dtype")}
    append(args.out, {**setting, "tricks": rows})


def seconds_of(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of `repeats` runs."""
    taken = []
    for _ in range(repeats):
        began = now()
        run()
        taken.append(now() - began)
    return min(taken)


def now() -> float:
    """CPU seconds, since the machine may be busy; on a GPU the wall clock once everything launched has run."""
    if DEVICE.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Work:
    """The same work of a step, with and without each trick."""

    def __init__(self, model: Any, num_prompts: int) -> None:
        self.model = model
        self.roles: Roles | None = None
        generator = torch.Generator().manual_seed(0)

        def ids(length: int) -> list[int]:
            return torch.randint(3, model.config.vocab_size, (length,), generator=generator).tolist()

        lengths = torch.randint(*LENGTHS, (num_prompts,), generator=generator).tolist()
        self.prompts = [ids(length) for length in lengths]
        head = ids(SHARED)
        self.alike = [head + prompt for prompt in self.prompts]
        # Many ids end a completion, so that lengths vary whatever the model samples.
        self.eos_ids = list(range(1, model.config.vocab_size, 24))
        drawn = self.draw(self.prompts, 2)
        self.groups = [(p, [c.ids for c in cs]) for p, cs in zip(self.prompts, drawn, strict=True)]
        self.apart = [(p, [c]) for p, cs in self.groups for c in cs]
        self.rows = [(p, cs[0]) for p, cs in self.groups]
        self.alike_rows = [(p, c) for p, (_, c) in zip(self.alike, self.rows, strict=True)]
        self.head = exact_head(model, DEVICE)

    def draw(self, prompts: list[list[int]], num_samples: int, **settings: Any) -> Any:
        @contextmanager
        def use(role: str) -> Iterator[Any]:
            yield self.model

        engine = TransformersEngine(use, eos_ids=self.eos_ids, pad_id=0, **settings)
        seeds = list(range(len(prompts)))
        return engine.generate(prompts, num_samples, role="policy", max_new_tokens=NEW, seeds=seeds)

    def draw_roles(self, *, together: bool) -> Any:
        """A rollout of J-BOND with LoRA: one sample of the policy, two of the anchor."""
        if self.roles is None:  # a copy, since adapters change the model's layers in place
            lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            self.roles = Roles(wrap_adapter(copy.deepcopy(self.model), lora))
        use_together = self.roles.use_together if together else None
        engine = TransformersEngine(self.roles.use, eos_ids=self.eos_ids, pad_id=0, use_together=use_together)
        seeds = list(range(len(self.prompts)))
        return engine.generate_roles(
            self.prompts, {"policy": (1, seeds), "anchor": (SAMPLES - 1, seeds)}, max_new_tokens=NEW
        )

    def patched(self, target: str, value: Any, run: Callable[[], Any]) -> Callable[[], Any]:
        def patched_run() -> Any:
            with patch(target, value):
                return run()

        return patched_run

    def learn(self, groups: Any, head: Any) -> None:
        micro = {name: tensor.to(DEVICE) for name, tensor in collate(groups, 0).items()}
        sequence_logprobs(self.model, micro, head=head).sum().backward()
        self.model.zero_grad()

    def score(self, rows: Any) -> None:
        row_logprobs(self.model, rows, 0, start_id=None, device=DEVICE)

    @torch.no_grad()
    def continuous(self) -> None:
        """transformers' continuous batching, on the same prompts and number of samples."""
        config = GenerationConfig(
            max_new_tokens=NEW, do_sample=True, top_k=0, eos_token_id=self.eos_ids, pad_token_id=0, use_cache=True
        )
        self.model.generate_batch([p for p in self.prompts for _ in range(SAMPLES)], generation_config=config)

    def tricks(self) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
        """{name: (run with the trick, run without)}."""

        def draw() -> Any:
            return self.draw(self.prompts, SAMPLES)

        def multinomial(logits: Any, uniforms: Any, temperature: float) -> Any:
            probs = logits.float().softmax(-1)
            token = torch.multinomial(probs, 1).squeeze(1)
            return token, probs.gather(1, token.unsqueeze(1)).squeeze(1).log()

        def roles() -> Any:
            return self.draw_roles(together=True)

        on_cpu, module = DEVICE.type == "cpu", "bondlm.engines.local."
        never_compact = (
            (module + "decoding.COMPACT_BELOW_IN_PLACE", -1.0) if on_cpu else (module + "cuda_graph.FEW_ROWS", 10**9)
        )
        repeated = [p for p in self.prompts for _ in range(SAMPLES)]
        table: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "sample: a prompt's prefill is shared by its samples": (draw, lambda: self.draw(repeated, 1)),
            "sample: prompts of similar length are prefilled together": (
                roles,
                self.patched("bondlm.engines.local.decoding.PADDING_WORTH_A_PASS", 10**9, roles),
            ),
            "sample: a step is a CUDA graph": (draw, lambda: self.draw(self.prompts, SAMPLES, cuda_graphs=False)),
            "sample: rows that ended leave the batch": (draw, self.patched(*never_compact, draw)),
            "sample: the cache grows in place": (
                draw,
                self.patched(module + "decoding.growing_cache", lambda c, room: DynamicCache(config=c), draw),
            ),
            "sample: one uniform number a row, not multinomial": (
                draw,
                self.patched("bondlm.engines.local.engine.sample_tokens", multinomial, draw),
            ),
            f"sample: a common beginning of {SHARED} tokens is computed once": (
                lambda: self.draw(self.alike, SAMPLES),
                self.patched(
                    "bondlm.engines.local.decoding.shared_prefix", lambda *a: [], lambda: self.draw(self.alike, SAMPLES)
                ),
            ),
            "sample: policy and anchor, two adapters, in one batch": (
                roles,
                lambda: self.draw_roles(together=False),
            ),
            "sample: instead of transformers' continuous batching": (draw, self.continuous),
            f"score: a common beginning of {SHARED} tokens is computed once": (
                lambda: self.score(self.alike_rows),
                self.patched(
                    "bondlm.models.logprobs.shared_prefix", lambda *a: [], lambda: self.score(self.alike_rows)
                ),
            ),
            "score: rows of similar length together": (
                lambda: self.score(self.rows),
                self.patched(
                    "bondlm.models.logprobs.by_length", lambda g: range(len(g)), lambda: self.score(self.rows)
                ),
            ),
            "learn: two completions share their prompt's row": (
                lambda: self.learn(self.groups, self.head),
                lambda: self.learn(self.apart, self.head),
            ),
            "learn: the head on completion tokens alone": (
                lambda: self.learn(self.groups, self.head),
                lambda: self.learn(self.groups, None),
            ),
        }
        if on_cpu:
            del table["sample: a step is a CUDA graph"]
        else:
            del table["sample: prompts of similar length are prefilled together"]
            del table["sample: the cache grows in place"]  # the other cache also rules out CUDA graphs
        return table


if __name__ == "__main__":
    main()
