"""The page as text: its numbers, what it escapes, how large it is."""

import html
import json
import re
import time
from html.parser import HTMLParser

import pytest

from bondlm.errors import ConfigError
from bondlm.report import write_report
from bondlm.report.numbers import estimate
from report.helpers import eval_json, sample_rows, write_jsonl, write_run

ALLOWED_SCRIPTS = 2  # the data block and the page's own script


class Page(HTMLParser):
    """Rows of each table by id, text by class, script contents, and every address that the page names."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.texts, self.scripts, self.addresses, self.tags = {}, {}, [], [], []
        self._open, self._table, self._attributes = [], None, {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data", "srcset")]
        if tag == "table":
            self._table = self.tables.setdefault(attributes.get("id"), [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")
        elif tag == "script":
            self.scripts.append("")
        self._open.append((tag, attributes.get("class")))

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass
        if tag == "table":
            self._table = None

    def handle_data(self, data):
        tag = self._open[-1][0] if self._open else ""
        if tag == "script":
            self.scripts[-1] += data
        if tag in ("td", "th"):
            self._table[-1][-1] += data
        inside = {kind for _, kind in self._open if kind}
        for kind in inside:
            self.texts[kind] = self.texts.get(kind, "") + data


def page_of(*folders, **options):
    return Page(write_report(list(folders), **options).read_text(encoding="utf-8"))


def data_of(page):
    return json.loads(page.scripts[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "jbond")


@pytest.fixture(scope="module")
def page(run):
    return page_of(run)


def test_the_headline_says_n_its_interval_and_the_price(page):
    assert page.texts["headline"] == "One sample = Best-of-6.3 [5.0, 7.6], at 1.4x the KL that Best-of-6.3 needs."


def test_numbers_of_the_page_are_those_of_eval_json(run, page):
    result = json.loads((run / "eval.json").read_text())
    for name in ("effective_n", "win_rate", "kl", "reward"):
        assert estimate(result[name]) in page.texts["tile"]
    measures = dict(page.tables["measures"])
    assert measures["effective N, matched on reward"] == "6.8 [5.3, 8.3]"
    assert measures["KL to the reference (k3)"] == estimate(result["kl_k3"])
    assert measures["KL of Best-of-N"] == "0.999"
    rows = {row[0]: row[1:] for row in page.tables["baselines"][1:]}
    assert set(rows) == {"policy", *result["baselines"]}
    assert rows["reference, greedy"] == [
        "2.9 [2.5, 3.3]",
        "0.744 [0.724, 0.764]",
        "1.487 [1.457, 1.517]",
        "38.0",
        "7%",
        "0.84",
    ]
    assert rows["reference, best of 8"][2] == "1.778 [1.758, 1.798]"
    assert page.tables["judges"][1] == [
        "nli:small",
        "0.620 [0.590, 0.650]",
        "0.660 [0.640, 0.680]",
        "0.470 [0.440, 0.500]",
    ]
    assert page.tables["pairwise-1"][1:] == [
        ["reference", "0.620 [0.570, 0.670]"],
        ["reference, best of 4", "0.510 [0.460, 0.560]"],
    ]
    assert "decided 83% of 380 pairs alike in both orders; 3 were not ranked" in page.texts["soft"]
    assert [row[0] for row in page.tables["against"][1:]] == [f"Best-of-{n}" for n in (1, 2, 4, 8, 16)]
    assert "likely over-optimisation <b>" in page.texts["warning"]  # the parser undid the escapes
    assert dict(page.tables["versions"])["torch"] == "2.13.0"


def test_the_json_beside_it_holds_eval_json_unchanged(run, page):
    numbers = json.loads((run / "report.json").read_text())
    assert numbers["runs"][0]["eval"] == json.loads((run / "eval.json").read_text())
    steps = [point["step"] for point in numbers["runs"][0]["evaluations"]]
    assert steps == [10, 20, 30, 40, 200]


def test_the_evaluation_of_earlier_weights_is_at_their_step(tmp_path):
    folder = write_run(tmp_path / "best")
    result = json.loads((folder / "eval.json").read_text()) | {"steps": 30, "last_step": 40}
    (folder / "eval.json").write_text(json.dumps(result))
    page_of(folder)
    points = json.loads((folder / "report.json").read_text())["runs"][0]["evaluations"]
    assert [point["step"] for point in points] == [10, 20, 30, 30, 40]  # the path of the KL plane does not run back
    assert points[3]["kl"] == result["kl"]


def test_figures_are_files_and_in_the_page(run, page):
    names = {
        "best-of-n",
        "kl-plane",
        "reward-plane",
        "quantiles",
        "training-reward",
        "training-kl",
        "training-effective-n",
    }
    names |= {"training-penalty", "phases"}
    for end in ("svg", "png"):
        assert {path.stem for path in (run / "figures").glob(f"*.{end}")} == names
    assert page.tags.count("svg") == len(names)
    assert (run / "figures" / "phases.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_fetched_from_anywhere(run, page):
    text = (run / "report.html").read_text()
    assert all(address.startswith(("#", "data:,")) for address in page.addresses)
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert len(page.scripts) == ALLOWED_SCRIPTS


def test_samples_are_all_there_with_their_rewards(run, page):
    (data,) = data_of(page)
    rows = [json.loads(line) for line in (run / "eval_samples.jsonl").read_bytes().splitlines()]
    assert data["best"] == "Best-of-8"
    for shown, row in zip(data["rows"], rows, strict=True):
        assert shown[0] == row["prompt"]
        for i, key in enumerate(("reference", "reference_best_of_8", "policy")):
            assert shown[1 + 2 * i] == row[key]["text"]
            assert shown[2 + 2 * i] == pytest.approx(row[key]["reward"], rel=1e-5)


HOSTILE = (
    "<script>alert(1)</script> </script><!-- \x1b[31mred \u2028 \u202eevil \ud800 $x$ <img src=x onerror=alert(1)>"
)


def test_hostile_text_stays_text(tmp_path):
    run = write_run(tmp_path / "<img src=x onerror=alert(1)> $a_b$")
    rows = sample_rows(3)
    rows[1]["policy"]["text"] = rows[1]["prompt"] = HOSTILE
    write_jsonl(run / "eval_samples.jsonl", rows)
    result = eval_json()
    result["judges"] = {"<script>x</script>": result["judges"]["nli:small"]}
    result["pairwise"] = {"<script>x</script>": result["pairwise"]["judge"]}
    result["warnings"] = ["\x1b[31m</p><script>y</script>"]
    result["versions"] = {"{{ 7 * 7 }}": "<iframe>"}
    (run / "eval.json").write_text(json.dumps(result))
    (run / "config.yaml").write_text("model: </pre><script>z</script>\n")
    page = page_of(run)
    assert len(page.scripts) == ALLOWED_SCRIPTS
    assert not {"img", "iframe"} & set(page.tags)
    for char in "<>&\u2028":
        assert char not in page.scripts[0]
    shown = data_of(page)[0]["rows"][1]
    assert shown[0] == shown[5]
    assert shown[5].startswith(
        "<script>alert(1)</script> </script><!-- \\x1b[31mred \\u2028 \\u202eevil \\ud800 $x$ <img"
    )
    assert "\\x1b[31m</p><script>y</script>" in page.texts["warning"]
    assert dict(page.tables["versions"])["{{ 7 * 7 }}"] == "<iframe>"


def test_a_token_of_the_config_is_not_published(run, page, tmp_path):
    text = (run / "report.html").read_text()
    assert "hf_verysecret" not in text
    assert "hub_token: &lt;secret&gt;" in text
    config = "model: org/model\nmy_client_secret: hunter2\naccess_key: hunter2\nreward_funcs: http://me:hunter2@host/\n"
    other = write_run(tmp_path / "other")
    (other / "config.yaml").write_text(config)
    assert "hunter2" not in write_report([other]).read_text()
    assert "eta: 0.05" in text


def test_a_thousand_prompts_make_a_page_under_5_mb_soon(tmp_path):
    run = write_run(tmp_path / "run")
    write_jsonl(run / "eval_samples.jsonl", sample_rows(1000, words=150))
    start = time.perf_counter()
    path = write_report([run])
    assert time.perf_counter() - start < 60
    assert path.stat().st_size < 5_000_000
    (data,) = data_of(Page(path.read_text()))
    assert len(data["rows"]) == 1000


def test_what_does_not_fit_is_cut_and_said(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", prompts=100)
    monkeypatch.setattr("bondlm.report.samples.BUDGET", 60_000)
    path = write_report([run])
    assert path.stat().st_size < 400_000
    (data,) = data_of(Page(path.read_text()))
    text = html.unescape(path.read_text())
    assert all(len(row[1]) <= 250 + len(" […]") for row in data["rows"])
    assert "only 1 of every 2 prompts is here and texts are cut at 250 characters" in text
    assert len(data["rows"]) == 50
    assert data["rows"][1][0].startswith("Prompt 2:")


def keys_of(*runs):
    return [[row[7] for row in data["rows"]] for data in data_of(page_of(*runs, output=runs[0].parent / "p.html"))]


def test_runs_on_the_same_prompts_share_a_prompt_by_its_place_else_by_its_whole_text(tmp_path, monkeypatch):
    same = {"prompts_sha256": "a1"}
    runs = [write_run(tmp_path / name, change=same) for name in "ab"]
    rows = [row | {"prompt": "go on"} for row in sample_rows(3)]  # of three conversations
    for run in runs:
        write_jsonl(run / "eval_samples.jsonl", rows)
    assert keys_of(*runs) == [[0, 1, 2], [0, 1, 2]]
    other = write_run(tmp_path / "c", change={"prompts_sha256": "b2"})
    start = "An instruction with examples. " * 20
    rows = [row | {"prompt": f"{start}{text}"} for row, text in zip(rows, ("x", "y", "y"), strict=True)]
    write_jsonl(other / "eval_samples.jsonl", list(reversed(rows)))
    write_jsonl(runs[0] / "eval_samples.jsonl", rows)
    monkeypatch.setattr("bondlm.report.samples.CUTS", (250,))
    assert keys_of(runs[0], other) == [[0, None, None], [None, None, 0]]


def test_several_runs_are_compared(tmp_path):
    runs = [write_run(tmp_path / name, n=n) for name, n in (("a", 6.3), ("b", 4.2), ("c", 2.4))]
    page = page_of(*runs, output=tmp_path / "compare.html")
    rows = page.tables["runs"][1:]
    assert [row[:2] for row in rows] == [["a", "6.3 [5.0, 7.6]"], ["b", "4.2 [2.9, 5.5]"], ["c", "2.4 [1.1, 3.7]"]]
    assert [row[4] for row in rows] == ["1.4"] * 3
    assert [data["name"] for data in data_of(page)] == ["a", "b", "c"]
    assert (tmp_path / "compare.json").is_file()
    assert (tmp_path / "compare-figures" / "kl-plane.svg").read_text().count(">b<") == 1
    assert not (runs[0] / "report.html").exists()


def test_runs_with_other_rewards_references_or_prompts_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a", "b", "c")]
    assert "do not compare" not in str(page_of(*runs, output=tmp_path / "same.html").texts)
    others = {"rewards": ["<other>"], "num_prompts": 7, "prompts_sha256": "2"}
    changes = ({"prompts_sha256": "1"}, others, {"reference": "org/base"})
    for run, change in zip(runs, changes, strict=True):
        result = json.loads((run / "eval.json").read_text())
        (run / "eval.json").write_text(json.dumps(result | change))
    page = page_of(*runs, output=tmp_path / "compare.html")
    assert (
        "a and b differ in their rewards (similarity:all-minilm-l6-v2, reward.py:complete; <other>)"
        in page.texts["warning"]
    )
    assert "a and b differ in their held-out prompts (200 prompts; 7 prompts)" in page.texts["warning"]
    assert "a and c differ in their reference (org/model; org/base)" in page.texts["warning"]
    assert len(json.loads((tmp_path / "compare.json").read_text())["differences"]) == 3


def test_runs_that_combine_the_same_rewards_in_other_ways_do_not_compare(tmp_path):
    """Their rewards have the same names, and a sum of 8.42 stands beside a rank of 0.49."""
    runs = [write_run(tmp_path / name) for name in ("a", "b", "c")]
    ways = [
        {"reward_weights": [1.0, 0.5], "reward_aggregation": "sum"},
        {"reward_weights": [1.0, 1.0], "reward_aggregation": "sum"},
        {"reward_weights": [1.0, 0.5], "reward_aggregation": "worst"},
    ]
    for run, way in zip(runs, ways, strict=True):
        (run / "eval.json").write_text(json.dumps(json.loads((run / "eval.json").read_text()) | way))
    warning = page_of(*runs, output=tmp_path / "compare.html").texts["warning"]
    hit = "their mean rewards, win rates and effective N do not compare"
    assert f"a and b differ in the weights of their rewards (1.0, 0.5; 1.0, 1.0): {hit}" in warning
    assert f"a and c differ in how their rewards are combined (sum; worst): {hit}" in warning
    assert len(json.loads((tmp_path / "compare.json").read_text())["differences"]) == 2


def test_other_prompts_of_the_same_number_and_other_lengths_do_not_compare(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a", "b", "c")]
    sets = ({"dataset": "a.jsonl", "prompts_sha256": "1"}, {"dataset": ["b.jsonl", "c.jsonl"], "prompts_sha256": "2"})
    changes = [change | {"max_completion_length": length} for change, length in zip(sets, (64, 64), strict=True)]
    for run, change in zip(runs, [*changes, changes[0] | {"dataset": None, "max_completion_length": 32}], strict=True):
        result = json.loads((run / "eval.json").read_text())
        (run / "eval.json").write_text(json.dumps(result | change))
    warning = page_of(*runs, output=tmp_path / "compare.html").texts["warning"]
    assert "a and b differ in their held-out prompts (a.jsonl, 200 prompts; b.jsonl, c.jsonl, 200 prompts)" in warning
    assert "a and c differ in the maximum length of their answers (64; 32): their numbers do not compare" in warning
    assert len(json.loads((tmp_path / "compare.json").read_text())["differences"]) == 2


def test_an_opponent_is_among_the_measures(tmp_path):
    run = write_run(tmp_path)
    result = eval_json() | {
        "opponent": {"win_rate": {"value": 0.61, "low": 0.55, "high": 0.67}},
        "opponent_model": "a<b",
    }
    (run / "eval.json").write_text(json.dumps(result))
    assert ["win rate against a<b", "0.610 [0.550, 0.670]"] in page_of(run).tables["measures"]


def test_the_reward_plane_has_the_curve_and_every_run(tmp_path):
    runs = [write_run(tmp_path / name, n=n) for name, n in (("a", 6.3), ("b", 4.2))]
    page_of(*runs, output=tmp_path / "compare.html")
    drawn = (tmp_path / "compare-figures" / "reward-plane.svg").read_text()
    assert [drawn.count(f">{text}<") for text in ("a", "b", "mean reward", "Best-of-N of the reference")] == [1] * 4
    assert ">16<" in drawn  # the orders along the line


def test_a_run_that_kept_earlier_weights_says_its_steps_and_theirs(tmp_path):
    ending = {"steps": 40, "last_step": 60, "planned_steps": 60}
    run = write_run(tmp_path / "best", change=ending)
    assert "Trained for 60 steps. The weights are those of step 40, the best." in page_of(run).texts["soft"]
    stopped = write_run(tmp_path / "goal", change=ending | {"planned_steps": 100, "stopped": "kl_budget"})
    assert "Trained for 60 of 100 steps; stopped: kl_budget. The weights" in page_of(stopped).texts["soft"]
    page = page_of(run, stopped, output=tmp_path / "both.html")
    assert {row[page.tables["runs"][0].index("steps")] for row in page.tables["runs"][1:]} == {"60"}


def test_only_the_contract_is_needed(tmp_path):
    run = tmp_path / "old"
    run.mkdir()
    result = {name: eval_json()[name] for name in ("effective_n", "win_rate", "kl", "reward")}
    (run / "eval.json").write_text(json.dumps(result))
    page = page_of(run)
    assert page.texts["headline"] == "One sample = Best-of-6.3 [5.0, 7.6]."
    assert page.scripts == []
    assert page.tags.count("svg") == 1


def test_numbers_that_are_not_finite_are_dashes_and_n_beyond_the_samples_is_said(tmp_path):
    run = write_run(tmp_path / "run")
    result = eval_json()
    result["effective_n"] = {"value": None, "low": 12.1, "high": None, "text": "> 16 [12.1, > 16]"}
    result["kl_k3"] = {"value": None, "low": None, "high": None}
    result["curve"][3]["reward"] = {"value": float("nan"), "low": float("nan"), "high": float("inf")}
    result["baselines"]["policy, greedy"]["effective_n"] = {"value": None, "low": None, "high": None, "text": "> 16"}
    (run / "eval.json").write_text(json.dumps(result))
    page = page_of(run)
    assert page.texts["headline"] == "One sample = Best-of-N with N > 16 [12.1, > 16]."
    assert dict(page.tables["measures"])["KL to the reference (k3)"] == "–"
    needed = f"at least {result['kl_of_best_of_n']:.3g}"
    assert dict(page.tables["measures"])["KL of Best-of-N"] == needed
    assert f"Best-of-N needs {needed}" in page.texts["tiles"]
    html = " ".join((run / "report.html").read_text(encoding="utf-8").split())
    assert "Best-of-N of the reference costs at least 281 tokens: at least 6.81 times as many" in html
    assert "NaN" not in (run / "report.json").read_text()


def test_the_same_run_gives_the_same_page(run, page):
    first = (run / "report.html").read_bytes()
    write_report([run])
    assert (run / "report.html").read_bytes() == first


@pytest.mark.parametrize("name", ["eval.html", "env.html", "manifest.htm", "adapter_config.html", "config.yaml"])
def test_no_other_file_of_the_run_is_overwritten(tmp_path, name):
    run = write_run(tmp_path)
    (run / "adapter_config.json").write_text('{"r": 8}')
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match=re.escape(f"output='{run / name}'")):
        write_report([run], run / name)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_report_may_be_written_again(tmp_path):
    run = write_run(tmp_path)
    first = write_report([run], run / "mine.html")
    assert write_report([run], run / "mine.html") == first
    assert "runs" in json.loads((run / "mine.json").read_text())
