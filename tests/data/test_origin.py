"""What training says about the origin of scored samples."""

import pytest

from bondlm.config import BONDConfig
from bondlm.data.fingerprints import model_fingerprint
from bondlm.data.origin import Origin, check_origin


def test_the_warning_about_other_rewards_names_no_key() -> None:
    origin = Origin(path="scored.jsonl", model=model_fingerprint("org/model", None), rewards=[])
    with pytest.warns(UserWarning, match="other rewards scored") as caught:
        check_origin(origin, "org/model", "http://127.0.0.1:9/score?api_key=verysecret", BONDConfig())
    assert "verysecret" not in str(caught[0].message)
