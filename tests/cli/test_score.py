"""`bondlm score` and `bondlm sample` on a tiny model, and a run on what they wrote."""

import json
import re
from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest
from rich.console import Console
from tiny import tiny_causal, tiny_tokenizer
from transformers import GenerationConfig

from bondlm.cli import main
from bondlm.cli.draft import drafted
from bondlm.engines.local import engine
from bondlm.errors import ConfigError
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
    assert main(["sample", *common, "--best_of", "4"]) == 0
    out, err = capsys.readouterr()
    said = [float(line.split()[1]) for line in err.splitlines() if line.startswith("reward ")]
    assert said == pytest.approx([row["reward"] for row in best], rel=1e-3)
    assert "reward " not in out


@pytest.mark.parametrize("torn", [False, True, "seed", "eos_ids"])
@pytest.mark.parametrize("command", ["score", "sample"])
def test_an_interrupted_file_does_not_look_whole_and_the_same_command_continues_it(
    command, torn, tmp_path, capsys, monkeypatch
):
    write_job(tmp_path)
    arguments = [command, "--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "train.jsonl")]
    arguments += ["--reward_funcs", f"{tmp_path}/reward.py:letters", "--max_completion_length", "4"]
    arguments += ["--num_samples", "2"] if command == "score" else []
    samples, out = 2 if command == "score" else 1, tmp_path / "out.jsonl"
    monkeypatch.setattr("bondlm.cli.sample.CHUNK", 4)
    assert main([*arguments, "--output", str(tmp_path / "at_once.jsonl")]) == 0
    draw, drawn = Sampler.sample, []

    def interrupted(self, chunk, *given, **named):
        drawn.append(len(chunk))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(self, chunk, *given, **named)

    monkeypatch.setattr(Sampler, "sample", interrupted)
    tomorrow = SimpleNamespace(today=lambda: datetime.today() + timedelta(days=1))
    arguments += ["--output", str(out)]
    assert main(arguments) == 130
    partial = tmp_path / "out.jsonl.part"
    assert not out.exists()
    assert len(rows(partial)) == 8 * samples
    monkeypatch.setattr("bondlm.cli.sample.datetime", tomorrow)  # its prompts keep the date that they began with
    if torn is True:  # the last write was half done: its chunk is drawn again
        partial.write_bytes(partial.read_bytes()[:-9])
    if torn == "eos_ids":  # answers end elsewhere
        GenerationConfig(eos_token_id=[2, 7]).save_pretrained(tmp_path / "model")
    if isinstance(torn, str):
        before = partial.read_bytes()
        assert main([*arguments, "--seed", "43"] if torn == "seed" else arguments) == 2
        said = capsys.readouterr().err
        assert f"out.jsonl.part' holds {8 * samples} answers that were made with another {torn} (" in said
        assert partial.read_bytes() == before
        return
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert f"out.jsonl.part is continued: {4 if torn else 8} of 16 prompts are answered" in said
    assert sum(drawn[3:]) == (12 if torn else 8)
    assert out.read_bytes() == (tmp_path / "at_once.jsonl").read_bytes()
    assert not list(tmp_path.glob("out.jsonl.part*"))


def test_a_file_of_the_user_that_is_called_as_a_draft_is_kept(tmp_path, capsys):
    notes = tmp_path / "out.jsonl.part"
    notes.write_text("my notes of three weeks")
    given = ["--model", "nowhere", "--prompt", "x", "--output", str(tmp_path / "out.jsonl")]
    assert main(["sample", *given]) == 2
    assert "out.jsonl.part', where the answers are collected, exists without" in capsys.readouterr().err
    assert notes.read_text() == "my notes of three weeks"


def test_two_commands_do_not_write_one_output(tmp_path, capsys):
    reward = ["--reward_funcs", "nowhere.py:f", "--model", "nowhere", "--dataset", "nowhere.jsonl"]
    out = tmp_path / "out.jsonl"
    with drafted(str(out), 1, Console(quiet=True)) as draft:
        draft.begin({"seed": 1}, 2, 16)
        draft.add([{"prompt": "a"}])
        for command in ("score", "sample"):
            given = reward if command == "score" else reward[2:]
            assert main([command, *given, "--output", str(out)]) == 6
            assert f"{out} is in use by another process" in capsys.readouterr().err
        assert len(rows(tmp_path / "out.jsonl.part")) == 1
        out.write_text("the result of another program")
        with pytest.raises(ConfigError, match=r"out\.jsonl' has been written.*out\.jsonl\.part"):
            draft.finish()
    assert out.read_text() == "the result of another program"
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, f"{out.name}.part", f"{out.name}.part.json"]


