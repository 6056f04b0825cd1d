"""Tables as text: one precision per column, nothing but what is known."""

from bondlm.report.read import read_runs
from bondlm.report.tables import estimates, plain, tables, warnings
from report.helpers import interval, write_run

UNKNOWN = ("distinct_2", "completions/clipped_ratio")


def test_a_column_has_the_decimals_of_its_widest_interval():
    assert estimates([interval(0.5, 0.002), interval(1.25, 0.25), None]) == [
        "0.50 [0.50, 0.50]",
        "1.25 [1.00, 1.50]",
        "–",
    ]


def test_a_number_that_is_small_beside_its_column_keeps_two_digits():
    assert estimates([interval(0.0712, 0.004), interval(0.0, 0.03), interval(13.0, 50.0)]) == [
        "0.071 [0.067, 0.075]",
        "0.000 [-0.030, 0.030]",
        "13 [-37, 63]",
    ]


def test_each_judge_is_written_on_its_own_scale(tmp_path):
    judges = {
        "rouge_l": {"reward": interval(0.252, 0.012), "reference_reward": interval(0.2, 0.01)},
        "length": {"reward": interval(120.0, 40.0), "reference_reward": interval(90.0, 30.0)},
    }
    run = write_run(tmp_path / "run", change={"judges": judges})
    assert tables(read_runs([run]))["judges"].rows == [
        ["rouge_l", "0.252 [0.240, 0.264]", "0.200 [0.190, 0.210]"],
        ["length", "120 [80, 160]", "90 [60, 120]"],
    ]


def test_numbers_of_a_column_have_the_same_decimals():
    assert plain([38.0, 41.32, None, 1234.5]) == ["38.0", "41.3", "–", "1,234.5"]
    assert plain([3e-7, 2.0]) == ["3e-07", "2"]


def test_a_column_without_a_value_is_left_out(tmp_path):
    baselines = {"reference": {"reward": interval(1.0, 0.1)}, "reference, greedy": {"reward": interval(1.2, 0.1)}}
    run = write_run(
        tmp_path / "run", change={"baselines": baselines, "distinct_2": None, "completions/clipped_ratio": None}
    )
    header = tables(read_runs([run]))["baselines"].header
    assert not {"distinct-2", "cut off"} & set(header)
    assert header[:2] == ["sampled from", "effective N"]  # the policy has one


def test_warnings_name_their_run_where_there_are_several(tmp_path):
    runs = [write_run(tmp_path / name, change={"warnings": ["too few prompts"]}) for name in "ab"]
    assert warnings(read_runs(runs[:1])) == ["too few prompts"]
    assert warnings(read_runs(runs)) == ["a: too few prompts", "b: too few prompts"]
