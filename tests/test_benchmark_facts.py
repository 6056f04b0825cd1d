"""Rows of benchmark results say who measured what, and name no folder of one machine."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

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
