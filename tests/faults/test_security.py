"""Rows X1 to X11 of the fault matrix: nothing that was downloaded runs, nothing leaves the run folder."""

import ast
import json
import os
import re
import shlex
import shutil
import struct
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import tiny_causal, tiny_tokenizer

from bondlm.cli import main
from bondlm.cli.eval import complete
from bondlm.cli.options import parse
from bondlm.errors import CheckpointError, ConfigError
from bondlm.models.load import load_model
from bondlm.report.safe import script_json, visible
from bondlm.runs.checkpoint import load_tensors
from bondlm.runs.manifest import MANIFEST_FILE, fault, seal
from bondlm.runs.redact import redact, redacted
from faults.children import job, said, train

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "bondlm"


class Hostile:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_x1_a_pickled_model_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    tiny_causal(tiny_tokenizer()).config.save_pretrained(tmp_path / "model")
    for name in ("pytorch_model.bin", "adapter_model.bin"):
        torch.save(Hostile(marker), tmp_path / "model" / name)
    with pytest.raises(ConfigError, match=r"/model'.*model\.safetensors"):
        load_model(tmp_path / "model", dtype=torch.float32)
    tiny_causal(tiny_tokenizer()).save_pretrained(tmp_path / "base")
    (tmp_path / "model" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")})
    )
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors"):
        load_model(tmp_path / "model", dtype=torch.float32)
    assert not marker.exists()
    torch.load(tmp_path / "model" / "pytorch_model.bin", weights_only=False)  # the trap works
    assert marker.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt"])
@pytest.mark.parametrize("sealed", [False, True])
def test_x1_a_pickled_checkpoint_is_not_run(name: str, sealed: bool, copy: Path) -> None:
    """Not with the wrong hash, and not where the stranger has sealed it himself."""
    marker = copy.parent / "marker"
    path = copy.parent / "run" / "checkpoint-2"
    torch.save(Hostile(marker), path / name)
    if sealed:
        (path / MANIFEST_FILE).unlink()
        seal(path)
        assert fault(path) is None
        shutil.rmtree(path.parent / "checkpoint-3")
    code = train(copy, lambda: None, "--resume", str(path))
    assert code == 6, said(copy)
    assert (f"{name} has" in said(copy)) is not sealed
    assert not marker.exists()


def test_x1_no_checkpoint_holds_a_pickle_of_the_settings(straight: Path) -> None:
    assert not list((straight.parent / "run").rglob("training_args.bin"))


def test_x2_code_that_comes_with_a_model_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job(tmp_path / "job")
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "completion": "c"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, marker = tmp_path / "job" / "model", tmp_path / "marker"
    (model / "modeling_x.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    content = json.loads((model / "config.json").read_text())
    content |= {"model_type": "x", "auto_map": {"AutoConfig": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.M"}}
    (model / "config.json").write_text(json.dumps(content))
    # transformers asks "Do you wish to run the custom code? [y/N]" of whoever has not said False.
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    for command in (
        ["train", "--config", str(config)],
        ["sample", "--model", str(model), "--prompt", "x"],
        ["sft", "--model", str(model), "--train_dataset", str(tmp_path / "rows.jsonl")],
        ["reward-model", "--model", str(model), "--train_dataset", str(tmp_path / "rows.jsonl")],
    ):
        own = [] if command[0] in ("train", "sample") else ["--output_dir", str(tmp_path / command[0])]
        assert main(command + own) == 2
        said = capsys.readouterr().err
        assert "trust_remote_code" in said
        assert "hf.co" not in said  # nor does it advise to run the code
        assert "trust_remote_code=True" not in said
        assert not marker.exists()
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_model(model, dtype=torch.float32, trust_remote_code=True)
    given = yaml.safe_load(config.read_text()) | {"model_init_kwargs": {"trust_remote_code": True}}
    config.write_text(yaml.safe_dump(given))  # a stranger's config may not ask for it either
    assert main(["train", "--config", str(config)]) == 2
    assert "model_init_kwargs={'trust_remote_code': True}: " in capsys.readouterr().err
    assert not marker.exists()


# Classes of PEFT and our own: they have no such argument.
WITHOUT_CODE = ("GenerationConfig", "PeftConfig", "PeftModel", "reward_class")


def test_x2_no_source_trusts_remote_code() -> None:
    loads = 0
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr == "from_pretrained" and ast.unparse(node.func.value) not in WITHOUT_CODE:
                    loads += 1  # without it transformers asks on the terminal, and a "y" in a pipe is a yes
                    assert "trust_remote_code" in {word.arg for word in node.keywords}, f"{path}:{node.lineno}"
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), f"{path}: trust_remote_code is not a constant"
                assert node.value.value is False, f"{path}: trust_remote_code"
            if isinstance(node, ast.Dict):
                keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
                assert "trust_remote_code" not in keys, path
    assert loads, "no call of from_pretrained was found, so nothing was checked"


@pytest.mark.parametrize("code", ["!!python/object/apply:os.system ['touch {marker}']", "!!python/name:os.system"])
def test_x3_yaml_with_code(code: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "run.yaml").write_text("model: " + code.format(marker=marker))
    with pytest.raises(ConfigError, match=r"run\.yaml.*YAML"):
        parse("train", ["--config", str(tmp_path / "run.yaml")])
    with pytest.raises(ConfigError, match=r"--beta .*YAML"):
        parse("train", ["--beta", code.format(marker=marker)])
    assert not marker.exists()


@pytest.mark.parametrize("name", ["_target_", "__reduce__", "learning_rat"])
def test_x3_unknown_keys_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"option '{name}'"):
        parse("train", [f"--{name}", "1"])


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "", "x" * 81, "a\nb"])
def test_x4_a_run_name_that_leads_elsewhere(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = job(tmp_path / "job", run_name=name)
    assert main(["train", "--config", str(config)]) == 2
    assert "run_name=" in capsys.readouterr().err


def test_x4_a_linked_output_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = job(tmp_path / "job")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "job" / "run").symlink_to(tmp_path / "elsewhere")
    assert main(["train", "--config", str(config)]) == 2
    assert re.search(f"output_dir='{tmp_path / 'job' / 'run'}' .*link", capsys.readouterr().err)
    assert not list((tmp_path / "elsewhere").iterdir())


