"""`bondlm eval` end to end on tiny models: numbers, resume, fingerprints, and what it refuses."""

import json
import math
import re

import pytest
from tiny import prompt_rows, tiny_causal, tiny_gpt2, tiny_t5, tiny_tokenizer

from bondlm.cli import main
from bondlm.cli.eval import complete
from bondlm.errors import ConfigError
from cli.helpers import with_other, write_job

FILES = (*("reference", "policy", "reference-greedy", "reference-t0.3", "reference-t0.7", "policy-greedy"),)


def rows(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def job(folder, policy_seed=1, num_prompts=20):
    """A reference and a policy that is another random model, prompts with a text column, rewards."""
    write_job(folder)
    tokenizer = tiny_tokenizer()
    policy = tiny_causal(tokenizer, seed=policy_seed)
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    data = [row | {"answer": f"tell {row['prompt'][-1]['content']}"} for row in prompt_rows(num_prompts, chat=True)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    (folder / "judge.py").write_text(
        "def short(prompts, completions, **columns):\n    return [-float(len(c[-1]['content'])) for c in completions]\n"
    )
    return [
        *("eval", "--model", f"{folder}/policy", "--reference", f"{folder}/model"),
        *("--dataset", f"{folder}/prompts.jsonl", "--reward_funcs", f"{folder}/reward.py:letters"),
        *("--max_completion_length", "8", "--num_samples", "3", "--num_reference_samples", "8"),
        *("--output", f"{folder}/out", "--dtype", "float32"),  # bf16 rounds by the shape of the batch
    ]


def test_samples_numbers_and_table(tmp_path, capsys):
    arguments = [*job(tmp_path), "--judges", f"{tmp_path}/judge.py:short", "--reference_column", "answer"]
    assert main(arguments) == 0
    out = tmp_path / "out"
    for name in FILES:
        count = {"reference": 8, "policy": 3}.get(name, 1 if "greedy" in name else 3)
        assert len(rows(out / f"{name}.jsonl")) == 20 * count
    row = rows(out / "policy.jsonl")[0]
    assert {"prompt", "completion", "reward", "finished", "log_ratio"} <= set(row)
    assert row["judges"]["short"] == -len(row["completion"])
    assert row["reward"] == pytest.approx(row["completion"].count("e") + 0.01 * len(row["completion"]))
    result = json.loads((out / "eval.json").read_text())
    assert set(result["matched"]) == {"win_rate", "log_quantile", "reward"}
    assert result["effective_n"] == result["matched"]["win_rate"]
    assert [p["n"] for p in result["curve"]] == list(range(1, 9))
    assert result["curve"][7]["win_rate"] is None
    assert [p["n"] for p in result["against_best_of"]] == [1, 2, 4, 8]
    assert result["against_best_of"][0]["backward_kl"]["value"] == pytest.approx(result["kl"]["value"])
    assert result["against_best_of"][0]["forward_kl"]["value"] > 0  # KL(reference || policy)
    assert result["kl"]["value"] > 0.5  # two random models
    ratios = [r["log_ratio"] for r in rows(out / "policy.jsonl")]
    assert result["kl"]["value"] == pytest.approx(sum(ratios) / len(ratios))
    assert result["kl_per_token"]["value"] == pytest.approx(
        sum(ratios) / sum(r["tokens"] for r in rows(out / "policy.jsonl"))
    )
    assert sum(result["quantile_histogram"]["policy"]) == pytest.approx(1.0)
    assert {"reference, T=0.3", "reference, T=0.7", "reference, greedy", "policy, greedy"} <= set(result["baselines"])
    assert set(result["judges"]) == {"short", "rouge_l"}
    assert 0 <= result["judges"]["rouge_l"]["reward"]["value"] <= 1
    assert result["rewards"] == ["letters"]
    cost = result["cost"]
    assert cost["n"] == min(8, math.ceil(result["effective_n"]["value"] or 8))
    assert cost["best_of_n_tokens"] == pytest.approx(
        cost["n"] * result["baselines"]["reference"]["completions/mean_length"]
    )
    assert all(math.isfinite(v) for v in cost.values())
    assert len(rows(out / "eval_samples.jsonl")) == 20
    shown = capsys.readouterr().out
    assert "Judges that were not optimised" in shown
    assert "\x1b" not in shown


def test_a_model_beside_itself_is_worth_one_sample_at_no_kl(tmp_path):
    arguments = job(tmp_path, policy_seed=0)
    assert main(arguments) == 0
    result = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert result["kl"]["value"] == pytest.approx(0.0, abs=1e-5)
    assert result["win_rate"]["low"] <= 0.5 <= result["win_rate"]["high"]
    # Other seeds for policy and reference: independent samples, not the same ones.
    mine, theirs = ([r["completion"] for r in rows(tmp_path / "out" / f"{n}.jsonl")] for n in ("policy", "reference"))
    assert mine[:3] != theirs[:3]


def test_another_policy_may_be_met_later_and_nothing_else_is_drawn_again(tmp_path, capsys):
    arguments = job(tmp_path)
    assert main([*arguments, "--orders", "[1, 3]", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / "out" / "eval.json").read_text())
    out = tmp_path / "out"
    before = {name: (out / f"{name}.jsonl").read_bytes() for name in FILES}
    assert [p["n"] for p in json.loads((out / "eval.json").read_text())["against_best_of"]] == [1, 3]
    other_models(tmp_path)
    assert main([*arguments, "--opponent", f"{tmp_path}/model"]) == 0
    assert {name: (out / f"{name}.jsonl").read_bytes() for name in FILES} == before
    assert len(rows(out / "opponent.jsonl")) == 20 * 3
    result = json.loads((out / "eval.json").read_text())
    mine, theirs = ([r["reward"] for r in rows(out / f"{n}.jsonl")] for n in ("policy", "opponent"))
    pairs = [
        (a > b) + 0.5 * (a == b) for i in range(20) for a in mine[3 * i : 3 * i + 3] for b in theirs[3 * i : 3 * i + 3]
    ]
    assert result["opponent"]["win_rate"]["value"] == pytest.approx(sum(pairs) / len(pairs))
    assert result["opponent_model"] == f"{tmp_path}/model"
    assert result["reference"] == f"{tmp_path}/model"
    assert "Win rate against" in capsys.readouterr().out
    assert main([*arguments, "--opponent", f"{tmp_path}/other-tokens"]) == 2  # its file is another opponent's
    assert "opponent:" in capsys.readouterr().err
    (out / "opponent.jsonl").unlink()
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompt_rows(4)))
    again = [*with_other(arguments, "--dataset", f"{tmp_path}/plain.jsonl"), "--output", f"{tmp_path}/plain"]
    assert main([*again, "--opponent", f"{tmp_path}/other-tokens"]) == 0  # tokens of its own


