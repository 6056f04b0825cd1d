"""`bondlm train` end to end on a tiny model: the run folder, signals, resume, and what it refuses."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from faults.children import said, train
from peft import PeftModel
from rewards.small_models import bert_classifier, bert_tokenizer, saved
from tiny import tiny_t5, tiny_tokenizer
from trainer.helpers import trainer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from bondlm.cli import main
from bondlm.cli.options import parse
from bondlm.cli.train import _changed_settings, load_judges, training_arguments
from bondlm.errors import ConfigError
from bondlm.rewards import load_rewards, score
from bondlm.runs.folder import locked
from bondlm.runs.manifest import fault
from bondlm.runs.worth import below
from cli.helpers import write_job


def rows(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize("kind", ["causal", "t5"])
def test_train_leaves_the_run_folder_of_the_contract(tmp_path, kind, capsys):
    config = write_job(tmp_path, kind=kind)
    assert main(["train", "--config", str(config)]) == 0
    run = tmp_path / "run"
    result = json.loads((run / "eval.json").read_text())
    for name in ("effective_n", "win_rate", "kl", "reward"):
        assert set(result[name]) >= {"value", "low", "high"}
    assert {"reference", "reference, greedy", "reference, T=0.7", "reference, best of 8"} <= set(result["baselines"])
    assert [row["step"] for row in rows(run / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4]
    assert {row["step"] for row in rows(run / "samples.jsonl")} == {1, 2, 3, 4}
    assert len(rows(run / "eval_samples.jsonl")) == 6
    assert "Best-of-" in (run / "README.md").read_text()
    assert not (run / ".lock").exists()
    choice = json.loads((run / "env.json").read_text())["engine"]
    assert choice.startswith("engine: transformers (auto)")
    assert "16 times slower on CPUs" in choice
    assert result["effective_n"]["text"] in (run / "report.html").read_text()
    if kind == "t5":
        assert AutoModelForSeq2SeqLM.from_pretrained(run).num_parameters() > 0
    else:
        assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), run)
    out = capsys.readouterr().out
    assert out.count(choice) == 1
    assert "effective N" in out
    reached, cost, following = out.splitlines()[-3:]
    lost = below(result, "the untouched model")  # so few steps end on either side
    assert reached.startswith("reached: one sample " + (f"is {lost}" if lost else "= Best-of-"))
    assert cost.startswith(f"cost: KL {result['kl']['value']:.2f} ")
    assert "4 steps in 0:0" in cost
    assert following == f"next: open {run / 'report.html'}, or bondlm sample --model {run} --prompt TEXT"
    assert "untouched, T=0.7" in out
    assert "\x1b" not in out  # nothing garbled when piped


def test_a_run_with_a_fixed_point_says_its_signal_and_which_weights_it_keeps(tmp_path, capsys):
    """self_bond: the strength that was solved for n, and the average of the weights, in all that speaks of the run."""
    config = write_job(tmp_path, objective="self_bond", n=3, num_samples=4, max_steps=2)
    assert main(["train", "--config", str(config)]) == 0
    run, shown = tmp_path / "run", capsys.readouterr().out
    assert re.search(r"signal: 'tilt' of strength \d", shown)
    assert "average_weights=0.333" in shown
    objective = json.loads((run / "eval.json").read_text())["objective"]
    assert objective["strength"] > 0
    assert objective["average_weights"] == pytest.approx(1 / 3)
    assert "- weights: the running average" in (run / "README.md").read_text()
    assert "average" in json.loads((run / "env.json").read_text())["weights"]
    held = safetensors.torch.load_file(run / "checkpoint-2" / "average.safetensors")
    saved = safetensors.torch.load_file(run / "adapter_model.safetensors")
    of_step = safetensors.torch.load_file(run / "checkpoint-2" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name.replace(".default", "")], tensor) for name, tensor in held.items())
    assert any(not torch.equal(saved[name], tensor) for name, tensor in of_step.items())


def test_a_t5_is_fine_tuned_with_the_reward_of_an_nli_t5(tmp_path):
    """The paper's summarization job in small: full fine-tuning, the reward another T5 that answers 1 or 0."""
    config = write_job(tmp_path, kind="t5", reward_funcs=f"nli:{tmp_path}/nli?template=true", max_steps=2)
    tokenizer = tiny_tokenizer(chat=False)
    judge = tiny_t5(tokenizer, seed=5)
    judge.save_pretrained(tmp_path / "nli")
    tokenizer.save_pretrained(tmp_path / "nli")
    assert main(["train", "--config", str(config)]) == 0
    samples = rows(tmp_path / "run" / "eval_samples.jsonl")
    row = samples[0]
    again = load_rewards(f"nli:{tmp_path}/nli?template=true")
    expected = score(again, [row["prompt"]], [row["policy"]["text"]], {}).total
    assert row["policy"]["reward"] == pytest.approx(float(expected[0]), abs=0.05)  # in bf16 where it is fast
    assert len({sample["policy"]["reward"] for sample in samples}) > 3
    start = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model").state_dict()
    trained = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run").state_dict()
    assert sum(not torch.equal(trained[name], tensor) for name, tensor in start.items()) > len(start) / 2


