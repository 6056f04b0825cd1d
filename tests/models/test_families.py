"""Families of models: exact or refused, as the page of the docs says. Nothing else passes."""

import pytest

from models.families import NAMES
from models.sweep import on_page, verdict

# One of a kind: full attention, windows, experts with noise, recurrent and hybrid, states alone, text of a multimodal
# model, attention that counts columns, relative and absolute encoder-decoders, and one that is refused.
ONE_OF_A_KIND = [
    "llama",
    "gemma2",
    "mixtral",
    "qwen3_next",
    "lfm2",
    "granitemoehybrid",
    "mamba",
    "gemma3",
    "gemma4_text",
]
ONE_OF_A_KIND += ["gpt_neo", "mpt", "falcon", "seed_oss", "t5", "bart", "roberta"]
KNOWN = on_page()


@pytest.mark.parametrize("family", ONE_OF_A_KIND)
def test_one_family_of_a_kind_is_what_the_page_says(family: str) -> None:
    assert verdict(family) == KNOWN[family]
    assert KNOWN[family].verdict == ("refused" if family == "roberta" else "exact")


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(NAMES) - set(ONE_OF_A_KIND)))
def test_every_family_is_exact_or_refused(family: str) -> None:
    found = verdict(family)
    assert found.verdict in ("exact", "refused", "not tried")
    assert found.verdict == KNOWN[family].verdict


def test_the_page_names_every_family_and_no_other() -> None:
    assert set(KNOWN) == set(NAMES)
    assert {v.verdict for v in KNOWN.values()} == {"exact", "refused", "not tried"}
