import json
import math
from types import SimpleNamespace

import pytest

from bondlm.evaluation.run import _baseline, side_by_side, write_results
from bondlm.evaluation.statistics import summarize
from evaluation.helpers import case


def test_side_by_side_shows_the_best_of_the_first_eight(tmp_path):
    policy, reference, _ = case(num_prompts=3)
    rows = list(side_by_side(policy, reference))
    assert list(rows[0]) == ["prompt", "reference", "reference_best_of_8", "policy"]
    for i, row in enumerate(rows):
        assert row["reference_best_of_8"]["reward"] == float(reference.rewards_PM[i, :8].max())
        assert row["reference"]["reward"] == float(reference.rewards_PM[i, 0])
    write_results(tmp_path, {"a": math.nan}, policy, reference)
    assert json.loads((tmp_path / "eval.json").read_text()) == {"a": None}
    assert len((tmp_path / "eval_samples.jsonl").read_bytes().splitlines()) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "eval_samples.jsonl"]


def test_a_sample_is_shown_with_the_whole_conversation_of_its_prompt():
    policy, reference, _ = case(num_prompts=2)
    turns = ["What is a kettle?", "A vessel.", "Go on."]
    roles = ["user", "assistant", "user"]
    policy.prompts[0] = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]
    shown = next(side_by_side(policy, reference))["prompt"]
    assert shown == "[user]\nWhat is a kettle?\n\n[assistant]\nA vessel.\n\n[user]\nGo on."


@pytest.mark.parametrize(
    ("engine", "server", "temperature", "is_known"),
    [
        ("vllm", "external", 0.7, False),
        ("vllm", "external", 1.0, True),
        ("vllm", "auto", 0.7, True),
        ("transformers", "external", 0.7, True),
    ],
)
def test_no_entropy_of_a_temperature_that_a_server_may_not_count(
    engine: str, server: str, temperature: float, is_known: bool
) -> None:
    policy, reference, others = case(num_prompts=20)
    drawn = others["reference, T=0.7"]
    args = SimpleNamespace(engine=engine, vllm_server=server, eval_num_samples=4)
    trainer = SimpleNamespace(args=args, sample=lambda *given, **how: drawn)
    found = _baseline(trainer, [], reference, "reference", temperature)
    row = summarize(policy, reference, {"reference, T=0.7": found})["baselines"]["reference, T=0.7"]
    assert ("entropy" in row) == is_known