def test_an_evaluation_during_training_shows_its_progress_and_a_table(tmp_path, capsys):
    config = write_job(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, logging_steps=2)
    assert main(["train", "--config", str(config)]) == 0
    out = capsys.readouterr().out
    # The reference is drawn with the first one alone, and not for the evaluation that ends the run.
    counted = re.findall(r"held-out samples( at the end)?: (\d+)/(\d+) prompts", out)
    assert counted == [("", "12", "12"), ("", "6", "6"), (" at the end", "6", "6")]
    assert re.findall(r"step (\d): held-out prompts", out) == ["2", "4"]
    assert re.search(r"step 2/4 .*  elapsed 0:0\d, ETA 0:0\d\n", out)
    assert "inf" not in out.replace("info", "")


def test_a_bare_no_is_the_word_no(tmp_path):
    options = parse("train", ["--eval_strategy", "no", "--save_strategy=no", "--model", "m", "--train_dataset", "d"])
    args = training_arguments(options | {"output_dir": str(tmp_path), "use_cpu": True})
    assert (args.eval_strategy, args.save_strategy) == ("no", "no")


@pytest.mark.parametrize("name", ["kl_budget", "target_n", "judges"])
def test_when_a_run_stops_and_who_judges_it_may_change_when_it_goes_on(tmp_path, name):
    (tmp_path / "config.yaml").write_text(f"model: m\n{name}: 3\n")
    assert _changed_settings(tmp_path / "config.yaml", {"model": "m", name: 4}) == []
    with pytest.raises(ConfigError, match=r"beta: None -> 0.1"):
        _changed_settings(tmp_path / "config.yaml", {"model": "m", name: 4, "beta": 0.1})


def test_judges_have_the_runs_limits_and_room_for_its_prompts_before_it_begins(tmp_path):
    tokenizer = bert_tokenizer(max_length=5)
    short = saved(tmp_path / "short", bert_classifier(tokenizer), tokenizer)
    rows = [{"prompt": "why do cats sleep so long at night"}]
    made = trainer(tmp_path / "run", eval_dataset=rows, reward_timeout_s=300.0, reward_outage_s=3600.0)
    names = ["judge:http://127.0.0.1:1/v1?model=m&cache=off", "http://127.0.0.1:1/score"]
    judge, server = (reward.function for reward in load_judges({"judges": names}, made))
    assert [(c._timeout, c._outage) for c in (judge._client, server.client)] == [(300.0, 3600.0)] * 2
    made.rewards = load_judges({"judges": names[0]}, made)
    assert [reward.name for reward in load_judges({"judges": names[0]}, made)] == ["m_2"]  # whose cost is told apart
    with pytest.raises(ConfigError, match="reward 'short' takes 5 tokens"):
        load_judges({"judges": short}, made)


def test_judges_are_asked_by_the_last_evaluation_and_the_card_says_what_they_found(tmp_path, capsys):
    config = write_job(tmp_path, objective="best_of_n_sft", n=4, anchor="fixed", max_steps=1)
    (tmp_path / "judge.py").write_text(
        "def small(prompts, completions, **columns):\n    return [-float(len(c[-1]['content'])) for c in completions]\n"
    )
    judge = ["--judge", f"{tmp_path}/judge.py:small"]
    assert main(["train", "--config", str(config), *judge]) == 0
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert set(result["judges"]) == {"small"}
    assert result["judges"]["small"]["reward"]["value"] < 0
    assert "Judges that were not optimised" in capsys.readouterr().out
    card = (tmp_path / "run" / "README.md").read_text()
    assert "- objective: best_of_n_sft (n 4, anchor fixed, learning_rate 0.001)" in card
    assert "gain before the judge small" in card
    assert main(["train", "--config", str(config), *judge, "--eval_dataset", "null", "--resume", "never"]) in (2, 6)
    assert main(["check", "--config", str(config), *judge, "--target_n", "3"]) == 2
    assert "target_n=3" in capsys.readouterr().err
    steps = ["--eval_strategy", "steps", "--eval_steps", "1"]
    assert main(["check", "--config", str(config), *judge, "--target_n", "3", *steps]) == 0


def test_the_untouched_model_is_worth_best_of_1(tmp_path):
    config = write_job(tmp_path, max_steps=1, learning_rate=0.0, eval_num_samples=16, eval_num_reference_samples=16)
    assert main(["train", "--config", str(config)]) == 0
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert result["kl"]["value"] == pytest.approx(0.0, abs=1e-5)
    assert result["effective_n"]["low"] <= 1.3
    assert result["win_rate"]["low"] <= 0.5 <= result["win_rate"]["high"]
    best = [result["baselines"][f"reference, best of {n}"]["reward"]["value"] for n in (2, 4, 8)]
    assert result["baselines"]["reference"]["reward"]["value"] < best[0] < best[1] < best[2]


