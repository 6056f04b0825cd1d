import json
import math

from bondlm.evaluation.run import side_by_side, write_results
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