def drawn(path):
    """What must not depend on an interruption, and the numbers that may differ by a batch's rounding."""
    exact = [{k: v for k, v in row.items() if k not in ("logprob", "log_ratio")} for row in rows(path)]
    return exact, [[row["logprob"], row.get("log_ratio", 0.0)] for row in rows(path)]


def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_samples(tmp_path, capsys):
    arguments = job(tmp_path)
    assert main(arguments) == 0
    out = tmp_path / "out"
    before = {name: drawn(out / f"{name}.jsonl") for name in FILES}
    number = json.loads((out / "eval.json").read_text())["effective_n"]
    lines = (out / "policy.jsonl").read_bytes().splitlines(keepends=True)
    kept = {name: (out / f"{name}.jsonl").read_bytes() for name in FILES}
    (out / "policy.jsonl").write_bytes(b"".join(lines[:28]) + lines[28][:40])  # 9 prompts, one more, and a torn line
    (out / "policy-greedy.jsonl").unlink()
    capsys.readouterr()
    assert main(arguments) == 0
    printed = capsys.readouterr().err
    assert "policy x 3: 20/20" in printed
    for name in FILES:
        exact, rounded = drawn(out / f"{name}.jsonl")
        assert exact == before[name][0]
        for mine, theirs in zip(rounded, before[name][1], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
    assert (out / "reference.jsonl").read_bytes() == kept["reference"]  # seconds as well: nothing was drawn again
    assert (out / "policy.jsonl").read_bytes().startswith(b"".join(lines[:27]))
    assert json.loads((out / "eval.json").read_text())["effective_n"] == number


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", "7"], "seed: 42 -> 7"),
        (["--max_completion_length", "9"], "max_completion_length: 8 -> 9"),
        (["--num_samples", "2"], "num_samples: 3 -> 2"),
        (["--reward_funcs", "{folder}/reward.py:raising"], "rewards:"),
        (["--model", "{folder}/model"], "policy:"),
        (["--dataset", "{folder}/heldout.jsonl"], "dataset:"),
        (["--judges", "{folder}/judge.py:short"], "judges:"),
    ],
)
def test_samples_of_something_else_are_refused(tmp_path, change, message, capsys):
    arguments = job(tmp_path, num_prompts=2)
    assert main(arguments) == 0
    assert main(with_other(arguments, *(word.format(folder=tmp_path) for word in change))) == 2
    error = capsys.readouterr().err
    assert f"({message}" in error
    assert str(tmp_path / "out") in error