def test_sigterm_saves_exits_75_and_the_same_command_continues_exactly(tmp_path):
    """The reward function sends the signal to its own process at step 3 of 6."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for folder in (straight, stopped):
        folder.mkdir()
    options = {"max_steps": 6, "save_steps": 100}
    assert main(["train", "--config", str(write_job(straight, **options))]) == 0
    config = write_job(stopped, **options)
    bomb = ["--reward_funcs", f"{stopped / 'reward.py'}:bomb"]
    assert train(config, lambda: None, *bomb) == 75, said(config)
    assert "The same command continues" in said(config)
    assert train(config, lambda: None, *bomb) == 0, said(config)
    assert "from step 5 to 6" in said(config)
    weights = [safetensors.torch.load_file(f / "run" / "adapter_model.safetensors") for f in (straight, stopped)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    steps = [row["step"] for row in rows(stopped / "run" / "metrics.jsonl") if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_sigusr1_saves_and_goes_on(tmp_path):
    config = write_job(tmp_path, max_steps=4, save_steps=100, reward_funcs=f"{tmp_path}/reward.py:saver")
    before = signal.getsignal(signal.SIGUSR1)
    assert main(["train", "--config", str(config)]) == 0
    assert signal.getsignal(signal.SIGUSR1) == before
    run = tmp_path / "run"
    assert [path.name for path in sorted(run.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-4"]
    assert fault(run / "checkpoint-2") is None
    assert [row["step"] for row in rows(run / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4]


def test_ctrl_c_exits_130(tmp_path):
    config = write_job(tmp_path, max_steps=10_000)
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "bondlm", "train", "--config", str(config)], stdout=subprocess.PIPE, text=True
    )
    for line in child.stdout:
        if line.startswith("step 2/"):
            os.kill(child.pid, signal.SIGINT)
            break
    child.stdout.read()
    assert child.wait(timeout=60) == 130
    assert list((tmp_path / "run").glob("checkpoint-*/anchor.safetensors"))


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"reward_funcs": "{folder}/reward.py:broken"}, 4, "nan"),
        ({"reward_funcs": "{folder}/reward.py:short"}, 4, "1"),
        ({"reward_funcs": "{folder}/reward.py:raising"}, 4, "no such answer"),
        ({"reward_funcs": "{folder}/reward.py:nothing"}, 2, "nothing"),
        ({"train_dataset": "{folder}/bad.jsonl"}, 3, "bad.jsonl:2"),
        ({"max_prompt_length": 3}, 3, "row"),
        ({"eta": 1.5}, 2, "eta=1.5"),
        ({"model": "{folder}/no-model"}, 2, "no-model"),
        ({"use_peft": False}, 2, "use_peft"),
        ({"output_dir": "{folder}/train.jsonl"}, 2, "train.jsonl"),
    ],
)
def test_bad_input_ends_with_its_code_and_says_where(tmp_path, changes, code, message, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "fine"}\n{"promt": "typo"}\n')
    filled = {k: v.format(folder=tmp_path) if isinstance(v, str) else v for k, v in changes.items()}
    assert main(["train", "--config", str(write_job(tmp_path, **filled))]) == code
    assert message in capsys.readouterr().err


def test_other_settings_do_not_continue_a_run(tmp_path, capsys):
    config = write_job(tmp_path, max_steps=2)
    assert main(["train", "--config", str(config)]) == 0
    assert main(["train", "--config", str(config), "--beta", "0.25"]) == 2
    assert "beta: None -> 0.25" in capsys.readouterr().err
    for never in ("never", "no"):  # YAML reads the second as False
        assert main(["train", "--config", str(config), "--resume", never]) == 6
        assert "already holds a run" in capsys.readouterr().err
    assert main(["train", "--config", str(config), "--max_steps", "3"]) == 0
    for auto in ("null", "true", "''"):
        assert main(["train", "--config", str(config), "--max_steps", "3", "--resume", auto]) == 0


def test_a_run_folder_in_use_is_refused(tmp_path):
    command = [sys.executable, "-m", "bondlm", "train", "--config", str(write_job(tmp_path))]
    with locked(tmp_path / "run"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 6
    assert f"process {os.getpid()} on" in done.stderr


@pytest.mark.parametrize(
    ("name", "value"), [("lora_r", 4.7), ("lora_r", 0), ("lora_alpha", 0), ("lora_dropout", 1.5), ("use_peft", "maybe")]
)
def test_values_of_an_adapter_are_looked_at(name, value, tmp_path, capsys):
    config = write_job(tmp_path, **{name: value})
    assert main(["train", "--config", str(config)]) == 2
    assert f"{name}={value!r}: must " in capsys.readouterr().err
