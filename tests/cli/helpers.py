"""A tiny model, prompts and a reward on disk, as a user of the command line has them."""

import json
from pathlib import Path

import yaml
from tiny import prompt_rows, tiny_causal, tiny_t5, tiny_tokenizer

REWARD = """
def letters(prompts, completions, **columns):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [text.count("e") + 0.01 * len(text) for text in texts]

def broken(prompts, completions, **columns):
    return [float("nan")] * len(completions)

def short(prompts, completions, **columns):
    return [1.0]

def raising(prompts, completions, **columns):
    raise KeyError("no such answer")

def bomb(prompts, completions, **columns):
    import os, signal
    bomb.calls += 1
    if bomb.calls == 5 and not os.path.exists(__file__ + ".sent"):
        open(__file__ + ".sent", "w").close()
        os.kill(os.getpid(), signal.SIGTERM)
    return letters(prompts, completions)
bomb.calls = 0

def saver(prompts, completions, **columns):
    saver.calls += 1
    if saver.calls == 2:
        import os, signal
        os.kill(os.getpid(), signal.SIGUSR1)
    return letters(prompts, completions)
saver.calls = 0
"""


def write_job(folder: Path, *, kind: str = "causal", **options: object) -> Path:
    """Write model, data, reward and config under `folder`; returns the config's path."""
    tokenizer = tiny_tokenizer(chat=kind == "causal")
    model = tiny_causal(tokenizer) if kind == "causal" else tiny_t5(tokenizer)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, rows in (
        ("train", prompt_rows(16, chat=kind == "causal")),
        ("heldout", prompt_rows(6, chat=kind == "causal")),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    config = {
        "model": str(folder / "model"),
        "reward_funcs": f"{folder / 'reward.py'}:letters",
        "train_dataset": str(folder / "train.jsonl"),
        "eval_dataset": str(folder / "heldout.jsonl"),
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "eval_num_samples": 2,
        "eval_num_reference_samples": 8,
    }
    config |= {"use_peft": True, "lora_r": 4} if kind == "causal" else {}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config | options))
    return path


def with_other(arguments: list[str], name: str, *values: str) -> list[str]:
    """The command line with other values of an option that takes several, and may not be given twice."""
    if name not in arguments:
        return [*arguments, name, *values]
    place = arguments.index(name)
    return [*arguments[:place], name, *values, *arguments[place + 2 :]]
