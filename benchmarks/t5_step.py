"""A J-BOND step of a T5 on a GPU, with and without recording its decoding step as a CUDA graph.

    python benchmarks/t5_step.py                                        # on a GPU: the size of flan-t5-small
    python benchmarks/t5_step.py --width 64 --layers 2 --prompts 2      # on a CPU both are the same

A step draws three completions for each of 64 prompts, 192 in all, of 20 tokens without an early end, and learns from
128 of them. The figure is the median after one warm-up step.
"""

import argparse
import json

from facts import add_out, append
from peers import SAMPLES, prompts, word_tokenizer
from step import in_a_process, measure

VOCABULARY = 32128
WAYS = {"recorded": True, "plain": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=20, help="tokens per completion")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    add_out(parser, "t5_step")
    args = parser.parse_args()
    if args.one:
        trainer = build(args)
        result = measure(trainer, args.threads, args.prompts * SAMPLES)
        print("RESULT " + json.dumps(result | {"recorded": trainer.engine._graphs.wanted and trainer.args.n_gpu > 0}))
        return
    setting = {name: getattr(args, name) for name in ("prompts", "tokens", "width", "layers", "steps", "threads")}
    results = {}
    for name in WAYS:
        results[name] = in_a_process(name)
        append(args.out, setting | {"results": {name: results[name]}})  # one by one: the machine may be taken away
    if not results["recorded"]["recorded"]:
        print("no graph was recorded: without a GPU, or refused by the engine (its warning says why)", flush=True)
    ratios = {key: results["recorded"][key] / results["plain"][key] for key in ("wall", "generate")}
    print("recorded / plain: " + "  ".join(f"{key} {value:.2f}" for key, value in ratios.items()), flush=True)


def build(args: argparse.Namespace):
    """The trainer of a T5 with random weights."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from bondlm import BONDConfig, BONDTrainer

    heads = max(1, 6 * args.width // 512)  # flan-t5-small has 6 of 64
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            **{"vocab_size": VOCABULARY, "d_model": args.width, "d_kv": 64, "d_ff": 2 * args.width, "num_heads": heads},
            **{"num_layers": args.layers, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
            **{"pad_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": VOCABULARY - 1},
        )
    )
    model.lm_head.weight.data.mul_(0.05)  # near uniform, so that a completion seldom ends

    def even(completion_ids: list[list[int]], **columns: object) -> list[float]:
        return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]

    config = BONDConfig(
        output_dir="runs/t5_step",
        max_steps=args.steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        per_device_train_batch_size=args.prompts,
        max_completion_length=args.tokens,
        cuda_graphs=WAYS[args.one],
        bf16=on_gpu,
        use_cpu=not on_gpu,
        disable_tqdm=True,
    )
    return BONDTrainer(
        model, even, config, train_dataset=prompts(VOCABULARY), processing_class=word_tokenizer(VOCABULARY)
    )


if __name__ == "__main__":
    main()
