import re
import subprocess
import sys

import pytest

from bondlm.cli import main
from bondlm.cli.options import parse
from bondlm.errors import ConfigError


def test_command_line_wins_over_the_file_and_1e_4_is_a_number(tmp_path):
    (tmp_path / "c.yaml").write_text("eta: 0.5\nlearning_rate: 1e-4\n")
    options = parse("train", ["--config", str(tmp_path / "c.yaml"), "--eta", "0.25", "--lora-r=8", "--use_peft"])
    assert options == {"eta": 0.25, "learning_rate": 1e-4, "lora_r": 8, "use_peft": True}


def test_names_of_trls_that_ask_for_what_happens_anyway_are_left_out():
    assert parse("train", ["--temperature", "1.0", "--use_vllm", "false", "--eta", "0.1"]) == {"eta": 0.1}


def test_the_last_value_of_an_option_with_one_value_counts():
    assert parse("train", ["--eta", "0.1", "--eta", "0.2"]) == {"eta": 0.2}


def test_judge_is_judges_one_at_a_time():
    given = ["--judge", "a.py:f", "--judge", "similarity:m"]
    assert parse("eval", given) == {"judges": ["a.py:f", "similarity:m"]}
    assert parse("eval", ["--judges", "x", *given])["judges"] == ["x", "a.py:f", "similarity:m"]
    assert parse("train", given[:2])["judges"] == ["a.py:f"]
    with pytest.raises(ConfigError, match="option 'judge'"):
        parse("score", given)


def test_lists_and_plain_text_keep_their_kind():
    options = parse("train", ["--reward_weights", "[1, 0.5]", "--model", "1e4"])
    assert options == {"reward_weights": [1, 0.5], "model": "1e4"}
    assert parse("score", ["--dataset", "*.jsonl"]) == {"dataset": "*.jsonl"}


REST = ["--reference", "r", "--dataset", "d.jsonl", "--reward_funcs", "f.py:f", "--output", "o"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--learning_rat", "1"], "'learning_rat' .*'learning_rate'"),
        (["tran"], "'tran' .*'train'"),
        (["score", "--beta", "1"], "option 'beta'"),
        (["train", "--vllm_mode", "server"], "vllm_mode='server': .*vllm_server"),
        (["check", "--model_name_or_path", "m"], "model_name_or_path='m': .*use model"),
        (["train", "--resume_from_checkpoint", "true"], "resume_from_checkpoint=True: .*use resume"),
        (["sft", "--group_by_length"], "group_by_length=True: .*train_sampling_strategy"),
        (["sft", "--warmup_ratio", "0.1"], "warmup_ratio=0.1: .*warmup_steps"),
        (["reward-model", "--evaluation_strategy", "no"], "evaluation_strategy=False: .*eval_strategy"),
        (["reward-model", "--learning_rat", "1"], "'learning_rat' .*'learning_rate'"),
        (["train", "x"], "'x' .*--name value"),
        (["train", "--reward_funcs", "a.py:f", "--reward-funcs=b.py:g"], "--reward_funcs is given twice.*a list"),
        (["eval", "--judges", "a.py:f", "--judges", "b.py:g"], "--judges is given twice"),
        (["train", "--config", "a.yaml", "--config", "b.yaml"], "--config is given twice"),
        (["report", "a", "--runs", "b"], "--runs is given beside run folders"),
        (["merge", "--runs", "a", "b"], "--runs is given beside run folders"),
        (["train", "--config", "no/such.yaml"], r"--config 'no/such\.yaml'"),
        (["train", "--config"], "--config has no value.*--config VALUE"),
        (["train", "--output_dir", "", "--model", "m"], "--output_dir has no value, or an empty one"),
        (["train", "--model", "--train_dataset", "x"], "--model has no value"),
        (["train", "--eta", "[1"], r"--eta '\[1' .*YAML"),
        (["train"], r"\bmodel .*--model"),
        (["score", "--model", "m"], "reward_funcs .*--reward_funcs"),
        (["sample", "--model", "m"], "--prompt TEXT .*--dataset FILE"),
        (["sample", "--model", "m", "--prompt", "x", "--best_of", "4"], "best_of=4: .*reward_funcs"),
        (["sample", "--model", "m", "--prompt"], "--prompt has no value, or an empty one: write --prompt VALUE"),
        (["sample", "--model", "m", "--prompt", "--temperature", "0.5"], "--prompt has no value"),
        *(
            (["sample", "--model", "m", "--prompt", "x", f"--{name}", value], f"{name}=.*: there are no reward_funcs")
            for name, value in (
                ("reward_weights", "[1]"),
                ("reward_aggregation", "worst"),
                ("reward_tolerances", "[0]"),
                ("reward_timeout_s", "1"),
                ("reward_outage_s", "0"),
            )
        ),
        (["eval", "--model", "m", *REST, "--num_reference_samples", "1"], "num_reference_samples=1: .*>= 2"),
        (["merge", "a", "b", "--output_dir", "o", "--curve", "--seed", "-1"], "seed=-1: .*>= 0"),
        (["eval", "--model", "m", *REST, "--reward_timeout_s", "0"], "reward_timeout_s=0: .*> 0"),
        (["score", "--model", "m", *REST[2:], "--reward_outage_s", "-1"], "reward_outage_s=-1: .*>= 0"),
        *(
            ([*command, *option.split()], said)
            for command in (["sample", "--model", "m", "--prompt", "x"], ["score", "--model", "m", *REST[2:]])
            for option, said in (
                ("--temperature -1", "temperature=-1: .*greedy"),
                ("--temperature .nan", "temperature=nan: .*greedy"),
                ("--temperature 1e-40", "temperature=1e-40: .*0.01"),
                ("--temperature warm", "temperature='warm': .*greedy"),
                ("--max_rows 0", "max_rows=0: .*>= 1"),
                ("--max_completion_length 0", "max_completion_length=0: .*>= 1"),
                ("--max_prompt_length 0.5", "max_prompt_length=0.5: .*>= 1"),
                ("--seed -1", "seed=-1: .*>= 0"),
                ("--dtype float16", "dtype='float16': .*bfloat16"),
                ("--truncate_prompt right", "truncate_prompt='right': .*never, left"),
                ("--cuda_graphs maybe", "cuda_graphs='maybe': .*true or false"),
            )
        ),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what(arguments, message, capsys):
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "said"), [("", "is empty"), ("- a\n", "not a list"), ("1: a\n", "but has names that are not text")]
)
def test_a_config_without_settings_is_refused_in_words(text, said, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"c\.yaml.*{said}"):
        parse("train", ["--config", str(tmp_path / "c.yaml")])


