"""A run that began at another revision, or with another config, is measured against that start."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from tiny import tiny_causal, tiny_tokenizer

from bondlm.cli import main
from bondlm.models.load import load_model
from bondlm.rollout.sampler import Sampler
from cli.helpers import write_job

NAME, MAIN, OTHER = "org/m", "a" * 40, "b" * 40
STILL: dict[str, Any] = {"learning_rate": 1e-9, "max_steps": 1}  # the policy is its start: any KL is a wrong reference


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of a model with two revisions, whose tokenizers have different templates."""
    folder = tmp_path / "hub" / "models--org--m"
    (folder / "refs").mkdir(parents=True)
    for name, seed, commit in (("main", 0, MAIN), ("v1", 5, OTHER)):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template += f"{{# {name} #}}"
        tiny_causal(tokenizer, seed=seed).save_pretrained(folder / "snapshots" / commit)
        tokenizer.save_pretrained(folder / "snapshots" / commit)
        (folder / "refs" / name).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def embedding(model: Any) -> torch.Tensor:
    weight: torch.Tensor = model.get_input_embeddings().weight
    return weight


def trained(folder: Path, **options: Any) -> Path:
    job = write_job(folder, **STILL, **options)
    if not options.get("use_peft", True):
        job.write_text("".join(line for line in job.read_text().splitlines(keepends=True) if "lora_r" not in line))
    assert main(["train", "--config", str(job)]) == 0
    return folder / "run"


def kl(run: Path, *options: str) -> float:
    out = run.parent / f"out{len(list(run.parent.iterdir()))}"
    reward = f"{next(run.parent.rglob('reward.py'))}:letters"
    asked = ["eval", "--model", str(run), "--reward_funcs", reward, "--output", str(out), "--dtype", "float32"]
    assert main([*asked, "--num_samples", "2", "--num_reference_samples", "4", *options]) == 0
    return abs(float(json.loads((out / "eval.json").read_text())["kl"]["value"]))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("use_peft", [True, False])
def test_a_revision_stays_the_runs_start(tmp_path: Path, use_peft: bool) -> None:
    run = trained(tmp_path, model=NAME, model_init_kwargs={"revision": "v1"}, use_peft=use_peft)
    start = load_model(NAME, dtype=torch.float32, revision="v1")
    assert not torch.equal(embedding(start), embedding(load_model(NAME, dtype=torch.float32)))
    torch.testing.assert_close(embedding(load_model(run, dtype=torch.float32)), embedding(start))
    assert "v1" in (run / "chat_template.jinja").read_text()
    assert kl(run) < 1e-3
    assert kl(run, "--reference", NAME) < 1e-3  # the same, said again
    assert kl(run, "--reference", str(tmp_path / "hub" / "models--org--m" / "snapshots" / MAIN)) > 1
    if use_peft:  # plain PEFT reads it, too
        assert json.loads((run / "adapter_config.json").read_text())["revision"] == "v1"


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_changed_config_stays_the_runs_start(tmp_path: Path, use_peft: bool) -> None:
    kwargs = {"rms_norm_eps": 0.5, "dtype": "float32"}
    run = trained(tmp_path, model_init_kwargs=kwargs, use_peft=use_peft)
    assert kl(run) < 1e-3
    rows = [{"prompt": "Name a colour of the sky."}]
    assert main(["sample", "--model", str(run), "--prompt", rows[0]["prompt"]]) == 0
    plain = Sampler(str(tmp_path / "model"), dtype="float32")
    changed = Sampler(str(tmp_path / "model"), dtype="float32", init_kwargs={"rms_norm_eps": 0.5})
    assert plain.model.config.rms_norm_eps != changed.model.config.rms_norm_eps == 0.5


@pytest.mark.usefixtures("hub")
def test_runs_of_two_revisions_are_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for i, revision in enumerate(["v1", "v1", "main"]):
        (tmp_path / str(i)).mkdir()
        how: dict[str, Any] = {"model": NAME, "model_init_kwargs": {"revision": revision}, "seed": i}
        runs.append(str(trained(tmp_path / str(i), **how)))
    assert main(["merge", *runs, "--output_dir", str(tmp_path / "refused")]) == 2
    assert "revision" in capsys.readouterr().err
    merged = tmp_path / "merged"
    assert main(["merge", *runs[:2], "--output_dir", str(merged), "--reference", NAME]) == 0  # the same, said again
    start = load_model(NAME, dtype=torch.float32, revision="v1")
    assert torch.equal(embedding(load_model(merged, dtype=torch.float32)), embedding(start))
    assert kl(merged, "--dataset", str(tmp_path / "0" / "heldout.jsonl")) < 1e-3