def test_an_output_that_cannot_be_written_is_named_before_the_model_is_loaded(tmp_path, capsys):
    reward = ["--reward_funcs", "nowhere.py:f", "--model", "nowhere", "--dataset", "nowhere.jsonl"]
    assert main(["score", *reward, "--output", "/proc/scored.jsonl"]) == 2
    assert "output='/proc/scored.jsonl' cannot be written: " in capsys.readouterr().err
    assert main(["score", *reward, "--output", str(tmp_path / "scored.jsonl")]) == 2
    assert not list(tmp_path.iterdir())


def test_train_learns_from_what_score_wrote(tmp_path, capsys):
    write_job(tmp_path)
    common = ["--model", str(tmp_path / "model"), "--max_completion_length", "8"]
    reward = ["--reward_funcs", f"{tmp_path}/reward.py:letters", "--num_samples", "4"]
    scored = str(tmp_path / "scored.jsonl")
    assert main(["score", *common, *reward, "--dataset", str(tmp_path / "train.jsonl"), "--output", scored]) == 0
    job = ["train", *common, "--train_dataset", scored, "--objective", "best_of_n_regression", "--n", "4"]
    job += ["--output_dir", str(tmp_path / "offline"), "--max_steps", "2", "--logging_steps", "1", "--use_cpu", "true"]
    assert main([*job, "--anchor", "ema"]) == 2
    assert "anchor='ema'" in capsys.readouterr().err
    assert main(job) == 0
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


@pytest.mark.parametrize("command", ["score", "sample", "eval"])
def test_the_limits_of_rewards_are_those_of_the_run_or_given(command, tmp_path, capsys):
    """They were always 60 s and 600 s, so a run whose reward takes longer could not be evaluated."""
    write_job(tmp_path)
    (tmp_path / "slow.py").write_text(
        "import asyncio\n\nasync def slow(completions, **columns):\n    await asyncio.sleep(1)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    (tmp_path / "model" / "config.yaml").write_text(
        f"model: {tmp_path / 'model'}\neval_dataset: {tmp_path / 'heldout.jsonl'}\nreward_timeout_s: 0.01\n"
    )
    arguments = [command, "--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "heldout.jsonl")]
    arguments += ["--reward_funcs", f"{tmp_path}/slow.py:slow", "--max_completion_length", "2"]
    arguments += ["--output", str(tmp_path / ("out" if command == "eval" else "out.jsonl"))]
    assert main(arguments) == 4
    assert "within 0.01 s (reward_timeout_s)" in " ".join(capsys.readouterr().err.split())
    assert main([*arguments, "--reward_timeout_s", "0.02"]) == 4
    assert "within 0.02 s (reward_timeout_s)" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", ["score", "sample", "eval"])
def test_prompts_are_cut_and_answers_decoded_as_in_the_run(command, tmp_path, capsys, caplog, monkeypatch):
    write_job(tmp_path, kind="t5")
    (tmp_path / "model" / "config.yaml").write_text(
        f"model: {tmp_path / 'model'}\neval_dataset: {tmp_path / 'heldout.jsonl'}\n"
        "truncate_prompt: left\nmax_prompt_length: 4\ncuda_graphs: false\n"
    )
    kinds = []
    graphs = engine.CudaGraphs
    monkeypatch.setattr(engine, "CudaGraphs", lambda *, wanted: kinds.append(wanted) or graphs(wanted=wanted))
    arguments = [command, "--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "heldout.jsonl")]
    arguments += ["--reward_funcs", f"{tmp_path}/reward.py:letters", "--max_completion_length", "2"]
    arguments += ["--output", str(tmp_path / ("out" if command == "eval" else "out.jsonl"))]
    assert main([*arguments, "--truncate_prompt", "never", "--max_prompt_length", "4"]) == 3
    assert "max_prompt_length is 4" in capsys.readouterr().err
    kinds.clear()
    assert main(arguments) == 0
    assert "longer than 4 tokens" in caplog.text
    assert set(kinds) == {False}
