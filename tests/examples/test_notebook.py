"""The notebook's cells, in order, with a tiny model: what it shows is there, and plain PEFT loads what it saves."""

import json
from pathlib import Path

import pytest
from tiny import tiny_causal, tiny_tokenizer

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    tokenizer = tiny_tokenizer(chat=True)
    tiny_causal(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, value in {"MODEL": tmp_path / "model", "RUN": tmp_path / "run", "STEPS": 2}.items():
        monkeypatch.setenv(name, str(value))
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "a notebook is committed without its outputs"
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    printed = capsys.readouterr().out
    assert "best of 8:" in printed
    assert printed.count("  trained:") == 3
    assert names["trainer"].state.global_step == 2
    assert (tmp_path / "run" / "report.html").is_file()
    assert names["model"].peft_config["default"].r == 8
