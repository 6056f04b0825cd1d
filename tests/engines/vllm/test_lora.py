"""The client of vLLM against a stub server: what is sent, and a server's faults. A real one: test_real.py."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from tiny import PROMPTS, prompt_rows, tiny_causal, tiny_t5, tiny_tokenizer

from bondlm import BONDConfig, BONDTrainer
from bondlm.engines import Completion, RemoteEngine
from bondlm.engines.agreement import GAP_METRIC, logprob_gap, padded_logprobs
from bondlm.engines.choose import server_options
from bondlm.engines.local.engine import TransformersEngine
from bondlm.engines.vllm.http import ATTEMPTS, VLLMClient
from bondlm.engines.vllm.lora import VLLMEngine
from bondlm.engines.vllm.server import LocalServer
from bondlm.errors import BondError, ConfigError, DataError, EngineError, NonFiniteError, ResourceError
from bondlm.models.load import wrap_lora
from bondlm.models.roles import Roles
from engines.vllm.stub import Answer, Stub, first, serving, slow

TOKENIZER = tiny_tokenizer()
EOS = list(range(0, 300, 9))
IDS = [TOKENIZER.encode(prompt) for prompt in PROMPTS[:4]]
SEEDS = [11, 12, 13, 14]
PROBE = TOKENIZER.encode("a text that server and trainer are compared by")
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def change(roles: Roles, size: float) -> None:
    """Move the policy's adapter as a step of an optimizer would."""
    with torch.no_grad():
        for name, parameter in roles.model.named_parameters():
            if f".{roles.policy_adapter}." in name and parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)


@pytest.fixture
def roles() -> Roles:
    torch.manual_seed(0)
    made = Roles(wrap_lora(tiny_causal(TOKENIZER), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])))
    change(made, 0.1)  # policy and anchor differ
    return made


@pytest.fixture
def stub(roles: Roles) -> Iterator[Stub]:
    with serving(Stub(roles.model, EOS)) as made:
        yield made


def connect(stub: Stub, roles: Roles, folder: Path, timeout: float = 20.0) -> VLLMEngine:
    client = VLLMClient(stub.url, timeout=timeout, max_wait=0.02)
    adapters: Any = {"policy": roles.policy_adapter, "anchor": "anchor"}
    return VLLMEngine(client, roles.model, adapters, roles.use, eos_ids=EOS, probe_ids=PROBE, folder=folder)


@pytest.fixture
def engine(stub: Stub, roles: Roles, tmp_path: Path) -> VLLMEngine:
    return connect(stub, roles, tmp_path)


def draw_both(engine: VLLMEngine) -> Any:
    return engine.generate_roles(IDS, {"policy": (2, SEEDS), "anchor": (3, SEEDS)}, max_new_tokens=6)


# -- what is sent, and what comes back


