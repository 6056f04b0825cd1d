"""How cost grows with rows, length and vocabulary: tokens per second and memory, beside transformers' `generate`.

    python benchmarks/growth.py                                   # a Llama of 4 layers with random weights, minutes
    python benchmarks/growth.py --hidden 2048 --layers 16 --dtype bfloat16 --rows 64 256     # with a GPU

Each point runs in two fresh processes, one for bondlm (draw, score, learn) and one for `generate`, so that their memory
peaks are separate. All completions have full length. The memory is what the work took beyond the loaded model.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from facts import add_out, append
from roofline import DEVICE, draw, engine_of, timed

ROWS, PROMPT, NEW, VOCABULARY = 16, 64, 64, 32_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[4, 16, 64])
    parser.add_argument("--lengths", nargs="*", default=["512+128", "4096+1024"], help="tokens, as prompt+completion")
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[128_000, 256_000])
    parser.add_argument("--long-rows", type=int, default=4, help="number of rows where the length varies")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    add_out(parser, "growth")
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(measure(args, **json.loads(args.one))))
        return
    print(f"{'':33}{'tokens a second':^36}   {'GiB beyond the model':^26}")
    phases = " ".join(f"{name:>8}" for name in ("draw", "generate", "score", "learn"))
    print(f"{'rows':>5} {'prompt+new':>12} {'vocabulary':>11}   {phases}   {'draw':>8} {'generate':>8} {'all':>8}")
    for varied, point in points(args):
        ours, theirs = (in_a_process(point | {"ours": is_ours}) for is_ours in (True, False))
        row = ours | {"generate": theirs["draw"], "generate_gib": theirs["gib"]}
        speeds = " ".join(f"{row[name]:8.0f}" for name in ("draw", "generate", "score", "learn"))
        lengths = f"{point['prompt']}+{point['new']}"
        print(
            f"{point['rows']:5} {lengths:>12} {point['vocabulary']:11,}   {speeds}   {row['draw_gib']:8.2f} "
            f"{row['generate_gib']:8.2f} {row['gib']:8.2f}",
            flush=True,
        )
        model = {name: getattr(args, name) for name in ("hidden", "layers", "threads", "dtype")}
        append(args.out, {"varied": varied, **point, **model, **row})


def points(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, int]]]:
    """(what is varied, sizes of the point)."""
    usual = {"rows": ROWS, "prompt": PROMPT, "new": NEW, "vocabulary": VOCABULARY}
    for rows in args.rows:
        yield "rows", usual | {"rows": rows}
    for length in args.lengths:
        prompt, new = map(int, length.split("+"))
        yield "length", usual | {"rows": args.long_rows, "prompt": prompt, "new": new}
    for vocabulary in args.vocabularies:
        yield "vocabulary", usual | {"vocabulary": vocabulary}


def in_a_process(point: dict[str, int | bool]) -> dict[str, float]:
    """Measure one point in a fresh process."""
    command = [sys.executable, *sys.argv, "--one", json.dumps(point)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(done.stdout + done.stderr)
    return json.loads(lines[0][7:])


def measure(args: argparse.Namespace, *, rows: int, prompt: int, new: int, vocabulary: int, ours: bool) -> dict:
    """Tokens per second of each phase, and GiB beyond the loaded model."""
    from bondlm.models.head import exact_head
    from bondlm.models.logprobs import collate, row_logprobs, sequence_logprobs

    torch.set_num_threads(args.threads)
    model = llama(args, vocabulary, longest=prompt + new)
    seeded = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, vocabulary, (rows, prompt), generator=seeded)
    before = held_gib()
    if not ours:
        every = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": True, "pad_token_id": 0}
        ids = prompts.to(DEVICE)
        seconds = best(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **every))
        return {"draw": rows * new / seconds, "gib": peak_gib() - before}
    engine = engine_of(model)
    drawn = best(lambda: draw(engine, prompts.tolist(), new))
    drawing = peak_gib() - before
    pairs = [(p, c.ids) for p, (c,) in zip(prompts.tolist(), draw(engine, prompts.tolist(), new), strict=True)]
    scored = best(lambda: row_logprobs(model, pairs, 0, start_id=None, device=DEVICE))
    one = {name: tensor.to(DEVICE) for name, tensor in collate([(pairs[0][0], [pairs[0][1]])], 0).items()}
    head = exact_head(model, DEVICE)
    model.train()
    learned = best(lambda: sequence_logprobs(model, one, head=head).sum().backward())
    tokens = prompt + new
    speeds = {"draw": rows * new / drawn, "score": rows * tokens / scored, "learn": tokens / learned}
    return speeds | {"draw_gib": drawing, "gib": peak_gib() - before}


def llama(args: argparse.Namespace, vocabulary: int, *, longest: int):
    """A model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        max_position_embeddings=longest + 1,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    usual = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))  # a conversion would hold the model twice
    with DEVICE:  # a billion random numbers: slow on a CPU
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(usual)
    return model.eval()


def best(work: Callable[[], object]) -> float:
    """Seconds of the faster of two runs."""
    return min(timed(work) for _ in range(2))


def held_gib() -> float:
    """Memory of this process now, or of its part of a GPU; `peak_gib` counts from here on."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is what is held now
    return _status_gib("VmRSS")


def peak_gib() -> float:
    """Peak memory since `held_gib`."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return _status_gib("VmHWM")


def _status_gib(name: str) -> float:
    """A number of the kernel about this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**20


if __name__ == "__main__":
    main()
