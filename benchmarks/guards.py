"""What the guards of a step cost (checks for finite numbers, flags, hashes), and how long a LoRA checkpoint takes.

    python benchmarks/guards.py
    python benchmarks/guards.py --sharded     # how much of the anchor each of two processes holds under FSDP2

A Llama of 10 M parameters on CPU, one thread, trained with J-BOND: 8 prompts, up to 32 tokens. Every guard of a step is
timed by itself, inside a real run, and compared with the step around it. What is done once per run or once per save is
listed separately.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from accelerate import DistributedType, PartialState
from peft import LoraConfig
from tiny import prompt_rows, tiny_causal, tiny_tokenizer

from bondlm import BONDConfig, BONDTrainer
from bondlm import trainer as trainer_module
from bondlm.models.sharding import local
from bondlm.runs import manifest
from bondlm.training import callbacks
from bondlm.training import micro_batches as memory

SPENT: dict[str, list[float]] = defaultdict(list)


def timed(owner, name: str, label: str | None = None) -> None:
    """Replace `owner.name` by a timed version of itself."""
    plain = getattr(owner, name)

    def wrapped(*args, **kwargs):
        began = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            SPENT[label or name].append(time.perf_counter() - began)

    setattr(owner, name, wrapped)


def build(folder: str, *, lora: bool, steps: int, **more):
    tokenizer = tiny_tokenizer()
    model = tiny_causal(tokenizer, layers=12, hidden=288)
    args = BONDConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        max_completion_length=32,
        learning_rate=1e-5,
        logging_steps=1,
        save_steps=steps // 2,
        disable_tqdm=True,
        use_cpu=True,
        **more,
    )
    if "fsdp" in more:  # accelerate allows FSDP2 on accelerators only; PyTorch's works on CPUs too
        PartialState().distributed_type = DistributedType.MULTI_GPU

    def reward(completion_ids):
        return [float(sum(ids)) for ids in completion_ids]

    peft = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    rows = prompt_rows(64)
    return BONDTrainer(model, reward, args, train_dataset=rows, processing_class=tokenizer, peft_config=peft)


def learn_alone(self, model, batch, step, args):
    """`SmallerBatches.learn`, timed without the forward and backward passes it calls."""
    inside = []

    def watched(part, is_last):
        began = time.perf_counter()
        loss = step(part, is_last)
        inside.append(time.perf_counter() - began)
        return loss

    began = time.perf_counter()
    loss = LEARN(self, model, batch, watched, args)
    SPENT["smaller batches (S6)"].append(time.perf_counter() - began - sum(inside))
    return loss


LEARN = memory.SmallerBatches.learn


def sharded(folder: str) -> None:
    """One of two processes: memory behind its shards of the anchor, which a view into a whole tensor would inflate."""
    config = {"version": 2, "state_dict_type": "FULL_STATE_DICT"}
    made = build(folder, lora=False, steps=2, fsdp="full_shard", fsdp_config=config)
    made.train()
    storages = [local(weights).untyped_storage() for weights in made.anchor.weights]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    held, whole = sum(sizes.values()) / 2**20, made.anchor.num_bytes / 2**20
    print(f"process {made.args.process_index} holds {held:.1f} MiB of an anchor of {whole:.1f} MiB", flush=True)
    torch.distributed.destroy_process_group()


def launch() -> None:
    """Run `sharded` in two processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__, "--in", folder]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sharded", action="store_true", help="only the memory of two processes under FSDP2")
    parser.add_argument("--in", dest="folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if args.folder or args.sharded:
        sharded(args.folder) if args.folder else launch()
        return
    memory.SmallerBatches.learn = learn_alone
    timed(callbacks, "_finite_on_all_ranks", "finite gradients (N1, N2)")
    timed(trainer_module, "logprob_gap", "sampler against learner (N7)")
    timed(trainer_module.StopCallback, "on_step_end", "flags of signals (S1)")
    timed(callbacks.RunFolderCallback, "on_step_end", "the folder is there (D4)")
    timed(callbacks.RunFolderCallback, "on_log", "metrics and samples written (D2)")
    timed(trainer_module, "count_prompts", "ranks agree (M2)")
    timed(callbacks, "data_digest", "once: hash of the data (T11)")
    timed(callbacks, "seal", "save: hashes and fsync (D1)")
    for lora in (False, True):
        SPENT.clear()
        saves: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            made = build(folder, lora=lora, steps=args.steps)
            plain = made._save_checkpoint

            def save(*a, plain=plain, saves=saves):
                began = time.perf_counter()
                plain(*a)
                saves.append(time.perf_counter() - began)

            made._save_checkpoint = save
            on_save = made._anchor_callback.on_save

            def complete(*a, on_save=on_save, saves=saves, **k):
                began = time.perf_counter()
                on_save(*a, **k)
                saves[-1] += time.perf_counter() - began

            made._anchor_callback.on_save = complete
            made.train()
            newest = max(Path(folder).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
            size = sum(path.stat().st_size for path in newest.iterdir())
            began = time.perf_counter()
            assert manifest.fault(newest) is None
            verify = time.perf_counter() - began
            steps = [row["step_time"] for row in made.state.log_history if "loss" in row][1:]
        step = statistics.median(steps)
        total = made.roles.core.num_parameters()
        trained = sum(p.numel() for p in made.roles.model.parameters() if p.requires_grad)
        kind = "LoRA" if lora else "full"
        print(f"{kind}: {total / 1e6:.1f} M parameters, {trained / 1e6:.2f} M trained, step {step:.3f} s")
        guards = 0.0
        for name, seconds in SPENT.items():
            if name.startswith(("once", "save")):
                print(f"  {name:36} {1e3 * statistics.median(seconds):9.2f} ms")
                continue
            each = sum(seconds) / args.steps
            guards += each
            print(f"  {name:36} {1e3 * each:9.3f} ms a step  {each / step:7.3%}")
        print(f"  guards together                      {1e3 * guards:9.3f} ms a step  {guards / step:7.3%}")
        written = statistics.median(saves)
        print(
            f"  checkpoint of {size / 2**20:.1f} MiB written and sealed in {written:.2f} s, verified in {verify:.2f} s"
        )
        print(json.dumps({"lora": lora, "step": step, "guards": guards / step, "save": written}))


if __name__ == "__main__":
    main()