def test_each_role_draws_from_its_own_adapter(engine: VLLMEngine, roles: Roles) -> None:
    """The same tokens and log-probabilities as in this process, in order, from seeds that the server gets."""
    drawn = draw_both(engine)
    here = TransformersEngine(roles.use, eos_ids=EOS, pad_id=0)
    for role, count in (("policy", 2), ("anchor", 3)):
        expected = here.generate(IDS, count, role=role, max_new_tokens=6, seeds=[s >> 2 for s in SEEDS])  # type: ignore[arg-type]
        assert [[c.ids for c in row] for row in drawn[role]] == [[c.ids for c in row] for row in expected]
        for ours, theirs in zip(drawn[role], expected, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
                assert one.finished == other.finished
    assert drawn["policy"][0][0] != drawn["anchor"][0][0]
    assert isinstance(engine, RemoteEngine)


def test_the_law_is_not_cut(engine: VLLMEngine, stub: Stub) -> None:
    """What a server may take from the model's generation_config.json is set off in every request."""
    draw_both(engine)
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    for body in stub.drawn():
        assert {name: body[name] for name in neutral} == neutral
        assert body["ignore_eos"] is True
        assert body["stop_token_ids"] == EOS
    assert {b["model"] for b in stub.drawn()} == {"bondlm-policy", "bondlm-anchor"}


def test_policy_and_anchor_are_under_way_together(engine: VLLMEngine, stub: Stub) -> None:
    arrived: list[str] = []

    def all_at_once(path: str, body: Any) -> Answer | None:
        """Answers when every prompt of each role has asked: whoever waits for an answer first never gets one."""
        arrived.append(body["model"])
        end = time.monotonic() + 20
        while len(arrived) < 8 and time.monotonic() < end:
            time.sleep(0.005)
        return None if len(arrived) == 8 else (400, "one after the other")

    stub.fault = all_at_once
    draw_both(engine)
    assert len(arrived) == 8
    assert stub.most_in_flight == 8


def test_every_version_has_a_folder_and_a_salt_of_its_own(
    engine: VLLMEngine, stub: Stub, roles: Roles, tmp_path: Path
) -> None:
    """Else vLLM would go on with prefix-cache blocks of the old weights."""
    draw_both(engine)
    change(roles, 0.05)
    engine.sync()
    draw_both(engine)
    paths = [body["lora_path"] for body in stub.bodies("/v1/load_lora_adapter")]
    assert len(set(paths)) == len(paths) == 4
    salts = {(body["model"], body["cache_salt"]) for body in stub.drawn()}
    assert len(salts) == 4
    assert {str(p) for p in tmp_path.iterdir()} == set(paths[-2:])  # the old ones are removed


# -- faults that pass


@pytest.mark.parametrize("answer", [(500, "oops"), (503, {"error": {"message": "busy"}}), (200, "reset")])
def test_a_fault_that_passes_is_ridden_out(engine: VLLMEngine, stub: Stub, answer: Answer) -> None:
    expected = draw_both(engine)
    stub.fault = first(ATTEMPTS - 1, answer)
    assert draw_both(engine) == expected


# -- faults that do not


def spoil_choice(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def spoil(answer: dict[str, Any]) -> None:
        if "token_ids" in answer["choices"][0]:
            answer["choices"][0] |= changes

    return spoil


def nan_logprob(answer: dict[str, Any]) -> None:
    for choice in answer["choices"]:
        if "logprobs" in choice:
            choice["logprobs"]["token_logprobs"][0] = float("nan")


def drop_last_token(answer: dict[str, Any]) -> None:
    for choice in answer["choices"]:
        if choice.get("finish_reason") == "stop":
            choice["token_ids"].pop()
            choice["logprobs"]["token_logprobs"].pop()


def lose_a_sample(answer: dict[str, Any]) -> None:
    if "token_ids" in answer["choices"][0]:
        answer["choices"].pop()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (nan_logprob, NonFiniteError, "log-probability"),
        (drop_last_token, EngineError, "without an end-of-sequence|sent 0 tokens"),
        (lose_a_sample, EngineError, "sent 1 samples, 2 were asked"),
        (spoil_choice(prompt_token_ids=[1, 2]), EngineError, "another prompt"),
        (spoil_choice(token_ids=[5000], logprobs={"token_logprobs": [-1.0]}), EngineError, "outside the vocabulary"),
        (spoil_choice(logprobs={"token_logprobs": [-1.0] * 99}), EngineError, "99 log-probabilities"),
        (spoil_choice(token_ids=[0, 1, 0], logprobs={"token_logprobs": [-1.0] * 3}), EngineError, "went on after"),
        (spoil_choice(token_ids=None), EngineError, "no 'token_ids'"),
        (lambda answer: answer.clear(), EngineError, "no choices"),
    ],
)
def test_an_answer_that_is_wrong_is_not_learned_from(
    engine: VLLMEngine, stub: Stub, spoil: Any, error: type[BondError], message: str
) -> None:
    stub.spoil = spoil
    with pytest.raises(error, match=message):
        engine.generate(IDS, 2, role="policy", max_new_tokens=6, seeds=SEEDS)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ((500, "EngineDeadError"), ResourceError, "HTTP 500.*EngineDeadError"),
        ((200, "reset"), ResourceError, "no answer"),
        ((400, {"error": {"message": "the prompt is too long"}}), ConfigError, "the prompt is too long"),
        ((401, ""), ConfigError, "VLLM_API_KEY"),
        ((200, "<html>"), EngineError, "not JSON"),
    ],
)
def test_a_server_that_fails_is_an_error_soon(
    engine: VLLMEngine, stub: Stub, answer: Answer, error: type[BondError], message: str
) -> None:
    stub.fault = first(10**9, answer)
    begin = time.monotonic()
    with pytest.raises(error, match=message):
        draw_both(engine)
    assert time.monotonic() - begin < 5


