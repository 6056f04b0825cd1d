"""What a run says of its engine."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from tiny import prompt_rows, tiny_causal, tiny_t5, tiny_tokenizer

from bondlm import BONDTrainer
from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.engines import choose
from bondlm.engines.choose import (
    PROBE_ANSWER,
    PROBE_TEXT,
    check_vllm_can,
    engine_choice,
    probe_ids,
    server_options,
    share_of,
)
from bondlm.errors import ConfigError
from bondlm.models.adapters import wrap_adapter
from engines.vllm.helpers import TOKENIZER, config, length, trainer
from engines.vllm.stub import Stub, serving


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "auto", "device": torch.device("cpu")}, "16 times slower on CPUs"),
        ({"engine": "auto", "device": torch.device("cuda")}, "9 to 11 times slower on an H200"),
        ({"engine": "auto", "device": torch.device("mps")}, "compared only on CPUs and CUDA, not on mps"),
        ({"engine": "transformers", "device": torch.device("cpu")}, "engine: transformers$"),
        ({"engine": "vllm", "vllm_server": "auto"}, "a server of this run, which never sleeps$"),
        (
            {"engine": "vllm", "vllm_server": "auto", "device": torch.device("cuda")},
            "a server of this run, which sleeps while it learns$",
        ),
        ({"engine": "vllm", "vllm_server": "external"}, "engine: vllm, the server at vllm_base_url$"),
        (
            {"engine": "vllm", "vllm_server": "external", "vllm_base_url": ["http://a", "http://b"]},
            "engine: vllm, 2 servers at vllm_base_url$",
        ),
    ],
)
def test_the_choice_is_said_with_its_reason_for_this_device(settings: dict[str, Any], said: str) -> None:
    args: Any = SimpleNamespace(
        **{"vllm_base_url": "http://a", "vllm_sleep": "auto", "device": torch.device("cpu")} | settings
    )
    assert re.search(said, engine_choice(args))


@pytest.mark.parametrize("option", ["--port 8123", "--port=8123", "--host=0.0.0.0", "--ssl_keyfile k", "--api-key k"])
def test_options_that_hide_the_runs_own_server_are_refused(option: str, tmp_path: Path) -> None:
    """It waited for its own port until vllm_start_timeout."""
    args = config(tmp_path, vllm_server="auto", vllm_server_args=["--max-num-seqs", "4", *option.split()])
    name = option.replace("=", " ").replace("_", "-").split()[0]
    advice = "VLLM_API_KEY" if name == "--api-key" else "remove it"
    with pytest.raises(ConfigError, match=f"^vllm_server_args: {name} .*{advice}"):
        check_vllm_can(args, tiny_causal(TOKENIZER))


@pytest.mark.parametrize(
    ("make", "peft_config", "message"),
    [
        (tiny_t5, None, "encoder-decoder.*engine='transformers'"),
        (tiny_causal, IA3Config(target_modules=["v_proj"], feedforward_modules=[]), "IA3.*engine='transformers'"),
        (tiny_causal, LoraConfig(target_modules=["v_proj"], use_dora=True), "plain LoRA.*engine='transformers'"),
        (
            tiny_causal,
            LoraConfig(target_modules=["v_proj"], modules_to_save=["lm_head"]),
            "plain LoRA.*modules_to_save",
        ),
        (tiny_causal, LoraConfig(target_modules=["v_proj"], init_lora_weights="olora"), "init_lora_weights"),
    ],
)
def test_what_vllm_cannot_do_is_refused(tmp_path: Path, make: Any, peft_config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BONDTrainer(
            *(make(TOKENIZER), length, config(tmp_path), prompt_rows(4)),
            processing_class=TOKENIZER,
            peft_config=peft_config,
        )


def test_a_context_too_short_is_refused_before_training(tmp_path: Path) -> None:
    model = wrap_adapter(tiny_causal(TOKENIZER), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with serving(Stub(model, [2], max_model_len=8)) as small:
        # The probe itself may be cut by a real server; here only the prompts are too long.
        with pytest.raises(ConfigError, match=r"\b8 tokens.*max-model-len"):
            trainer(tmp_path, small)


def test_processes_share_the_servers_out() -> None:
    assert [share_of("a", rank, 3) for rank in range(3)] == [["a"]] * 3
    assert [share_of(["a", "b"], rank, 3) for rank in range(3)] == [["a"], ["b"], ["a"]]
    assert [share_of(list("abcde"), rank, 2) for rank in range(2)] == [["a", "c", "e"], ["b", "d"]]


def test_options_of_our_server(tmp_path: Path) -> None:
    options = server_options(
        torch.bfloat16, 24, config(tmp_path, vllm_server="auto", vllm_server_args=["--max-model-len", "512"])
    )
    assert " ".join(options) == (
        "--dtype bfloat16 --enable-lora --max-loras 3 --max-lora-rank 32 --generation-config vllm "
        "--logprobs-mode processed_logprobs --enforce-eager --no-enable-chunked-prefill --max-model-len 512"
    )


def test_adapters_on_an_fp32_base_are_refused_on_a_gpu(tmp_path: Path) -> None:
    """vLLM's LoRA kernels there assert bf16 or fp16 at the first request, minutes after the start."""
    of_gpu: Any = SimpleNamespace(device=torch.device("cuda"), vllm_server_args=None)
    with pytest.raises(ConfigError, match=r"float32.*dtype: bfloat16"):
        server_options(torch.float32, 8, of_gpu)
    assert "--enable-lora" in server_options(torch.bfloat16, 8, of_gpu)


