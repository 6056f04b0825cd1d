"""Rows of benchmark results say who measured what, and name no folder of one machine."""

import ast
import json
import re
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPTS = ("peers", "roofline", "tricks", "vllm", "step", "t5_step", "warm", "overoptimised")


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import facts

    return facts


def test_a_row_has_command_commit_machine_and_versions(
    facts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/x.py", "--model", str(tmp_path / "some model"), "--threads", "1"])
    for number in (1, 2):
        facts.append(str(tmp_path / "new" / "x.jsonl"), {"number": number})
    rows = [json.loads(line) for line in (tmp_path / "new" / "x.jsonl").read_text().splitlines()]
    assert [row["number"] for row in rows] == [1, 2]
    assert rows[0]["command"] == "python benchmarks/x.py --model 'some model' --threads 1"
    assert re.fullmatch(r"[0-9a-f]{12}\+?|unknown", rows[0]["commit"])
    assert rows[0]["machine"]["cores"] >= 1
    assert rows[0]["machine"]["ram_gib"] > 0
    assert {"python", "torch", "transformers"} <= set(rows[0]["versions"])
    assert str(tmp_path) not in json.dumps(rows)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_writes_its_rows_with_the_facts(name: str) -> None:
    code = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
    assert f'add_out(parser, "{name}")' in code
    assert "append(args.out, " in code


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.stem)
def test_what_a_script_imports_from_the_package_is_there(path: Path) -> None:
    """Scripts run by hand, and import within functions: a module that moves is not missed elsewhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bondlm":
            module = import_module(str(node.module))
            for name in (alias.name for alias in node.names):
                found = hasattr(module, name) or find_spec(f"{node.module}.{name}") is not None
                assert found, f"line {node.lineno}: {node.module} has no {name}"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's count of this process")
def test_memory_is_counted_from_what_the_loaded_model_holds(facts: Any) -> None:
    """It was counted from the peak of making the model, which work that fits below it did not exceed."""
    growth = import_module("growth")
    args = SimpleNamespace(hidden=64, layers=1, dtype="bfloat16")
    model = growth.llama(args, 64, longest=8)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    high = torch.ones(2**27)  # 0.5 GiB
    del high
    held = growth.held_gib()
    work = torch.ones(2**25)
    assert 0.12 < growth.peak_gib() - held < 0.2
    del work
