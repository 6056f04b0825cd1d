"""Train a tiny model and save what came out: `torchrun --nproc_per_node 2 run_tiny.py OUT JSON`."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_trainer import ends_often, lora, low_ids
from tiny import prompt_rows, tiny_causal, tiny_t5, tiny_tokenizer

from bondlm import BONDConfig, BONDTrainer


def main(out: Path, job: dict) -> None:
    torch.set_num_threads(1)
    tokenizer = tiny_tokenizer()
    model = ends_often(tiny_t5(tokenizer) if job.pop("kind") == "t5" else tiny_causal(tokenizer))
    adapter, rows, fail = job.pop("lora", False), job.pop("rows", 12), job.pop("fail_on_rank", None)
    settings = {
        "max_steps": 3,
        "max_completion_length": 5,
        "learning_rate": 1e-3,
        "eta": 0.3,
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "eval_num_samples": 2,
        "eval_num_reference_samples": 4,
        "optim": "sgd",
        "gamma": 0.5,
    }
    args = BONDConfig(output_dir=str(out), **settings | job)

    def reward(prompts, completions, completion_ids, **columns):
        if fail is not None and args.process_index == fail:
            raise ValueError("one rank's reward is down")
        return low_ids(completion_ids)

    trainer = BONDTrainer(
        model,
        reward,
        args,
        train_dataset=prompt_rows(rows),
        eval_dataset=prompt_rows(rows + 5)[rows:],
        processing_class=tokenizer,
        peft_config=lora() if adapter else None,
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        policy = {n: p.detach().clone() for n, p in trainer.roles.model.named_parameters()}
        save_file(policy, out / "policy.safetensors")
        save_file({n: t.clone() for n, t in trainer.anchor.state_dict().items()}, out / "anchor.safetensors")
        (out / "eval_metrics.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
