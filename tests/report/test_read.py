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
        (spoil("eval.json", None), ConfigError, "has no eval.json: run `bondlm eval` on it first"),
        (spoil("eval.json", "{"), DataError, "eval.json is not JSON"),
        (spoil("eval.json", "[]"), DataError, r"eval.json is '\[\]', not an object"),
        (without("win_rate"), DataError, "eval.json lacks win_rate"),
        (spoil_eval(kl=0.5), DataError, r"eval.json.kl is '0.5', not \{value, low, high\}"),
        (spoil_eval(kl={"value": "x", "low": 0, "high": 1}), DataError, "kl.value is 'x', not a number"),
        (spoil_eval(curve=[{"n": 1, "reward": 3}]), DataError, r"curve\[0\].reward is '3'"),
        (spoil_eval(baselines={"reference": 1}), DataError, "baselines.reference is '1', not an object"),
        (spoil_eval(warnings="w"), DataError, "warnings is 'w', not a list"),
        (spoil_eval(quantile_histogram={"edges": [0, 1], "policy": [0.5, 0.5]}), DataError, "one edge more"),
        (spoil("metrics.jsonl", '{"step": 1}\nnonsense\n'), DataError, "metrics.jsonl, line 2 is not JSON"),
        (spoil("metrics.jsonl", "[1]\n"), DataError, "line 1 is not a JSON object"),
        (spoil("eval_samples.jsonl", '{"prompt": 3}\n'), DataError, "line 1.prompt is '3', not text"),
        (spoil("eval_samples.jsonl", '{"policy": "x"}\n'), DataError, "policy is 'x', not an object"),
    ],
)
def test_a_folder_that_cannot_be_reported_says_why(tmp_path, change, error, message):
    run = write_run(tmp_path / "run")
    change(run)
    with pytest.raises(error, match=message):
        read_runs([run])


def test_a_folder_without_any_result_says_how_to_make_one(tmp_path):
    with pytest.raises(ConfigError, match=r"has no eval.json and no metrics.jsonl: make a run with `bondlm train`"):
        read_runs([tmp_path])
    with pytest.raises(ConfigError, match="is not a folder"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="no run folder is given"):
        read_runs([])
    run = write_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="is given twice"):
        read_runs([run, tmp_path / "other" / ".." / "run"])


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / place / "same") for place in ("a", "b")]
    assert [run.name for run in read_runs(runs)] == [str(run) for run in runs]


def test_a_row_that_is_being_written_is_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    assert [row["step"] for row in read_run(run, "run").steps] == list(range(1, 41))