def test_a_server_that_is_slow_is_an_error_soon(stub: Stub, roles: Roles, tmp_path: Path) -> None:
    engine = connect(stub, roles, tmp_path, timeout=0.5)
    stub.fault = slow(3)
    begin = time.monotonic()
    with pytest.raises(ResourceError, match=r"within 0.5 s.*vllm_timeout"):
        draw_both(engine)
    assert time.monotonic() - begin < 2.5  # one answer's time limit, and one retry's


def test_a_prompt_longer_than_the_context_is_not_sent(engine: VLLMEngine, stub: Stub) -> None:
    before = len(stub.requests)
    with pytest.raises(DataError, match=r"prompt 1 has 300 tokens.*256"):
        engine.generate([IDS[0], [5] * 300], 1, role="policy", max_new_tokens=4, seeds=[1, 2])
    assert len(stub.requests) == before


# -- stale weights


def ignore_reloads(times: int) -> Callable[[str, Any], Answer | None]:
    return first(times, (200, "ok"), "/v1/load_lora_adapter")


def test_a_reload_that_did_nothing_is_caught(engine: VLLMEngine, stub: Stub, roles: Roles) -> None:
    change(roles, 1e-3)  # far below what a gap of 0.5 nats would show
    stub.fault = ignore_reloads(10**9)
    with pytest.raises(EngineError, match=r"policy.*reload did nothing") as caught:
        engine.sync()
    assert caught.value.exit_code == 5


def test_a_reload_is_tried_twice(engine: VLLMEngine, stub: Stub, roles: Roles) -> None:
    change(roles, 1e-3)
    stub.fault = ignore_reloads(1)
    engine.sync()
    assert engine.probe_gap["policy"] < 1e-4


def test_small_stale_moves_add_up(engine: VLLMEngine, stub: Stub, roles: Roles) -> None:
    """Each move is below what a server in 16 bits must follow; all together are not."""
    engine._noise = 1e-2
    stub.fault = ignore_reloads(10**9)
    change(roles, 3e-4)
    engine.sync()  # not seen yet

    def go_on() -> None:
        for _ in range(500):
            change(roles, 3e-4)
            engine.sync()

    with pytest.raises(EngineError, match="reload did nothing"):
        go_on()


def test_weights_that_have_not_moved_are_not_stale(engine: VLLMEngine) -> None:
    for _ in range(3):
        engine.sync()


def test_other_weights_are_caught(engine: VLLMEngine, stub: Stub, roles: Roles) -> None:
    stub.fault = ignore_reloads(10**9)
    change(roles, 3.0)
    with pytest.raises(EngineError, match="differ by"):
        engine.sync()


def test_a_probe_that_is_not_finite_is_an_error(engine: VLLMEngine, stub: Stub) -> None:
    def spoil(answer: dict[str, Any]) -> None:
        row = answer["choices"][0]["prompt_logprobs"][1]
        row[next(iter(row))]["logprob"] = float("nan")

    stub.spoil = spoil
    with pytest.raises(NonFiniteError, match="bondlm-policy"):
        engine.sync()


# -- before training


def test_a_server_with_another_model_is_refused(roles: Roles, tmp_path: Path) -> None:
    other = Roles(wrap_lora(tiny_causal(TOKENIZER, seed=7), LORA))
    with serving(Stub(other.model, EOS)) as stub, pytest.raises(ConfigError, match="another model"):
        connect(stub, roles, tmp_path)


