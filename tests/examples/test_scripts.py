"""The `BONDTrainer` scripts: they run with tiny models, and say what the YAML file beside them says."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig
from rewards.small_models import bert_encoder, bert_tokenizer, llama_classifier, saved
from tiny import CHATS, PROMPTS, tiny_causal, tiny_t5, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from bondlm import BONDConfig
from bondlm.cli.presets import with_preset

from .helpers import EXAMPLES, load

ROOT = EXAMPLES.parent
MODELS = ROOT / "models"
# What `bondlm train` takes beside the settings of `BONDConfig`.
NOT_SETTINGS = {"model", "reward_funcs", "train_dataset", "eval_dataset", "preset", "use_peft", "lora_r"}


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def write(path: Path, prompts: list[Any]) -> None:
    path.write_text("".join(json.dumps({"prompt": prompt, "reference": "rain"}) + "\n" for prompt in prompts))


def data(folder: Path, prompts: list[Any]) -> list[str]:
    """The option that names a folder with a split of these prompts."""
    folder.mkdir(exist_ok=True)
    write(folder / "train.jsonl", prompts[:8])
    write(folder / "heldout.jsonl", prompts[8:])
    return ["--data", str(folder)]


def encoder(folder: Path) -> list[str]:
    tokenizer = bert_tokenizer()
    return ["--encoder", saved(folder / "encoder", bert_encoder(tokenizer).float(), tokenizer)]


def tiny_options(name: str, folder: Path) -> list[str]:
    """Options of an example with tiny models in place of its own."""
    tokenizer = tiny_tokenizer(chat=name != "summarization/train")
    if name == "summarization/train":
        options = ["--model", saved(folder / "model", tiny_t5(tokenizer), tokenizer)]
        options += data(folder / "data", [f"summarize: {prompt}" for prompt in PROMPTS]) + encoder(folder)
        return [*options, "--nli_model", saved(folder / "nli", tiny_t5(tokenizer, seed=1), tokenizer)]
    options = ["--model", saved(folder / "model", tiny_causal(tokenizer), tokenizer)]
    if name == "dialogue/train":
        classifier = llama_classifier(tokenizer, pad_token_id=0)
        options += data(folder / "data", CHATS) + encoder(folder)
        options += ["--reward_model", saved(folder / "reward", classifier, tokenizer)]
    return options


@pytest.mark.parametrize("name", ["summarization/train", "dialogue/train", "own_reward"])
def test_a_script_runs_with_tiny_models(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    load(name).main([*tiny_options(name, tmp_path), "--output_dir", str(run), "--max_steps", "2"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward" in row] == [1, 2]
    assert rows[-1]["eval_effective_n"] is None or rows[-1]["eval_effective_n"] >= 1
    assert "effective N: " in capsys.readouterr().out
    auto = AutoModelForSeq2SeqLM if name == "summarization/train" else AutoModelForCausalLM
    auto.from_pretrained(run)  # of an adapter: with its base


class Recorder:
    """In place of `BONDTrainer`: keeps what it was made with."""

    seen: dict[str, Any]

    def __init__(self, **arguments: Any) -> None:
        Recorder.seen = arguments

    def train(self) -> None: ...

    def save_model(self) -> None: ...

    def evaluate(self) -> dict[str, float]:
        return {"eval_effective_n": 1.0}


@pytest.mark.parametrize("task", ["summarization", "dialogue"])
def test_a_script_says_what_its_yaml_says(task: str) -> None:
    script = load(f"{task}/train")
    script.BONDTrainer = Recorder
    script.main([])
    seen = Recorder.seen
    recipe = with_preset(yaml.safe_load((EXAMPLES / task / "jbond.yaml").read_text()))
    for name in ("model", "reward_funcs", "train_dataset", "eval_dataset"):
        assert seen[name] == recipe[name], name
    settings = {name: value for name, value in recipe.items() if name not in NOT_SETTINGS}
    assert seen["args"].to_dict() == BONDConfig(**settings).to_dict()
    assert isinstance(seen.get("peft_config"), LoraConfig) == bool(recipe.get("use_peft"))
    if recipe.get("use_peft"):
        adapter = seen["peft_config"]
        assert (adapter.r, adapter.lora_alpha) == (recipe["lora_r"], 2 * recipe["lora_r"])
        assert adapter.target_modules == "all-linear"


def test_the_own_reward_counts_words() -> None:
    own = load("own_reward")
    answers = ["It is a very high hill.", "High.", "", "It is a very high"]
    completions = [[{"role": "assistant", "content": answer}] for answer in answers]
    rewards = own.right_length(completions, num_words=[6, 6, 6, 6], truncated=[False, False, False, True], prompts=[])
    assert rewards == [0, -5, -6, -101]
    training, held_out = own.rows(own.TOPICS), own.rows(own.HELD_OUT_TOPICS)
    assert not {row["prompt"][-1]["content"] for row in training} & {row["prompt"][-1]["content"] for row in held_out}
    assert all(f"exactly {row['num_words']} words" in row["prompt"][-1]["content"] for row in training + held_out)


@pytest.mark.slow
def test_the_own_reward_runs_with_real_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = load(
        "own_reward",
        ('HELD_OUT_TOPICS = ["snow", "a lighthouse", "honey", "a train"]', 'HELD_OUT_TOPICS = ["snow"]'),
        ("max_completion_length=32", "max_completion_length=12, dtype='float32'"),  # bf16 would round the KL
    )
    own.main(["--output_dir", str(tmp_path), "--max_steps", "1"])
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert row["kl"] == pytest.approx(0, abs=1e-3)  # nothing was learned before the first step
    assert row["bond/frac_tied"] < 0.5
    assert "effective N: " in capsys.readouterr().out


@pytest.mark.slow
def test_the_dialogue_runs_with_real_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real policy and embeddings; a classifier in place of the reward model, whose data is in no package of CI."""
    tokenizer = tiny_tokenizer()
    options = [*data(tmp_path / "data", CHATS[:9]), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    options += ["--reward_model", saved(tmp_path / "reward", llama_classifier(tokenizer, pad_token_id=0), tokenizer)]
    shorter = "max_completion_length=8, dtype='float32'"  # where the processor has bf16, that rounds the KL
    load("dialogue/train", ("max_completion_length=32", shorter)).main(options)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["kl"] == pytest.approx(0, abs=1e-3)
    assert "effective N: " in capsys.readouterr().out