def test_yaml_with_objects_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "c.yaml").write_text(f"eta: !!python/object/apply:pathlib.Path.touch ['{marker}']\n")
    with pytest.raises(ConfigError, match=r"c\.yaml.*YAML"):
        parse("train", ["--config", str(tmp_path / "c.yaml")])
    assert not marker.exists()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["score", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys; from bondlm.cli import main; "
        f"code = main({arguments!r}); "
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'rich'} & set(sys.modules); "
        "sys.exit(code or (str(heavy) if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bondlm" in done.stdout


@pytest.mark.parametrize("command", ["sft", "reward-model"])
def test_help_is_light(command: str) -> None:
    code = (
        f"import sys; from bondlm.cli import main; main([{command!r}, '--help']); "
        "sys.exit(str({'torch', 'transformers', 'rich'} & set(sys.modules)) if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--train_dataset" in done.stdout


@pytest.mark.parametrize("text", ["2024_01_15", "007", "12:30", "no", "1e3", "2024-01-15"])
def test_a_name_stays_as_it_is_written(text, tmp_path):
    """YAML reads a number, a date or a switch; in a file, where the text is lost, it must be in quotes."""
    for name in ("output_dir", "train_dataset"):
        assert parse("train", [f"--{name}", text])[name] == text
        (tmp_path / "c.yaml").write_text(f"{name}: {text}\n")
        with pytest.raises(ConfigError, match=f"{name}=.*in quotes"):
            parse("train", ["--config", str(tmp_path / "c.yaml")])
        (tmp_path / "c.yaml").write_text(f"{name}: '{text}'\n")
        assert parse("train", ["--config", str(tmp_path / "c.yaml")])[name] == text
    assert parse("train", ["--eval_dataset", "null"])["eval_dataset"] is None
    assert parse("train", ["--eval_dataset", "{a: b.jsonl}"])["eval_dataset"] == {"a": "b.jsonl"}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("sample", "has no n, objective, which bondlm train has: leave them out; --model RUN"),
        ("sft", "has no n, objective, reward_funcs, which bondlm train has: leave them out$"),
        ("report", "has no n, objective, reward_funcs, which"),
    ],
)
def test_a_runs_config_given_to_another_command_is_told_from_a_misspelling(command, said, tmp_path):
    (tmp_path / "c.yaml").write_text("objective: self_bond\nn: 4\nreward_funcs: a.py:f\n")
    with pytest.raises(ConfigError, match=f"bondlm {command} {said}"):
        parse(command, ["--config", str(tmp_path / "c.yaml")])


def test_a_name_that_stands_twice_in_a_file_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("eta: 0.1\nseed: 3\neta: 0.3\n")
    with pytest.raises(ConfigError, match="'eta' is given twice"):
        parse("train", ["--config", str(tmp_path / "c.yaml")])
    (tmp_path / "c.yaml").write_text("base: &base {eta: 0.1}\nmodel_init_kwargs: {<<: *base, eta: 0.3}\n")
    with pytest.raises(ConfigError, match="unknown option 'base'"):  # what a merge key overrides stands once
        parse("train", ["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(("named", "before"), [("null", []), ("judge_a", ["judge_a"]), ("[a, b]", ["a", "b"])])
def test_judge_adds_to_those_of_the_file(named, before, tmp_path):
    (tmp_path / "c.yaml").write_text(f"judges: {named}\n")
    given = parse("train", ["--config", str(tmp_path / "c.yaml"), "--judge", "c", "--judge", "d"])
    assert given["judges"] == [*before, "c", "d"]