def test_a_server_that_is_down_is_refused_with_the_command(roles: Roles, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stub = Stub(roles.model, EOS)
    stub.url = f"http://127.0.0.1:{port}"
    with pytest.raises(ConfigError, match=rf"To start one by hand:.*api_server.*--port {port}"):
        connect(stub, roles, tmp_path)


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("/v1/models", (200, {"data": []}), "is this a vLLM server"),
        ("/v1/models", (404, "nothing here"), "nothing here"),
        ("/v1/load_lora_adapter", (404, {"detail": "Not Found"}), "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        (
            "/v1/load_lora_adapter",
            (500, {"error": {"message": "LoRA rank 32 is greater than max_lora_rank 16."}}),
            "LoRA rank 32 is greater.*--max-lora-rank",
        ),
    ],
)
def test_a_server_that_cannot_serve_us_is_refused(
    stub: Stub, roles: Roles, tmp_path: Path, path: str, answer: Answer, message: str
) -> None:
    stub.fault = first(10**9, answer, path)
    with pytest.raises(ConfigError, match=message):
        connect(stub, roles, tmp_path)


def config(folder: Path, **changes: Any) -> BONDConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "max_completion_length": 5,
        "warmup_steps": 0,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "engine": "vllm",
        "dtype": "float32",
    }
    return BONDConfig(**settings | changes)


def length(completions: list[str]) -> list[float]:
    return [float(len(c)) for c in completions]


@pytest.mark.parametrize(
    ("make", "peft_config", "message"),
    [
        (tiny_t5, None, "encoder-decoder.*engine='transformers'"),
        (tiny_causal, IA3Config(target_modules=["v_proj"], feedforward_modules=[]), "not IA3: use engine"),
    ],
)
def test_what_vllm_cannot_do_is_refused(tmp_path: Path, make: Any, peft_config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BONDTrainer(
            *(make(TOKENIZER), length, config(tmp_path), prompt_rows(4)),
            processing_class=TOKENIZER,
            peft_config=peft_config,
        )


def trainer(folder: Path, stub: Stub, **changes: Any) -> BONDTrainer:
    torch.manual_seed(0)
    return BONDTrainer(
        *(tiny_causal(TOKENIZER), length, config(folder, vllm_base_url=stub.url, **changes), prompt_rows(6)),
        processing_class=TOKENIZER,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )


@pytest.fixture
def plain_stub() -> Iterator[Stub]:
    """Of the trainer's base model, ending where its tokenizer says."""
    with serving(
        Stub(wrap_lora(tiny_causal(TOKENIZER), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])), [2])
    ) as s:
        yield s


def test_training_samples_what_it_learns(plain_stub: Stub, tmp_path: Path) -> None:
    made = trainer(tmp_path, plain_stub)
    made.train()
    gaps = [row[GAP_METRIC] for row in made.state.log_history if GAP_METRIC in row]
    assert len(gaps) == 3
    assert max(gaps) < 1e-4
    assert len({body["cache_salt"] for body in plain_stub.drawn()}) == 6  # policy and anchor, anew at each step


def test_training_on_stale_samples_ends(plain_stub: Stub, tmp_path: Path) -> None:
    made = trainer(tmp_path, plain_stub)
    plain_stub.fault = ignore_reloads(10**9)
    with pytest.raises(EngineError, match="did nothing"):
        made.train()
    assert made.state.global_step <= 1


