import json

import pytest

from bondlm.report.safe import script_json, visible


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
