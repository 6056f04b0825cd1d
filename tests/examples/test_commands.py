"""Every `bondlm` command of the examples on rewards that rank, as their pages say it, with tiny models."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from rewards.judge_stub import by_scalar, judging
from rewards.small_models import saved
from stages.prefer.helpers import decide, serving, shorter
from tiny import PROMPTS, tiny_causal, tiny_t5, tiny_tokenizer

from bondlm.cli import main

from .helpers import EXAMPLES, load

FEW: dict[str, Any] = {"max_steps": 1, "max_completion_length": 8, "use_cpu": True, "eval_num_reference_samples": 4}
FEW |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "eval_num_samples": 2}


def commands(page: str) -> list[list[str]]:
    """The words behind `bondlm` in the shell blocks of an example's page."""
    text = (EXAMPLES / page / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line[1:] for line in lines if line[:1] == ["bondlm"]]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the examples, few of their prompts, and tiny models under the names that they use."""
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (tmp_path / "examples" / "everyday").glob("*.jsonl"):
        few = path.read_text(encoding="utf-8").splitlines(keepends=True)[: 12 if path.stem == "train" else 4]
        path.write_text("".join(few), encoding="utf-8")
    tokenizer = tiny_tokenizer()
    saved(tmp_path / "models" / "smollm2-135m-instruct", tiny_causal(tokenizer), tokenizer)
    (tmp_path / "runs" / "choices").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def shorten(path: Path) -> None:
    """Let a config of the copy do little."""
    content = yaml.safe_load(path.read_text())
    few = FEW | {"eval_steps": 1} if content.get("eval_strategy") == "steps" else FEW
    path.write_text(yaml.safe_dump(content | few))


@pytest.mark.slow
def test_a_judge_ranks_trains_and_compares(checkout: Path) -> None:
    train, evaluate = commands("judge")
    with judging(by_scalar, model="judge") as server:
        config = checkout / "examples" / "judge" / "jbond.yaml"
        address = "http://127.0.0.1:8000/v1"
        assert address in config.read_text()
        config.write_text(config.read_text().replace(address, server.url))
        shorten(config)
        assert main(train) == 0
        small = ["--num_samples", "2", "--num_reference_samples", "4", "--max_completion_length", "8"]
        assert main([*(word.replace(address, server.url) for word in evaluate), "--output", "runs/eval", *small]) == 0
    criterion = (checkout / "examples" / "judge" / "criterion.txt").read_text().strip()
    assert all(criterion in request["messages"][0]["content"] for request in server.requests)
    rows = [json.loads(line) for line in Path("runs/judge/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["judges/judge/agreement"] == 1
    assert json.loads(Path("runs/eval/eval.json").read_text())["pairwise"]["judge"]["num_pairs"] > 0


@pytest.mark.slow
def test_choices_become_a_reward_and_a_policy(checkout: Path) -> None:
    score, prefer, reward_model, train = commands("choices")
    assert main([*score[:-4], "--max_completion_length", "8", *score[-2:]]) == 0
    with serving(*prefer[1:]) as (process, url):
        decide(url, shorter)
        assert process.wait(30) == 0
    rows = [json.loads(line) for line in Path("runs/choices/preferences.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    config = checkout / "examples" / "choices" / "reward_model.yaml"
    settings = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(settings | {"max_steps": 2, "use_cpu": True}))
    assert main(reward_model) == 0
    facts = json.loads(Path("models/choices-reward/reward.json").read_text())
    assert len(facts["members"]) == settings["members"] == 4
    shorten(checkout / "examples" / "choices" / "jbond.yaml")
    assert main(train) == 0
    assert json.loads(Path("runs/choices/policy/eval.json").read_text())["goals"].keys() == {
        "choices-reward",
        "complete",
    }


@pytest.mark.slow
def test_faithful_first_and_brief_second(checkout: Path) -> None:
    ((*_,), faithful) = commands("summarization")
    tokenizer = tiny_tokenizer(chat=False)
    for seed, name in enumerate(("t5-debian-sft", "flan-t5-small-title")):
        saved(checkout / "models" / name, tiny_t5(tokenizer, seed=seed), tokenizer)
    (checkout / "data" / "debian").mkdir(parents=True)
    for name, prompts in (("train", PROMPTS[:8]), ("heldout", PROMPTS[8:])):
        rows = "".join(json.dumps({"prompt": f"summarize: {prompt}"}) + "\n" for prompt in prompts)
        (checkout / "data" / "debian" / f"{name}.jsonl").write_text(rows)
    shorten(checkout / "examples" / "summarization" / "faithful.yaml")
    assert main(faithful) == 0
    assert len(json.loads(Path("runs/faithful/eval.json").read_text())["goals"]) == 2


def test_brevity_counts_words() -> None:
    assert load("summarization/brevity").brevity(["two words", "one", " "]) == [-2, -1, -1000]
