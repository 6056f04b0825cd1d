"""With the real weights of `make demo` (`make test-slow` fetches them)."""

from pathlib import Path

import pytest
import torch

from bondlm.cli import main
from bondlm.rewards import load_rewards, score
from bondlm.rollout.sampler import Sampler

ROOT = Path(__file__).parents[1]
MODEL, ENCODER = ROOT / "models" / "smollm2-135m-instruct", ROOT / "models" / "all-minilm-l6-v2"
QUESTIONS = ["What is the capital of France?", "How do I boil an egg?", "Name a fruit."]

pytestmark = pytest.mark.slow


def test_greedy_answers_are_those_of_generate():
    sampler = Sampler(str(MODEL), dtype="float32")
    rows = sampler.rows([{"prompt": question} for question in QUESTIONS])
    ours = sampler.sample(rows, 1, max_completion_length=12, temperature=0)
    for row, (completion,) in zip(rows, ours, strict=True):
        prompt = torch.tensor([row["prompt_ids"]])
        theirs = sampler.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
        )
        assert completion.ids == theirs[0, prompt.shape[1] :].tolist()
    assert "Paris" in sampler.texts(ours)[0][0]


def test_similarity_prefers_an_answer_to_the_question():
    rewards = load_rewards(f"similarity:{ENCODER}")
    answers = ["Put it in boiling water for eight minutes.", "The bank opens an account for you at nine."]
    total = score(rewards, [QUESTIONS[1]] * 2, answers, {}).total
    assert total[0] > total[1] + 0.2


def test_check_passes_on_the_demo_config(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    small = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--max_completion_length", "8"]
    assert main(["check", "--config", "examples/everyday/jbond.yaml", *small]) == 0
    assert "check passed" in capsys.readouterr().out
