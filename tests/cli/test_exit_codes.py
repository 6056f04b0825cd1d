"""Errors that no command expects, and the codes that they end with."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from bondlm.cli import main
from bondlm.runs.folder import is_main_process


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nDetails"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"),
        OSError(errno.ENOSPC, "No space left"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
    ],
    ids=["Python", "GPU", "CPU", "disk", "quota", "file size"],
)
def test_what_is_spent_is_code_7(error, monkeypatch, capsys):
    def run(options):
        raise error

    monkeypatch.setattr("bondlm.cli.sample.run", run)
    assert main(["sample", "--model", "x"]) == 7
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("command", ["sample", "score", "eval", "prefer", "merge", "report"])
def test_commands_that_would_do_all_work_in_each_process_are_refused_in_several(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command]) == 2
    assert f"bondlm {command} runs in one process, but WORLD_SIZE=2" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "1")  # left behind by a launcher
    assert is_main_process()
    assert main([command]) == 2
    assert "WORLD_SIZE" not in capsys.readouterr().err


def test_another_runtime_error_is_not_a_lack_of_memory(monkeypatch):
    def run(options):
        raise RuntimeError("a bad memory")

    monkeypatch.setattr("bondlm.cli.sample.run", run)
    with pytest.raises(RuntimeError, match="a bad memory"):
        main(["sample", "--model", "x"])


@pytest.mark.parametrize("code", [0, "go away"])
def test_code_that_leaves_does_not_look_like_success(code, monkeypatch, capsys):
    """A module of rewards, say, that calls sys.exit while it is imported."""

    def run(options):
        raise SystemExit(code)

    monkeypatch.setattr("bondlm.cli.sample.run", run)
    assert main(["sample", "--model", "x"]) == 1
    assert f"sys.exit({code!r})" in capsys.readouterr().err


OUTPUT_OF = {
    "sample": "make_console().print('one')",  # as answers and tables are
    "check": "say_json({})",
    "--help": "",
}


@pytest.mark.parametrize("command", OUTPUT_OF)
def test_output_that_nothing_reads_any_more_ends_a_command_without_a_word(command):
    program = f"""
import sys
from bondlm.cli import main, sample, check
from bondlm.cli.console import make_console, say_json

def run(options):
    {OUTPUT_OF[command] or "pass"}
    return 0

sample.run = check.run = run
sys.argv[1:] = [{command!r}]
sys.exit(main())
"""
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, b"")