def test_our_server_serves_the_revision_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it has no way to serve another config than the one on file."""
    tiny_causal(TOKENIZER).save_pretrained(tmp_path / "model")
    started: list[list[str]] = []

    def start(python: str, model: str, options: list[str], **how: Any) -> None:
        started.append(options)
        raise ConfigError("started")

    def make(**kwargs: Any) -> None:
        args = config(tmp_path / "run", vllm_server="auto", model_init_kwargs=kwargs)
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        how: dict[str, Any] = {"processing_class": TOKENIZER, "peft_config": adapter}
        BONDTrainer(str(tmp_path / "model"), length, args, prompt_rows(4), **how)

    monkeypatch.setattr(choose, "LocalServer", start)
    with pytest.raises(ConfigError, match="started"):
        make(revision="v1", attn_implementation="sdpa", use_cache=True, attention_dropout=0.0)
    assert started[0][:2] == ["--revision", "v1"]
    with pytest.raises(ConfigError, match=r"model_init_kwargs\.rms_norm_eps"):
        make(revision="v1", rms_norm_eps=0.5)


def test_a_model_that_cannot_be_trained_is_refused_before_a_server_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConfigError("a noisy model")

    def start(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr("bondlm.trainer.check_model", refuse)
    monkeypatch.setattr("bondlm.trainer.make_engine", start)
    with pytest.raises(ConfigError, match="noisy"):
        BONDTrainer(*(tiny_causal(TOKENIZER), length, config(tmp_path), prompt_rows(4)), processing_class=TOKENIZER)


@pytest.mark.parametrize("has_bos", [False, True])
def test_the_probe_text_is_a_question_as_the_runs_prompts_are_with_an_answer(has_bos: bool) -> None:
    """With the token that a text begins with, where the model has one: some models are noisy without."""
    tokenizer = tiny_tokenizer(adds_bos=has_bos)
    model = tiny_causal(tokenizer)
    encoder = PromptEncoder.of_model(model, tokenizer, max_completion_length=8)
    (question,) = encoder.encode([PROBE_TEXT])
    start = [tokenizer.bos_token_id] if has_bos and question[0] != tokenizer.bos_token_id else []
    answer = tokenizer.encode(PROBE_ANSWER, add_special_tokens=False)
    assert probe_ids(encoder) == [*start, *question, *answer][:128]
