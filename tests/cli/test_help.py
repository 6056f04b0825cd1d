"""What the commands say of themselves: every option once, in a group, with its default, on 80 columns."""

import dataclasses
import re

import pytest
import yaml
from transformers import TrainingArguments

from bondlm import BONDConfig
from bondlm.cli import main
from bondlm.cli.help import GROUPS, OF_TRANSFORMERS, WIDTH, bond_fields, command_help, greeting, main_help
from bondlm.cli.options import COMMANDS, TRAIN
from bondlm.config import DEFAULTS

BASE = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
OF_COMMAND = {"output_dir": "runs/bond", "save_total_limit": 2}  # `bondlm train` gives these


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_fits_a_terminal(command: str | None) -> None:
    text = main_help() + greeting() if command is None else command_help(command)
    assert max(map(len, text.splitlines())) <= WIDTH


def test_every_option_of_train_is_there_once_with_its_default() -> None:
    changed = {f.name for f in dataclasses.fields(BONDConfig) if f.name not in BASE or f.default != BASE[f.name]}
    fields = bond_fields()
    assert changed <= set(fields)
    assert {field.section for field in fields.values()} <= set(GROUPS)
    text = command_help("train")
    names = re.findall(r"^  --(\w+)", text, re.M)
    assert sorted(names) == sorted({*fields, *TRAIN, *OF_TRANSFORMERS})
    for name in {*fields, *OF_TRANSFORMERS}:
        entry = " ".join(re.split(rf"^  --{name}\b", text, flags=re.M)[1].split("\n  --")[0].split())
        default = DEFAULTS[name]
        assert "default" in entry.lower() or default is None, name
        said = re.search(r"Default: (\S+?)\.?(?: |$)", entry)
        if name in fields and default is not None and said and "default" not in fields[name].text.lower():
            assert yaml.safe_load(said[1]) == default, name


def test_the_defaults_that_are_said_of_transformers_fields_are_theirs() -> None:
    for name, text in OF_TRANSFORMERS.items():
        word = re.search(r"Default: '?([\w./-]+?)'?[.,]?(?: |$)", text)[1]  # type: ignore[index]
        said = word if name == "eval_strategy" else yaml.safe_load(word)
        if said != "logging_steps":  # of eval_steps, which transformers fills in
            assert (said or None) == (OF_COMMAND.get(name, BASE[name]) or None), name
        else:
            assert name == "eval_steps"


def test_groups_come_in_order_and_alone_the_command_greets(capsys: pytest.CaptureFixture[str]) -> None:
    heads = [line[:-1] for line in command_help("train").splitlines() if re.fullmatch(r"[a-z ]+:", line)]
    assert heads == list(GROUPS)
    assert main([]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^  bondlm (\w+)", out, re.M) == ["check", "train", "sample"]
