"""`bondlm check` on a tiny model."""

import torch

from bondlm.cli import main
from cli.helpers import write_job


def test_check_takes_a_dry_step_and_changes_nothing(tmp_path, capsys):
    config = write_job(tmp_path)
    assert main(["check", "--config", str(config)]) == 0
    out = capsys.readouterr().out
    assert "check passed" in out
    assert f"torch {torch.__version__.split('+')[0]}" in out
    assert "bond/penalty_rate" in out
    assert not (tmp_path / "run").exists()
    assert main(["check", "--config", str(config), "--reward_funcs", f"{tmp_path}/reward.py:broken"]) == 4
