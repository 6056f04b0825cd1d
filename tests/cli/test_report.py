"""`bondlm report`."""

import re
import sys

import pytest
from report.helpers import write_run

from bondlm.cli import main


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
    assert re.search(r"matplotlib.*pip install 'bondlm\[report\]'", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "`bondlm report RUN`"),
        (["no/such"], 2, "'no/such'"),
        (["RUN", "--output", "no/such/x.html"], 2, "output='no/such/x.html'"),
        (["RUN", "--outptu", "x"], 2, "'output'"),
    ],
)
def test_wrong_usage_of_the_command(tmp_path, arguments, code, message, capsys):
    run = write_run(tmp_path / "run")
    assert main(["report", *(str(run) if word == "RUN" else word for word in arguments)]) == code
    assert message in capsys.readouterr().err
