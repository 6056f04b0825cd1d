"""`bondlm score` and `bondlm sample` on a tiny model, and a run on what they wrote."""

import json
import re

import pytest
from tiny import tiny_causal, tiny_tokenizer

from bondlm.cli import main
from bondlm.rollout.sampler import Sampler
from cli.helpers import write_job
from cli.test_train import rows


def test_score_writes_rows_and_sample_takes_the_best_of_them(tmp_path, capsys):
    write_job(tmp_path)
    reward = ["--reward_funcs", f"{tmp_path}/reward.py:letters"]
    common = ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "heldout.jsonl")]
    common += ["--max_completion_length", "8", "--seed", "3", *reward]
    assert main(["score", *common, "--num_samples", "4", "--output", str(tmp_path / "scored.jsonl"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert main(["sample", *common, "--best_of", "4", "--output", str(tmp_path / "best.jsonl")]) == 0
    scored, best = rows(tmp_path / "scored.jsonl"), rows(tmp_path / "best.jsonl")
    assert [set(row) for row in scored] == [{"prompt", "completion", "reward", "finished", "token_ids"}] * 24
    assert (told["num_prompts"], told["num_samples"]) == (6, 4)
    assert told["reward"] == pytest.approx(sum(row["reward"] for row in scored) / 24)
    assert told["finished"] == pytest.approx(sum(row["finished"] for row in scored) / 24)
    for i, row in enumerate(best):  # the same seed draws the same samples
        group = scored[4 * i : 4 * i + 4]
        assert row["reward"] == max(r["reward"] for r in group)
        assert row["completion"] in [r["completion"] for r in group]
    assert main(["score", *common, "--output", str(tmp_path / "scored.jsonl")]) == 2
    printed = capsys.readouterr().err
    assert f"output='{tmp_path / 'scored.jsonl'}'" in printed
    assert "4 answer(s) to each prompt: 6/6 prompts" in printed
    assert "\n\n" not in printed


@pytest.mark.parametrize("command", ["score", "sample"])
def test_a_file_that_was_interrupted_does_not_look_whole_and_the_same_command_writes_it(
    command, tmp_path, capsys, monkeypatch
):
    write_job(tmp_path)
    out = tmp_path / "out.jsonl"
    arguments = [command, "--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "train.jsonl")]
    arguments += ["--reward_funcs", f"{tmp_path}/reward.py:letters", "--max_completion_length", "4"]
    arguments += ["--output", str(out)] + (["--num_samples", "2"] if command == "score" else [])
    with monkeypatch.context() as patch:
        patch.setattr("bondlm.cli.sample.CHUNK", 4)
        draw, calls = Sampler.sample, []

        def interrupted(*given, **named):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return draw(*given, **named)

        patch.setattr(Sampler, "sample", interrupted)
        assert main(arguments) == 130
    partial = tmp_path / "out.jsonl.part"
    begun = rows(partial)
    assert not out.exists()
    assert 0 < len(begun) <= 8
    assert main(arguments) == 0
    assert "out.jsonl.part, which was not finished, is written anew" in capsys.readouterr().err
    assert not partial.exists()
    assert len(rows(out)) == 16 * (2 if command == "score" else 1)
    assert rows(out)[: len(begun)] == begun


def test_train_learns_from_what_score_wrote(tmp_path, capsys):
    write_job(tmp_path)
    common = ["--model", str(tmp_path / "model"), "--max_completion_length", "8"]
    reward = ["--reward_funcs", f"{tmp_path}/reward.py:letters", "--num_samples", "4"]
    scored = str(tmp_path / "scored.jsonl")
    assert main(["score", *common, *reward, "--dataset", str(tmp_path / "train.jsonl"), "--output", scored]) == 0
    job = ["train", *common, "--train_dataset", scored, "--objective", "best_of_n_regression", "--n", "4"]
    job += ["--output_dir", str(tmp_path / "offline"), "--max_steps", "2", "--logging_steps", "1", "--use_cpu", "true"]
    assert main(job) == 2
    assert "anchor='ema'" in capsys.readouterr().err
    assert main([*job, "--anchor", "fixed"]) == 0
    first = rows(tmp_path / "offline" / "metrics.jsonl")[0]
    assert first["bond/regression_loss"] > 0
    assert "time/generate" not in first
    assert (tmp_path / "offline" / "model.safetensors").is_file()


def test_samples_of_another_model_or_reward_are_not_taken_in_silence(tmp_path, capsys):
    write_job(tmp_path)
    scored, reward = str(tmp_path / "scored.jsonl"), f"{tmp_path}/reward.py:letters"
    score = ["score", "--model", str(tmp_path / "model"), "--reward_funcs", reward, "--num_samples", "4"]
    score += ["--dataset", str(tmp_path / "train.jsonl"), "--max_completion_length", "8", "--output", scored]
    assert main(score) == 0
    origin = json.loads((tmp_path / "scored.jsonl.meta.json").read_text())
    assert origin["model"]["sha256"]
    assert [r["spec"] for r in origin["rewards"]] == [reward]
    tokenizer = tiny_tokenizer()
    for name, seed in (("other", 7), ("copy", 0)):  # copy: the same weights at another place
        tiny_causal(tokenizer, seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    job = ["train", "--train_dataset", scored, "--n", "4", "--anchor", "fixed", "--max_steps", "1", "--use_cpu", "true"]
    job += ["--max_completion_length", "8"]

    def train(model, objective, *more):
        out = ["--output_dir", str(tmp_path / f"{model}-{objective}-{len(more)}"), "--objective", objective]
        return main([*job, "--model", str(tmp_path / model), *out, *more])

    assert train("other", "best_of_n_regression") == 2
    assert re.search(rf"/other'.*'{tmp_path}/model'", capsys.readouterr().err)
    assert train("copy", "best_of_n_regression") == 0
    with pytest.warns(UserWarning, match=rf"{tmp_path}/other.*{tmp_path}/model"):
        assert train("other", "best_of_n_sft") == 0
    held_out = ["--eval_dataset", str(tmp_path / "heldout.jsonl"), "--reward_funcs", f"{tmp_path}/reward.py:short"]
    with pytest.warns(UserWarning, match=r"reward_funcs=.*:short.*scored\.jsonl.*:letters"):
        train("copy", "best_of_n_sft", *held_out, "--eval_num_reference_samples", "2")
    (tmp_path / "scored.jsonl.meta.json").write_text("[]")
    assert train("copy", "bonbon") == 3


def test_sample_prints_an_answer_to_one_prompt(tmp_path, capsys):
    write_job(tmp_path)
    arguments = ["sample", "--model", str(tmp_path / "model"), "--prompt", "Hello", "--max_completion_length", "8"]
    assert main([*arguments, "--temperature", "0"]) == 0
    first = capsys.readouterr().out
    assert main([*arguments, "--temperature", "0", "--seed", "9"]) == 0
    assert capsys.readouterr().out == first  # greedy does not depend on the seed