def test_an_edited_reward_or_other_weights_are_seen(tmp_path, capsys):
    arguments = job(tmp_path, num_prompts=2)
    assert main(arguments) == 0
    source = (tmp_path / "reward.py").read_text()
    (tmp_path / "reward.py").write_text(source.replace("0.01", "0.02"))
    assert main(arguments) == 2
    assert "rewards:" in capsys.readouterr().err
    (tmp_path / "reward.py").write_text(source)
    tiny_causal(tiny_tokenizer(), seed=5).save_pretrained(tmp_path / "model")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "reference:" in error
    assert "policy:" not in error


def test_a_sample_file_without_manifest_or_of_other_prompts_is_refused(tmp_path, capsys):
    arguments = job(tmp_path, num_prompts=2)
    assert main(arguments) == 0
    out = tmp_path / "out"
    manifest = (out / "manifest.json").read_text()
    (out / "manifest.json").unlink()
    assert main(arguments) == 2
    assert "manifest.json" in capsys.readouterr().err
    (out / "manifest.json").write_text(manifest)
    lines = (out / "policy.jsonl").read_text().splitlines(keepends=True)
    (out / "policy.jsonl").write_text("".join(lines[::-1]))
    assert main(arguments) == 3
    assert re.search(r"policy\.jsonl:1: .*prompt 0", capsys.readouterr().err)


def other_models(folder):
    small = tiny_tokenizer(adds_bos=True)
    for name, model, tokenizer in (
        ("other-tokens", tiny_gpt2(small), small),
        ("t5", tiny_t5(tiny_tokenizer(chat=False)), tiny_tokenizer(chat=False)),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--reference", "{folder}/other-tokens"], 2, "tokenizers"),
        (["--reference", "{folder}/t5"], 2, "shape"),
        (["--dataset", "{folder}/one.jsonl"], 3, "one.jsonl: 1 prompt"),
        (["--dataset", "{folder}/none.jsonl"], 3, "none.jsonl: "),
        (["--num_reference_samples", "1"], 2, "num_reference_samples=1"),
        (["--num_samples", "0"], 2, "num_samples=0"),
        (["--orders", "[1, 9]"], 2, "orders=[1, 9]: "),
        (["--reference_column", "nothing"], 3, "reference_column 'nothing'"),
        (["--reward_weights", "[1, 2]"], 2, "reward_weights"),
        (["--reward_funcs", "{folder}/reward.py:broken"], 4, "nan"),
        (["--temperature", "1"], 2, "'temperature'"),
    ],
)
def test_bad_input_ends_with_its_code_and_says_what(tmp_path, change, code, message, capsys):
    arguments = job(tmp_path, num_prompts=2)
    other_models(tmp_path)
    (tmp_path / "one.jsonl").write_text('{"prompt": "alone"}\n')
    (tmp_path / "none.jsonl").write_text("")
    assert main(with_other(arguments, *(word.format(folder=tmp_path) for word in change))) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["causal", "t5"])