def test_a_context_too_short_is_refused_before_training(tmp_path: Path) -> None:
    model = wrap_lora(tiny_causal(TOKENIZER), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with serving(Stub(model, [2], max_model_len=8)) as small:
        # The probe itself may be cut by a real server; here only the prompts are too long.
        with pytest.raises(ConfigError, match=r"context of 8 tokens is too short.*max-model-len"):
            trainer(tmp_path, small)


# -- a server of our own


def script(folder: Path, code: str) -> str:
    """An 'interpreter' that ignores its arguments and runs `code`."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def start(python: str, folder: Path, limit: float = 30) -> LocalServer:
    return LocalServer(python, "m", ["--enable-lora"], log=folder / "server.log", start_timeout=limit, on_cpu=True)


def test_a_server_that_ends_at_its_start_says_why(tmp_path: Path) -> None:
    python = script(tmp_path, "raise RuntimeError('no KV cache')")
    with pytest.raises(ConfigError, match=r"code 1.*no KV cache.*To start one by hand.*--enable-lora"):
        start(python, tmp_path)


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be run"):
        start(str(tmp_path / "nowhere"), tmp_path)


def test_a_server_that_never_answers_is_ended(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"import os,time; open({str(pid)!r},'w').write(str(os.getpid())); time.sleep(100)"
    with pytest.raises(ConfigError, match="vllm_start_timeout=3"):
        start(script(tmp_path, code), tmp_path, 3)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


SERVES = (
    "import http.server as h,os,subprocess,sys;"
    "c=subprocess.Popen([sys.executable,'-c','import time; time.sleep(100)']); print(c.pid,flush=True);"
    "H=type('H',(h.BaseHTTPRequestHandler,),{'do_GET':lambda s:(s.send_response(200),s.end_headers())});"
    "h.HTTPServer(('127.0.0.1',int(os.environ['STUB_PORT'])),H).serve_forever()"
)


def gone(pid: int, seconds: float = 5) -> bool:
    """Whether the process ends (one that nobody has waited for yet has ended)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return False


@pytest.fixture
def server_python(tmp_path: Path) -> str:
    """An interpreter that serves /health, on the port of its arguments as vLLM does, and has a worker."""
    path = tmp_path / "python"
    path.write_text(
        '#!/bin/sh\nwhile [ "$1" != --port ]; do shift; done\n'
        f"STUB_PORT=$2 exec {shlex.quote(sys.executable)} -u -c {shlex.quote(SERVES)}\n"
    )
    path.chmod(0o755)
    return str(path)


def test_stop_ends_the_server_and_its_workers(server_python: str, tmp_path: Path) -> None:
    server = start(server_python, tmp_path)
    worker = int((tmp_path / "server.log").read_text().split()[0])
    server.stop()
    server.stop()
    assert gone(worker)
    assert gone(server.pid)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
def test_no_server_outlives_its_run(server_python: str, tmp_path: Path, end: signal.Signals | None) -> None:
    """However the run ends: killed, terminated, or by an exception."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom bondlm.engines.vllm.server import LocalServer\n"
        f"folder = Path({str(tmp_path)!r})\n"
        f"LocalServer({server_python!r}, 'm', [], log=folder / 'server.log', start_timeout=30, on_cpu=True)\n"
        "print('up', flush=True)\n" + ("time.sleep(100)" if end else "raise RuntimeError('a bug')")
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "up\n"
    if end is not None:
        run.send_signal(end)
    run.wait(30)
    assert gone(int((tmp_path / "server.log").read_text().split()[0]))


def test_options_of_our_server(tmp_path: Path) -> None:
    options = server_options(torch.bfloat16, 24, 2, config(tmp_path, vllm_server_args=["--max-model-len", "512"]))
    assert " ".join(options) == (
        "--dtype bfloat16 --enable-lora --max-loras 2 --max-lora-rank 32 --generation-config vllm "
        "--logprobs-mode processed_logprobs --enforce-eager --max-model-len 512"
    )


# -- the gap between sampler and learner


def test_the_gap_is_a_mean_over_real_tokens() -> None:
    rows = [[Completion([1, 2], [-1.0, -2.0], True)], [Completion([3], [-3.0], True)]]
    sampled = padded_logprobs(rows, 3)
    learned = torch.tensor([[[-1.1, -1.9, 50.0]], [[-3.0, 50.0, 50.0]]])
    assert logprob_gap(learned, sampled, 1, strict=True) == pytest.approx(0.2 / 3, abs=1e-6)  # signs do not cancel


@pytest.mark.parametrize(("shift", "outcome"), [(0.09, None), (0.11, "warn"), (0.49, "warn"), (0.51, "raise")])
def test_a_gap_warns_and_raises_at_its_limits(shift: float, outcome: str | None) -> None:
    sampled = padded_logprobs([[Completion([1, 2], [-1.0, -2.0], True)]], 2)
    learned = sampled + shift
    if outcome is None:
        logprob_gap(learned, sampled, 1, strict=True)
    elif outcome == "warn":
        with pytest.warns(UserWarning, match="bondlm: the sampler"):
            logprob_gap(learned, sampled, 1, strict=True)
    else:
        with pytest.raises(EngineError, match=r"step 7.*0\.51 nats"):
            logprob_gap(learned, sampled, 7, strict=True)
    assert logprob_gap(learned, sampled, 1, strict=False) == pytest.approx(shift, abs=1e-5)
