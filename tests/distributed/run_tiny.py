"""Train a tiny model and save what came out: `torchrun --nproc_per_node 2 run_tiny.py OUT JSON`."""

import errno
import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import prompt_rows, tiny_causal, tiny_t5, tiny_tokenizer
from trainer.helpers import ends_often, lora, low_ids

from bondlm import BONDConfig, BONDTrainer
from bondlm.models.sharding import gather_to_main, local, named_weights
from bondlm.training import callbacks


class SpoilBackward(TrainerCallback):
    """After so many steps: a gradient that is not finite, in the backward pass of an accumulation window's first part.

    For DeepSpeed, which has stepped when the pass is over.
    """

    def __init__(self, after: int) -> None:
        self.after, self.hooks = after, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.after:
            weights = next(p for p in model.parameters() if p.requires_grad)
            self.hooks.append(weights.register_hook(lambda gradient: gradient * float("nan")))

    def on_substep_end(self, args, state, control, **kwargs):
        while self.hooks:
            self.hooks.pop().remove()

    on_pre_optimizer_step = on_substep_end


class Disturb(TrainerCallback):
    """After so many steps: a gradient that is not finite, or a weight that is not the other rank's."""

    def __init__(self, after: int, *, gradient: bool) -> None:
        self.after, self.gradient = after, gradient

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradient and state.global_step == self.after:
            next(p for p in model.parameters() if p.grad is not None).grad[0] = float("nan")

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if not self.gradient and state.global_step == self.after:
            with torch.no_grad():
                next(model.parameters()).view(-1)[5] += 1e-6


class Stop(TrainerCallback):
    """A user's callback that ends the run after so many steps, on one process alone."""

    def __init__(self, after: int, event: str) -> None:
        self.after = after
        setattr(self, event, self.stop)

    def stop(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.after


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def write_weights(trainer: BONDTrainer, out: Path, metrics: dict[str, float]) -> None:
    """The main process writes, all gather; each says how much of the anchor it holds."""
    rank, is_main = trainer.args.process_index, trainer.is_world_process_zero()
    part = sum(local(weights).numel() for weights in trainer.anchor.weights)
    (out / f"anchor_part_{rank}.json").write_text(str(part))
    policy = gather_to_main(named_weights(trainer.roles.model), is_main=is_main)
    anchor = trainer.anchor.state_dict(is_main=is_main)
    if is_main:
        save_file({n: p.clone() for n, p in policy.items()}, out / "policy.safetensors")
        save_file({n: t.clone() for n, t in anchor.items()}, out / "anchor.safetensors")
        (out / "eval_metrics.json").write_text(json.dumps(metrics))


def small(job: dict) -> dict:
    """The settings of a run of three small steps, where the job names no others."""
    return {
        "max_steps": 3,
        "max_completion_length": 5,
        "learning_rate": 1e-3,
        **({"eta": 0.3} if job.get("anchor", "ema") == "ema" else {}),
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        # accelerate takes DeepSpeed only where it was not told to use the CPU, and then wants to know the backend.
        **({"ddp_backend": "gloo"} if "ACCELERATE_USE_DEEPSPEED" in os.environ else {"use_cpu": True}),
        "eval_num_samples": 2,
        "eval_num_reference_samples": 4,
        "optim": "sgd",
        **({"gamma": 0.5} if job.get("objective", "jbond") in ("jbond", "bond") else {}),
    }


def main(out: Path, job: dict) -> None:  # noqa: C901 - one script, one switch a fault
    torch.set_num_threads(1)
    tokenizer = tiny_tokenizer()
    folder, kind = job.pop("model", None), job.pop("kind", "causal")
    made = AutoModelForCausalLM.from_pretrained(folder) if folder else None
    model = ends_often(made or (tiny_t5(tokenizer) if kind == "t5" else tiny_causal(tokenizer)))
    resume = job.pop("resume", False)
    desync, desync_after = job.pop("desync", None), job.pop("desync_after", 0)
    nan_rank, nan_step, kill_rank = job.pop("nan_rank", None), job.pop("nan_step", None), job.pop("kill_rank", None)
    if job.pop("save_base", False):  # an adapter folder names the model that it belongs to
        model.save_pretrained(out / "base")
        model.name_or_path = model.config._name_or_path = str(out / "base")
    adapter, rows, held_out = job.pop("lora", False), job.pop("rows", 12), job.pop("held_out", 5)
    fail, asked = job.pop("fail_on_rank", None), list[str]()
    if job.pop("disk_is_full", False):
        callbacks.save_tensors = full  # of the anchor, which the main process writes
    stop_rank, stop = job.pop("stop_rank", None), job.pop("stop", ())
    dropped = prompt_rows(1)[0]["prompt"] if job.pop("drops_first", False) else None
    settings = small(job)
    sharded = job.pop("sharded", False)
    if sharded:
        settings["fsdp"] = "full_shard"
        settings["fsdp_config"] = {"version": 2, "state_dict_type": job.pop("state_dict_type", "FULL_STATE_DICT")}
    args = BONDConfig(output_dir=str(out), **settings | job)
    if sharded:  # accelerate 1.15 offers FSDP2 on accelerators alone; PyTorch's own works on CPUs as well
        PartialState().distributed_type = DistributedType.MULTI_GPU

    if desync == "settings" and args.process_index == 1:
        args.gamma = 0.25
    skip = int(desync == "rows" and args.process_index == 1)

    def reward(prompts, completions, completion_ids, log_metric, **columns):
        if fail is not None and args.process_index == fail:
            raise ValueError("one rank's reward is down")
        if kill_rank is not None and args.process_index == kill_rank:
            os.kill(os.getpid(), signal.SIGKILL)
        asked.extend(prompts)
        log_metric("characters", sum(map(len, set(prompts))) / len(set(prompts)))
        return [None if p == dropped else r for p, r in zip(prompts, low_ids(completion_ids), strict=True)]

    trainer = BONDTrainer(
        model,
        reward,
        args,
        train_dataset=prompt_rows(rows + skip)[skip:],
        eval_dataset=prompt_rows(rows + held_out)[rows:],
        processing_class=tokenizer,
        peft_config=lora() if adapter else None,
    )
    if desync == "weights" and args.process_index == 1:
        trainer.add_callback(Disturb(desync_after, gradient=False))
    if nan_rank is not None and args.process_index == nan_rank:
        disturb = SpoilBackward(nan_step - 1) if args.deepspeed_plugin else Disturb(nan_step - 1, gradient=True)
        trainer.callback_handler.callbacks.insert(0, disturb)
    if args.process_index == stop_rank:
        trainer.add_callback(Stop(*stop))
    trainer.train(resume_from_checkpoint=resume)
    asked.clear()
    metrics = trainer.evaluate()
    (out / f"asked_{args.process_index}.json").write_text(json.dumps(sorted(set(asked))))
    trainer.save_model()
    write_weights(trainer, out, metrics)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # as the command does: threads of the group would abort the interpreter's own exit now and then


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
