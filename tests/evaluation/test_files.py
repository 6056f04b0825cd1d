import json

import pytest

from bondlm.errors import ConfigError, DataError
from bondlm.evaluation.files import claim, finished_prompts


def line(prompt, sample=0):
    return json.dumps({"prompt": prompt, "sample": sample, "completion": "a\u2028b\x85\x0b"}, ensure_ascii=False) + "\n"


PROMPTS = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("lines", "done", "kept"),
    [
        ([], 0, 0),
        ([line("a", 0)], 0, 0),
        ([line("a", 0), line("a", 1)], 1, 2),
        ([line("a", 0), line("a", 1), line("b", 0)], 1, 2),
        ([line("a", 0), line("a", 1), line("b", 0), line("b", 1)[:-1]], 1, 2),
        ([line("a", 0), line("a", 1), line("b", 0), '{"prompt": "b"'], 1, 2),
        ([line(p, i) for p in PROMPTS for i in range(2)], 3, 6),
    ],
)
def test_whole_prompts_count_and_the_rest_is_cut_off(tmp_path, lines, done, kept):
    path = tmp_path / "s.jsonl"
    path.write_text("".join(lines), encoding="utf-8", newline="")
    assert finished_prompts(path, PROMPTS, 2) == done
    assert path.read_text(
        encoding="utf-8",
    ) == "".join(lines[:kept])


def test_rows_of_other_prompts_are_refused(tmp_path):
    path = tmp_path / "s.jsonl"
    assert finished_prompts(path, PROMPTS, 2) == 0
    path.write_text(line("a") + line("b"))
    with pytest.raises(DataError, match=r"s\.jsonl:2: .*prompt 0"):
        finished_prompts(path, PROMPTS, 2)
    path.write_text("".join(line(p) for p in [*PROMPTS, "d"]))
    with pytest.raises(DataError, match=r"s\.jsonl:4: .*prompt 3"):
        finished_prompts(path, PROMPTS, 1)


def test_a_manifest_guards_the_samples_and_nothing_else(tmp_path):
    claim(tmp_path, {"seed": 1}, ["s.jsonl"])
    claim(tmp_path, {"seed": 2}, ["s.jsonl"])  # no sample yet: nothing to protect
    (tmp_path / "s.jsonl").write_text("")
    claim(tmp_path, {"seed": 2}, ["s.jsonl"])
    with pytest.raises(ConfigError, match=r"seed: 2 -> 3.*s\.jsonl"):
        claim(tmp_path, {"seed": 3}, ["s.jsonl"])
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        claim(tmp_path, {"seed": 2}, ["s.jsonl"])


def test_another_programs_manifest_is_refused_and_kept(tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(ConfigError, match=r"manifest\.json' was not written by an evaluation"):
        claim(tmp_path, {"policy": {"name": "m"}, "seed": 1}, ["policy.jsonl"])
    assert (tmp_path / "manifest.json").read_text() == '{"name": "a web page"}'


def test_a_model_that_was_moved_is_the_same_by_its_weights(tmp_path):
    (tmp_path / "policy.jsonl").touch()
    before = {"policy": {"name": "m", "sha256": "a0"}, "reference": {"name": "hub/m", "revision": "1"}}
    (tmp_path / "manifest.json").write_text(json.dumps(before))
    moved = before | {"policy": {"name": "/runs/m", "sha256": "a0"}}
    claim(tmp_path, moved, ["policy.jsonl"])
    for other in ({"policy": {"name": "m", "sha256": "b1"}}, {"reference": {"name": "hub/n", "revision": "1"}}):
        with pytest.raises(ConfigError, match="another evaluation"):
            claim(tmp_path, before | other, ["policy.jsonl"])
