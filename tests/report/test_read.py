"""What a report refuses, and the numbers that it derives."""

import json
import sys

import numpy as np
import pytest

from bondlm.bestofn import kl_bound
from bondlm.cli import main
from bondlm.errors import ConfigError, DataError
from bondlm.report.curves import MAX_POINTS, mean_phases, series
from bondlm.report.numbers import best_of_n_kl, best_of_n_win_rate, curve, estimate, headline, kl_ratio, number
from bondlm.report.read import read_run, read_runs
from bondlm.report.safe import script_json, visible
from report.helpers import eval_json, write_run


def test_kl_of_best_of_n_is_the_one_of_the_library():
    n = np.array([1.0, 1.5, 2, 6.3, 64, 1e6])
    assert best_of_n_kl(n) == pytest.approx([kl_bound(float(order)) for order in n], abs=1e-12)
    assert best_of_n_win_rate(np.array([1.0, 3.0])).tolist() == [0.5, 0.75]


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (0.86301, 0.8417, 0.8843, "0.863 [0.842, 0.884]"),
        (1.0, 0.98, 1.02, "1.000 [0.980, 1.020]"),
        (6.3, 5.0, 7.6, "6.3 [5.0, 7.6]"),
        (1234.5, 1000.0, 1500.0, "1,234 [1,000, 1,500]"),
        (-0.02, -0.05, 0.01, "-0.020 [-0.050, 0.010]"),
        (0.5, 0.5, 0.5, "0.5 [0.5, 0.5]"),
        (None, 2.0, None, "– [2, –]"),
        (None, None, None, "–"),
    ],
)
def test_an_estimate_is_written_with_the_digits_that_its_interval_supports(value, low, high, text):
    assert estimate({"value": value, "low": low, "high": high}) == text


def test_a_number_is_written_with_three_digits():
    assert [number(x) for x in (None, 0.04567, 12345.6, 1.0, -3.14159)] == ["–", "0.0457", "12,346", "1", "-3.14"]


def test_an_old_file_without_the_ratio_gets_it_from_its_kl():
    result = eval_json()
    del result["kl_ratio"]
    assert kl_ratio(result) == pytest.approx(1.4)
    assert kl_ratio(result | {"kl_of_best_of_n": 0.0}) is None
    assert headline(result | {"kl_of_best_of_n": 0.0}) == "One sample = Best-of-6.3 [5.0, 7.6]."
    assert kl_ratio(result | {"kl_ratio": None}) is None


def test_an_old_file_without_a_curve_has_one_in_its_baselines():
    result = eval_json()
    points = curve(result)
    assert [point["n"] for point in points] == list(range(1, 17))
    del result["curve"]
    assert [(point["n"], point["reward"]["value"]) for point in curve(result)] == [(1, 1.0), (8, 16 / 9)]


def test_a_long_curve_becomes_means_of_groups():
    rows = [{"step": step, "reward": float(step % 2)} for step in range(1, 10 * MAX_POINTS + 1)]
    steps, values = series(rows, "reward")
    assert len(steps) == MAX_POINTS
    assert steps[0] == pytest.approx(5.5)
    assert values == pytest.approx(np.full(MAX_POINTS, 0.5))
    assert series([{"step": 1, "kl": None}], "kl")[0].size == 0


def test_phases_are_means_over_steps_the_longest_first(tmp_path):
    run = write_run(tmp_path / "run")
    means = mean_phases(read_run(run, "run"))
    assert list(means) == ["generate", "learn", "reference", "other"]
    assert list(means.values()) == pytest.approx([14.0, 9.9, 5.1, 0.04])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\r\nb\tc", "a\\r\nb\tc"),
        ("\u202eevil\u2028\ufeff\ud800", "\\u202eevil\\u2028\\ufeff\\ud800"),
        ("naïve 漢字 👩\u200d🔬 a\u00a0b", "naïve 漢字 👩\u200d🔬 a\u00a0b"),
        ("\x9b1m\U000e0041", "\\x9b1m\\U000e0041"),
    ],
)
def test_hidden_characters_are_shown(text, shown):
    assert visible(text) == shown


def test_json_in_a_script_block_cannot_end_it_and_reads_back():
    value = ["</script><!-- & \u2028 ]]>", {"漢": 1.5}]
    text = script_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value


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


def test_the_command_writes_the_page_and_says_where(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert f"report: {run / 'report.html'}" in capsys.readouterr().out
    assert main(["report", "--output", str(tmp_path / "x.html"), str(run)]) == 0
    assert (tmp_path / "x.html").is_file()


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(run)]) == 2
    assert "a report needs matplotlib: run pip install 'bondlm[report]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "no run folder is given"),
        (["no/such"], 2, "is not a folder"),
        (["RUN", "--output", "no/such/x.html"], 2, "is not a file in a folder that exists"),
        (["RUN", "--outptu", "x"], 2, "did you mean 'output'?"),
    ],
)
def test_wrong_usage_of_the_command(tmp_path, arguments, code, message, capsys):
    run = write_run(tmp_path / "run")
    assert main(["report", *(str(run) if word == "RUN" else word for word in arguments)]) == code
    assert message in capsys.readouterr().err
