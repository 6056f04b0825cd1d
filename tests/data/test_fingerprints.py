from functools import partial
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value

from bondlm.data.fingerprints import data_digest, model_fingerprint, reward_fingerprint, rows_fingerprint
from bondlm.rewards import HTTPReward, RankReward, by_pairs


def test_fingerprints_see_what_matters(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = model_fingerprint(str(tmp_path), None)
    (tmp_path / "notes.txt").write_text("x")
    assert model_fingerprint(str(tmp_path), None) == before
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert model_fingerprint(str(tmp_path), None) != before
    assert model_fingerprint("org/name", "abc") == {"name": "org/name", "revision": "abc"}
    (tmp_path / "r.py").write_text("def f(): ...")
    spec = f"{tmp_path}/r.py:f"
    first = reward_fingerprint(spec)
    (tmp_path / "r.py").write_text("def f(): pass")
    assert reward_fingerprint(spec) != first
    assert (
        reward_fingerprint(f"nli:{tmp_path}?template=flan")["sha256"]
        == model_fingerprint(str(tmp_path), None)["sha256"]
    )
    assert reward_fingerprint("org/model") == {"spec": "org/model"}
    assert rows_fingerprint([{"a": 1, "b": 2}]) == rows_fingerprint([{"b": 2, "a": 1}])
    assert rows_fingerprint([{"a": 1}]) != rows_fingerprint([{"a": 2}])


def test_a_column_that_json_cannot_hold_has_one_digest_and_its_content_counts():
    def with_images(shade):
        pixels = np.full((40, 40, 3), 7, dtype=np.uint8)
        pixels[20, 20] = shade
        features = Features({"prompt": Value("string"), "image": Image()})
        return Dataset.from_dict({"prompt": ["a"], "image": [pixels]}, features=features)

    assert data_digest(with_images(1)) == data_digest(with_images(1)) != data_digest(with_images(2))
    assert rows_fingerprint(list(with_images(1))) == rows_fingerprint(list(with_images(1)))
    one, other = np.zeros(5000), np.zeros(5000)
    other[2500] = 1  # str() leaves the middle out
    assert rows_fingerprint([{"a": one}]) != rows_fingerprint([{"a": other}])
    assert rows_fingerprint([{"a": object()}]) == rows_fingerprint([{"a": object()}])


def test_the_criterion_of_a_judge_and_the_file_of_a_ranking_are_seen(tmp_path):
    for name, spec in (("criterion.txt", "judge:http://127.0.0.1/v1?model=m&prompt={}"), ("f.py", "rank:{}:f")):
        spec = spec.format(tmp_path / name)
        found = [reward_fingerprint(spec)]
        for text in ("one", "two"):
            (tmp_path / name).write_text(text)
            found.append(reward_fingerprint(spec))
        assert len({one.get("sha256") for one in found}) == 3


def test_a_key_in_the_address_of_a_server_is_left_out():
    for spec in ("http://host/score?api_key=hidden&n=1", "judge:http://host/v1?model=m&token=hidden"):
        assert "hidden" not in str(reward_fingerprint(spec))
        assert reward_fingerprint(spec) != reward_fingerprint(spec.replace("host", "other"))


@pytest.mark.parametrize("spec", ["~/r.py:f", "rank:~/r.py:f", "~/rm", "nli:~/rm", "classifier:~/rm?truncate=left"])
def test_files_and_weights_in_the_home_folder_are_seen(spec, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rm").mkdir()
    found = []
    for text in ("one", "two"):
        (tmp_path / "r.py").write_text(text)
        (tmp_path / "rm" / "model.safetensors").write_text(text)
        found.append(reward_fingerprint(spec)["sha256"])
    assert found[0] != found[1]


def scores(completions, **_):
    return [0.0] * len(completions)


class Scorer:
    def __call__(self, completions):
        return [0.0] * len(completions)


def test_a_users_code_is_known_by_its_source_and_no_other():
    for reward, name in ((scores, "scores"), (partial(scores, a=1), "scores"), (Scorer(), "Scorer")):
        found = reward_fingerprint(reward)
        assert found["spec"].endswith(f".{name}")
        assert len(found["sha256"]) == 64
    assert reward_fingerprint(by_pairs(scores)) == reward_fingerprint(scores) == reward_fingerprint(RankReward(scores))
    for other in (lambda completions: [0.0], torch.nn.Linear(1, 1), len, HTTPReward("http://127.0.0.1:1")):
        assert "sha256" not in reward_fingerprint(other)
    assert "MagicMock" in reward_fingerprint(MagicMock())["spec"]  # it has every attribute
