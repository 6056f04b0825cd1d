"""What a report reads, and what it refuses."""

import json

import pytest

from bondlm.errors import ConfigError, DataError
from bondlm.report.read import read_run, read_runs
from report.helpers import eval_json, write_run


def spoil(name, content):
    def change(run):
        if content is None:
            (run / name).unlink()
        else:
            (run / name).write_text(content)

    return change


def spoil_eval(**changes):
    return spoil("eval.json", json.dumps(eval_json() | changes))


def without(name):
    return spoil("eval.json", json.dumps({key: value for key, value in eval_json().items() if key != name}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (spoil("eval.json", None), ConfigError, r"eval\.json: its run was stopped"),  # without weights, too
        (spoil("eval.json", "{"), DataError, r"eval\.json.*JSON"),
        (spoil("eval.json", "[]"), DataError, r"eval\.json.*'\[\]'"),
        (without("win_rate"), DataError, r"eval\.json.*win_rate"),
        (spoil_eval(kl=0.5), DataError, r"eval\.json\.kl\b.*'0\.5'.*\{value, low, high\}"),
        (spoil_eval(kl={"value": "x", "low": 0, "high": 1}), DataError, r"kl\.value\b.*'x'"),
        (spoil_eval(curve=[{"n": 1, "reward": 3}]), DataError, r"curve\[0\]\.reward\b.*'3'"),
        (spoil_eval(baselines={"reference": 1}), DataError, r"baselines\.reference\b.*'1'"),
        (spoil_eval(warnings="w"), DataError, r"warnings\b.*'w'"),
        (
            spoil_eval(quantile_histogram={"edges": [0, 1], "policy": [0.5, 0.5]}),
            DataError,
            "quantile_histogram.*shares",
        ),
        (spoil("metrics.jsonl", '{"step": 1}\nnonsense\n'), DataError, r"metrics\.jsonl, line 2\b"),
        (spoil("metrics.jsonl", "[1]\n"), DataError, r"metrics\.jsonl, line 1\b"),
        (spoil("eval_samples.jsonl", '{"prompt": 3}\n'), DataError, r"line 1\.prompt\b.*'3'"),
        (spoil("eval_samples.jsonl", '{"policy": "x"}\n'), DataError, r"line 1\.policy\b.*'x'"),
    ],
)
def test_a_folder_that_cannot_be_reported_says_why(tmp_path, change, error, message):
    run = write_run(tmp_path / "run")
    change(run)
    with pytest.raises(error, match=message):
        read_runs([run])


def test_a_folder_without_any_result_says_how_to_make_one(tmp_path):
    with pytest.raises(ConfigError, match=r"eval\.json.*metrics\.jsonl.*`bondlm train`"):
        read_runs([tmp_path])
    with pytest.raises(ConfigError, match="/nowhere"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="`bondlm report RUN`"):
        read_runs([])
    run = write_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"'{run}'.*twice"):
        read_runs([run, tmp_path / "other" / ".." / "run"])


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / place / "same") for place in ("a", "b")]
    assert [run.name for run in read_runs(runs)] == [str(run) for run in runs]


def test_a_row_that_is_being_written_is_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    assert [row["step"] for row in read_run(run, "run").steps] == list(range(1, 41))