def test_a_run_folder_says_what_it_was_trained_with(tmp_path, kind):
    config = write_job(tmp_path, kind=kind, max_steps=2, num_logged_samples=0)
    assert main(["train", "--config", str(config)]) == 0
    run = tmp_path / "run"
    trained = json.loads((run / "eval.json").read_text())
    again = ["eval", "--model", str(run), "--num_samples", "2", "--num_reference_samples", "8"]
    assert main(again) == 2  # its reward is a function: whoever wants it run says so
    assert main([*again, "--reward_funcs", f"{tmp_path / 'reward.py'}:letters"]) == 0
    result = json.loads((run / "eval.json").read_text())
    assert result["reference"] == trained["reference"] == str(tmp_path / "model")
    assert result["num_prompts"] == trained["num_prompts"] == 6
    assert result["steps"] == trained["steps"] == 2
    assert result["objective"] == trained["objective"]
    assert result["objective"]["beta"] == 0.5  # not set: the default counts
    card = (run / "README.md").read_text()
    for text in (result["effective_n"]["text"], "objective: jbond (n 2, beta 0.5", "reward.py:letters", "train.jsonl"):
        assert text in card
    assert f"base_model: {tmp_path / 'model'}" in card
    assert "{value:.3f} [{low:.3f}, {high:.3f}]".format(**result["kl"]) in card
    assert set(trained) <= set(result)
    assert result["rewards"] == trained["rewards"] == ["letters"]
    assert set(trained["baselines"]) < set(result["baselines"])  # T=0.3 is new
    assert trained["against_best_of"][0]["forward_kl"]["value"] is None  # not worth its time at the end of a run
    assert abs(result["kl"]["value"]) < 5
    measured = ("dataset", "prompts_sha256", "max_completion_length")
    assert [trained[name] for name in measured] == [result[name] for name in measured]
    assert trained["dataset"] == str(tmp_path / "heldout.jsonl")
    other = tmp_path / "other.jsonl"  # as many prompts
    other.write_text("".join((tmp_path / "train.jsonl").read_text().splitlines(keepends=True)[-6:]))
    for name in FILES:
        (run / f"{name}.jsonl").unlink()
    elsewhere = ["--dataset", str(other), "--max_completion_length", "4"]
    assert main([*again, "--reward_funcs", f"{tmp_path / 'reward.py'}:letters", *elsewhere]) == 0
    result = json.loads((run / "eval.json").read_text())
    assert result["dataset"] == str(other)
    assert result["prompts_sha256"] != trained["prompts_sha256"]
    card = (run / "README.md").read_text()
    assert f"held out: `{other}`" in card
    assert f"name: {other}" in card
    assert str(tmp_path / "heldout.jsonl") not in card
    assert "with answers of at most 4 tokens" in card
    assert "steps, at most 8 tokens" in card


def test_an_evaluation_of_the_best_checkpoint_says_its_step_as_training_did(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "kl", "learning_rate": 0.05}
    config = write_job(tmp_path, max_steps=3, save_steps=1, eval_strategy="steps", eval_steps=1, **best)
    assert main(["train", "--config", str(config)]) == 0
    run, said = tmp_path / "run", []
    for again in (False, True):
        if again:
            reward = ["--reward_funcs", f"{tmp_path / 'reward.py'}:letters"]
            assert main(["eval", "--model", str(run), "--num_reference_samples", "8", *reward]) == 0
        result = json.loads((run / "eval.json").read_text())
        card = (run / "README.md").read_text().splitlines()
        lines = [line for line in card if line.startswith(("- weights", "- training"))]
        said.append((result["steps"], result["last_step"], lines))
    assert said[0] == said[1]
    assert said[0][0] < said[0][1] == 3
    assert f"those of step {said[0][0]}, the best by" in said[0][2][0]


def test_what_is_missing_is_named(tmp_path):
    for missing in ("model", "reference", "dataset", "reward_funcs", "output"):
        given = dict.fromkeys(("model", "reference", "dataset", "reward_funcs", "output"), "x")
        del given[missing]
        with pytest.raises(ConfigError, match=f"^{missing} .*--{missing}"):
            complete(given)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    filled, config = complete({"model": str(tmp_path), "dataset": "d", "reward_funcs": "r", "output": "o"})
    assert filled["reference"] == "some/base"
    assert config == {}


def test_a_reward_may_have_the_name_of_the_reference_columns_judge(tmp_path):
    """The first prompts were drawn, and then the two names were refused."""
    arguments = [*job(tmp_path, num_prompts=2), "--reference_column", "answer"]
    (tmp_path / "rouge.py").write_text(
        "def rouge_l(completions, **columns):\n    return [float(len(c[-1]['content'])) for c in completions]\n"
    )
    assert main(with_other(arguments, "--reward_funcs", f"{tmp_path}/rouge.py:rouge_l")) == 0
    result = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert (result["rewards"], list(result["judges"])) == (["rouge_l"], ["rouge_l_2"])
