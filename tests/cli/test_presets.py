import pytest

from bondlm.cli import main
from bondlm.cli.options import parse
from bondlm.cli.presets import PRESETS, with_preset
from bondlm.config import BONDConfig
from bondlm.errors import ConfigError


def test_a_preset_fills_in_what_is_not_set_and_nothing_else(monkeypatch):
    monkeypatch.setitem(PRESETS, "quick", {"eta": 0.3, "beta": 0.8})
    # 0.02 is BONDConfig's own default: set by the user, it stays.
    assert with_preset({"preset": "quick", "eta": 0.02}) == {"preset": "quick", "eta": 0.02, "beta": 0.8}
    assert with_preset({"eta": 0.02}) == {"eta": 0.02}


def test_the_command_line_fills_it_in_below_the_file(monkeypatch, tmp_path):
    monkeypatch.setitem(PRESETS, "quick", {"eta": 0.3, "beta": 0.8, "gamma": 1.0})
    (tmp_path / "c.yaml").write_text("preset: quick\nbeta: 0.7\n")
    options = parse("train", ["--config", str(tmp_path / "c.yaml"), "--gamma", "0"])
    assert (options["eta"], options["beta"], options["gamma"]) == (0.3, 0.7, 0)


def test_fast_fits_what_is_trained_and_how_the_anchor_moves():
    whole, lora = with_preset({"preset": "fast"}), with_preset({"preset": "fast", "use_peft": True})
    assert whole["eta"] == lora["eta"] == 0.3
    assert whole["learning_rate"] < lora["learning_rate"]
    fixed = with_preset({"preset": "fast", "objective": "bond", "anchor": "fixed"})
    assert "eta" not in fixed  # refused as unused, though the user has not set it
    own = with_preset({"preset": "fast", "objective": "self_bond"})
    assert "eta" not in own
    for settings in (fixed, own):
        del settings["preset"]
        BONDConfig(output_dir="unused", **settings)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_schedule_without_warmup_gets_none_from_a_preset(schedule):
    settings = with_preset({"preset": "fast", "lr_scheduler_type": schedule})
    assert ("warmup_steps" in settings) == (schedule == "cosine")
    del settings["preset"]
    BONDConfig(output_dir="unused", **settings)


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_a_valid_config(name, tmp_path):
    BONDConfig(output_dir=str(tmp_path), **PRESETS[name])


def test_an_unknown_preset_is_refused(capsys):
    with pytest.raises(ConfigError, match=r"preset='fats': .*paper, fast"):
        with_preset({"preset": "fats"})
    assert main(["train", "--preset", "fats"]) == 2
    assert "preset='fats'" in capsys.readouterr().err
