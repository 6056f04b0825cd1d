"""The commands of docs/using.md that serve a run with vLLM, on the CPU: it answers as the run does."""

import json
import re
import shlex
from pathlib import Path

import httpx
import pytest
from cli.helpers import write_job
from tiny import tiny_causal, tiny_tokenizer

from bondlm.cli import main
from bondlm.engines.vllm.server import LocalServer
from engines.vllm.test_real import PYTHON, pytestmark  # noqa: F401 (the marks of a test with a real server)

PAGE = (Path(__file__).parents[3] / "docs" / "using.md").read_text(encoding="utf-8")
MODULE = "python -m vllm.entrypoints.openai.api_server"


def options_of_page(base: str, run: str) -> list[str]:
    """What stands behind the base's name in the command of the page."""
    (command,) = re.findall(rf"^{MODULE} (.*?)\n```", PAGE, re.M | re.S)
    words = shlex.split(command.replace("\\\n", " ").replace("runs/qwen", run).replace("Qwen/Qwen3-0.6B", base))
    assert words[:2] == ["--model", base]
    return words[2:]


def test_the_served_adapter_answers_as_the_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_job(tmp_path, output_dir="run", max_steps=2, learning_rate=0.05, eval_dataset=None)
    tokenizer = tiny_tokenizer()
    tiny_causal(tokenizer, hidden=128).save_pretrained("model")  # vLLM's attention on CPU wants heads of 32
    assert main(["train", "--config", str(config)]) == 0
    question = [{"role": "user", "content": "How do I boil an egg?"}]
    expected = {}
    for name in ("run", "model"):
        (tmp_path / "one.jsonl").write_text('{"prompt": [{"role": "user", "content": "How do I boil an egg?"}]}\n')
        greedy = ["--temperature", "0", "--max_completion_length", "8", "--output", f"{name}.jsonl"]
        assert main(["sample", "--model", name, "--dataset", "one.jsonl", "--dtype", "float32", *greedy]) == 0
        rows = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        expected[name] = json.loads(rows[0])["completion"]
    assert expected["run"] != expected["model"]
    on_cpu = ["--dtype", "float32", "--enforce-eager"]
    base = str(tmp_path / "model")
    options = options_of_page(base, str(tmp_path / "run"))
    server = LocalServer(PYTHON, base, [*options, *on_cpu], log=tmp_path / "log", start_timeout=200, on_cpu=True)
    try:
        for name, model in (("run", "bond"), ("model", base)):
            body = {"model": model, "messages": question}
            url = f"{server.url}/v1/chat/completions"
            answer = httpx.post(url, json=body | {"temperature": 0}, timeout=60).json()["choices"][0]
            # vLLM leaves out a character that the length cuts in two.
            assert answer["message"]["content"].rstrip("\ufffd") == expected[name].rstrip("\ufffd")
            sampled = httpx.post(url, json=body, timeout=60).json()  # with nothing said: as the run was evaluated
            assert sampled["usage"]["completion_tokens"] <= 8
    finally:
        server.stop()
