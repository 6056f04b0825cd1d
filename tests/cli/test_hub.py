"""What the commands send to a hub: nothing before there is a model card, and no texts unless asked."""

from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi

from bondlm.cli import main
from bondlm.errors import ConfigError
from bondlm.training.saving import _asking_the_hub
from cli.helpers import write_job


class Hub:
    """Keeps what would have been made and sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        self.sent: list[set[str]] = []
        monkeypatch.setattr(HfApi, "create_repo", self.create)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload)

    def create(self, name: str, **how: Any) -> Any:
        self.made.append(name)
        return SimpleNamespace(repo_id=name)

    def upload(self, *, folder_path: Path, ignore_patterns: list[str], **how: Any) -> None:
        files = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        self.sent.append({name for name in files if not any(fnmatch(name, pattern) for pattern in ignore_patterns)})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


def test_check_never_touches_a_hub(tmp_path: Path, hub: Hub) -> None:
    config = write_job(tmp_path, push_to_hub=True, hub_model_id="me/model")
    assert main(["check", "--config", str(config)]) == 0
    assert (hub.made, hub.sent) == ([], [])


def test_train_uploads_once_with_the_card_and_without_texts(tmp_path: Path, hub: Hub) -> None:
    config = write_job(tmp_path, push_to_hub=True, hub_model_id="me/model", save_steps=1, max_steps=2)
    assert main(["train", "--config", str(config)]) == 0
    assert hub.made == ["me/model"]
    (sent,) = hub.sent
    assert {"README.md", "adapter_model.safetensors", "tokenizer.json", "eval.json", "metrics.jsonl"} <= sent
    assert not [name for name in sent if "samples" in name or name.startswith((".lock", ".sealed", "checkpoint-"))]
    assert "report.html" not in sent
    assert "Best-of-" in (tmp_path / "run" / "README.md").read_text()
    assert main(["train", "--config", str(config), "--hub_samples", "true", "--allow_config_change"]) == 0
    assert {"samples.jsonl", "eval_samples.jsonl", "report.html"} <= hub.sent[1]


def test_a_hub_that_refuses_is_one_sentence_before_any_step(tmp_path: Path, hub: Hub, monkeypatch: Any, capsys: Any):
    def refuse(api: Any, name: str, **how: Any) -> Any:
        raise OSError("401 Unauthorized\nmore")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    assert main(["train", "--config", str(write_job(tmp_path, push_to_hub=True))]) == 2
    assert "push_to_hub" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    """Its error is the HTTP library's own."""
    with pytest.raises(ConfigError, match=r"push_to_hub: the repository 'me/x' cannot be written"):
        with _asking_the_hub("me/x"):
            HfApi(endpoint="http://127.0.0.1:9").create_repo("me/x", token="none")
    with pytest.raises(ZeroDivisionError), _asking_the_hub("me/x"):
        1 / 0  # noqa: B018