GIANT = struct.pack("<Q", 1 << 62) + b"{}"
LONG = struct.pack("<Q", 200_000_000) + b"{}" + b" " * 1000


def overlapping() -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(8)


@pytest.mark.parametrize("content", [GIANT, LONG, overlapping(), b"\xff" * 9, b""])
def test_x5_hostile_safetensors(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "anchor.safetensors"
    path.write_bytes(content)
    loaded: list[Any] = []
    with pytest.raises(CheckpointError, match=r"anchor\.safetensors"):
        load_tensors(path, loaded.append)
    assert not loaded


def test_x6_hostile_completions_are_escaped() -> None:
    hostile = "</script><script>alert(1)</script>\x1b]0;owned\x07\u202e<!--\u2028"
    text = script_json([hostile])
    assert not {"<", ">", "&", "\u2028"} & set(text)
    assert json.loads(text) == [hostile]
    shown = visible(hostile)
    assert "\\x1b" in shown
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)
    assert not list(SOURCE.rglob("*csv*"))  # none is written


def test_x6_an_error_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model", "\x1b]0;owned\x07\u202e", "--nonsense\x1b[2J", "1"]) == 2
    error = capsys.readouterr().err
    assert "\\x1b[2J" in error
    assert not {"\x1b", "\x07", "\u202e"} & set(error)


SECRETS = {
    "address": "https://user:hunter2secret@rewards.example/score",
    "address taken for a path": "https:/user:hunter2secret@rewards.example/score",
    "query": "http://127.0.0.1/score?api_key=hunter2secret&n=1",
    "token in a query": "http://127.0.0.1/score?access_token=hunter2secret",
    "header": "Authorization: Bearer hunter2secret.abc",
    "hub": "hf_hunter2secrethunter2secret",
}


@pytest.mark.parametrize("text", SECRETS.values(), ids=SECRETS.keys())
def test_x7_secrets_are_redacted(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "hunter2" not in redact(text)
    assert "hunter2" not in json.dumps(redacted({"reward_funcs": [text], "nested": {"hub_token": "hunter2"}}))
    assert main(["train", "--model", text, "--nonsense", "1"]) == 2
    assert main(["sample", "--model", text, "--prompt", "x"]) == 2
    captured = capsys.readouterr()
    assert "hunter2" not in captured.out + captured.err
    for option in ("--api-key hunter2", "['--api-key=hunter2', '-x']", "['--api-key', 'hunter2', '--n', '4']"):
        assert "hunter2" not in redact(option)
        assert redact(option).endswith(option[-4:]) or option.endswith("hunter2")
    given = {"vllm_server_args": ["--api-key", "hunter2", "--max-num-seqs", "4"]}
    assert redacted(given) == {"vllm_server_args": ["--api-key", "<secret>", "--max-num-seqs", "4"]}
    for plain in (
        "reward of 3 tokens",
        "--max-model-len 512 --tokens 4",
        "a/b@main",
        "nli:models/t5?template=true",
        "basic English words",
    ):
        assert redact(plain) == plain


KEYS = (
    "sk-proj-Ab3dEf6hIj9lMn2pQr5tUv8xYz1bCd4f-gH7jKl0nOp3rSt6vWx9zAb2d_EfGhIjKlMnOpQrStUvWx",
    "sk-ant-api03-Ab3dEf6hIj9lMn2pQr5tUv8xYz1bCd4fgH7jKl0nOp3rSt6vWx9zAb2d-AA",
    "sk-or-v1-0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
    "sk-lf-1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed",
    "sk-T3BlbkFJAb3dEf6hIj9lMn2pQr5tUv8xYz1bCd4fgH7jKl0n",
    "hf_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh",
    "ghp_Ab3dEf6hIj9lMn2pQr5tUv8xYz1bCd4fgH7j",
    "github_pat_11ABCDEFG0abcdefghijkl_0123456789abcdefghijklmnopqrstuvwxyz0123456789abcdefghijklm",
    "xoxb-123456789012-1234567890123-AbCdEfGhIjKlMnOpQrStUvWx",
)


def test_x7_a_name_that_begins_as_a_key_does_is_kept_and_a_key_is_hidden_there_too() -> None:
    settings = {
        "model": "org/sk-mistral-7b-instruct-v2",
        "eval_dataset": {"main": "data/sk-wikipedia-prompts-2024.jsonl", "other": "data/hf_ultrafeedback_prompts.csv"},
        "reward_funcs": ["rewards/sk-vyhodnotenie-otazky.py:length"],
        "output_dir": "runs/sk-tiny-llama-20241129123000-v2",
        "chat_template_kwargs": {"eos_token": "</s>"},
    }
    assert redacted(settings) == settings
    for key in KEYS:
        assert redact(f"x {key}") == "x <secret>"
        for name in ("model", "train_dataset", "judges"):
            assert redacted({name: [f"org/{key}"]}) == {name: ["org/<secret>"]}


def test_x7_a_traceback_holds_no_secret(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(options: Any) -> int:
        raise ZeroDivisionError("https://me:hunter2@host/\x1b[2J")

    monkeypatch.setattr("bondlm.cli.sample.run", fails)
    monkeypatch.setattr(sys, "argv", ["bondlm", "sample", "--model", "m"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # pytest gives it back
    with pytest.raises(ZeroDivisionError) as caught:
        main()
    sys.excepthook(caught.type, caught.value, caught.tb)
    error = capsys.readouterr().err
    assert "in fails" in error
    assert "hunter2" not in error
    assert "\x1b" not in error


def test_x7_no_file_of_a_run_holds_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_hunter2secrethunter2secret")
    config = job(tmp_path / "job", max_steps=1, logging_dir=None)
    given = yaml.safe_load(config.read_text())
    given.pop("logging_dir")
    reward = Path(str(given["reward_funcs"]).rpartition(":")[0])
    odd = reward.with_name("access_token=hunter2secret&x.py")
    given["reward_funcs"] = f"{reward.rename(odd)}:letters"
    config.write_text(yaml.safe_dump(given | {"hub_token": "hunter2"}))
    assert train(config) == 2
    assert re.search("hub_token.*HF_TOKEN", said(config))
    config.write_text(yaml.safe_dump(given | {"hub_model_id": "https://me:hunter2@hub/x"}))
    assert train(config) == 0, said(config)
    assert train(config) == 0, said(config)  # what was redacted is still the same setting
    files = [path for path in (tmp_path / "job" / "run").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert b"me:hunter2" not in path.read_bytes(), path
        assert b"hf_hunter2" not in path.read_bytes(), path


@pytest.mark.parametrize("option", ["reward_funcs", "judges"])
def test_x9_code_that_a_run_folder_names_is_not_run(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not only code that lies in it: a function of Python's own library can do all that a stranger wants."""
    run = tmp_path / "stranger"
    run.mkdir()
    (run / "evil.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    for spec in (
        "subprocess:getoutput",
        f"{run}/evil.py:f",
        f"{tmp_path}/mine.py:f",
        "stranger.evil:f",
        "https://stranger.example/score",  # gets the prompts of a file that the config names, and our token
    ):
        settings = {"model": "m", "eval_dataset": "d", "reward_funcs": "org/reward", option: ["nli:models/t5", spec]}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
        with pytest.raises(ConfigError, match=f" --{option} "):
            complete({"model": str(run)})
        assert main(["eval", "--model", str(run)]) == 2
        advice = shlex.split(f"--{option}" + capsys.readouterr().err.rpartition(f"--{option}")[2])
        assert complete(parse("eval", ["--model", str(run), *advice]))[0][option] == ["nli:models/t5", spec]
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {option: ["similarity:models/minilm"]}))
    assert complete({"model": str(run)})[0][option] == ["similarity:models/minilm"]  # a model is data


def test_x11_dependencies_have_floors() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = {d.split(">=")[0]: d.split(">=")[1] for d in project["dependencies"]}
    assert tuple(map(int, floors["torch"].split("."))) >= (2, 10)  # CVE-2025-32434, CVE-2026-24747
    assert all(floors.values())
