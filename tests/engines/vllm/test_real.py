"""`engine: vllm` against a real vLLM server, a tiny Llama with random weights.

On the CPU (`make test-vllm`), or on a GPU (`benchmarks/on_gpu.sh vllm`).
"""

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny import PROMPTS, prompt_rows, tiny_causal, tiny_tokenizer
from transformers import AutoModelForCausalLM

from bondlm import BONDConfig, BONDTrainer
from bondlm.engines.agreement import GAP_METRIC
from bondlm.engines.local.engine import TransformersEngine
from bondlm.engines.vllm.http import VLLMClient
from bondlm.engines.vllm.lora import VLLMEngine
from bondlm.engines.vllm.server import LocalServer
from bondlm.engines.vllm.whole import WholeModelEngine
from bondlm.errors import ConfigError, EngineError, RewardError
from bondlm.models.adapters import wrap_adapter
from bondlm.models.logprobs import row_logprobs
from bondlm.models.roles import Roles
from bondlm.rewards import load_rewards, score
from engines.vllm.helpers import ALONE, LORA_DTYPE, ON_GPU, PYTHON

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(500),
    pytest.mark.skipif(not PYTHON, reason="BONDLM_VLLM_PYTHON names no interpreter with vLLM: make test-vllm"),
]
TOKENIZER = tiny_tokenizer()
EOS = [2, *range(9, 300, 11)]
IDS = [TOKENIZER.encode(prompt) for prompt in PROMPTS[:6]]
SEEDS = list(range(100, 106))
PROBE = TOKENIZER.encode("a text that server and trainer are compared by, with some words more")
GAP = 1e-3  # nats per token, largest: two fp32 implementations
LORA_GAP = 0.15 if ON_GPU else GAP  # two bf16 ones: 0.05 to 0.09 were seen on a CPU
APART = 0.3 if ON_GPU else 0.05  # what other weights make at least


def config(folder: Path, **changes: Any) -> BONDConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 3,
        "max_completion_length": 8,
        "warmup_steps": 0,
        "learning_rate": 1e-2,
        "eta": 0.3,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not ON_GPU,
        "dtype": "float32",
        "engine": "vllm",
    }
    return BONDConfig(**settings | changes)


OF_LORA: dict[str, Any] = {"dtype": str(LORA_DTYPE).removeprefix("torch.")}


def lora(rank: int = 8) -> LoraConfig:
    return LoraConfig(r=rank, target_modules="all-linear")


def change(roles: Roles, size: float) -> None:
    with torch.no_grad():
        for parameter in roles.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)


def load(base: str, rank: int = 8) -> Roles:
    torch.manual_seed(0)
    roles = Roles(wrap_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=LORA_DTYPE), lora(rank)))
    change(roles, 0.1)
    return roles


@pytest.fixture
def roles(base: str) -> Roles:
    return load(base)


def connect(server: LocalServer, roles: Roles, folder: Path) -> VLLMEngine:
    client = VLLMClient(server.url, timeout=60)
    return VLLMEngine(
        *([client], roles.model, roles.adapter_roles, roles.use),
        processes=ALONE,
        eos_ids=EOS,
        probe_ids=PROBE,
        folder=folder,
    )


@pytest.fixture
def engine(server: LocalServer, roles: Roles, tmp_path: Path) -> VLLMEngine:
    return connect(server, roles, tmp_path)


def draw_all(engine: VLLMEngine, count: int = 3) -> Any:
    wanted: Any = {role: (count, SEEDS) for role in ("policy", "anchor", "reference")}
    return engine.generate_roles(IDS, wanted, max_new_tokens=10)


def largest_gap(roles: Roles, drawn: Any, role: Any) -> float:
    """Between the server's log-probability of a completion and ours under `role`, a token."""
    pairs = [(prompt, c) for prompt, row in zip(IDS, drawn, strict=True) for c in row]
    with roles.use(role) as model:
        ours = row_logprobs(model, [(p, c.ids) for p, c in pairs], 0, start_id=None, device=torch.device("cpu"))
    return max(abs(float(x) - c.logprob) / len(c.ids) for x, (_, c) in zip(ours, pairs, strict=True))


def test_each_role_has_its_own_distribution(engine: VLLMEngine, roles: Roles) -> None:
    """Three roles drawn in one batch: each scores as our own weights of that role do, and as no other's."""
    every: tuple[Any, ...] = ("policy", "anchor", "reference")
    for _, anchor, _ in roles.anchor_pairs:  # as long as it is the reference, a row of one may have the other's adapter
        anchor.data.add_(torch.randn_like(anchor) * 0.1)
    for _ in range(2):
        engine.sync()
        drawn = draw_all(engine)
        for role in every:
            assert largest_gap(roles, drawn[role], role) < LORA_GAP
            for other in set(every) - {role}:
                assert largest_gap(roles, drawn[role], other) > APART
        change(roles, 0.1)
    lengths = {len(c.ids) for row in drawn["policy"] for c in row}
    assert len(lengths) > 2
    assert any(c.finished for row in drawn["policy"] for c in row)


def test_greedy_tokens_are_those_of_the_transformers_engine(engine: VLLMEngine, roles: Roles) -> None:
    here = TransformersEngine(roles.use, eos_ids=EOS, pad_id=0)
    for role in ("policy", "anchor"):
        sampling: Any = {"role": role, "max_new_tokens": 10, "seeds": SEEDS, "temperature": 0.0}
        ours, theirs = here.generate(IDS, 1, **sampling), engine.generate(IDS, 1, **sampling)
        assert [c[0].ids for c in ours] == [c[0].ids for c in theirs]
        for (one,), (other,) in zip(ours, theirs, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=LORA_GAP)


def test_a_sample_belongs_to_its_seed(engine: VLLMEngine) -> None:
    """Not to the batch, nor to how many samples are drawn; samples of a prompt differ."""
    many = engine.generate(IDS, 4, role="policy", max_new_tokens=10, seeds=SEEDS)
    few = engine.generate(IDS[2:3], 2, role="policy", max_new_tokens=10, seeds=SEEDS[2:3])
    assert [c.ids for c in few[0]] == [c.ids for c in many[2][:2]]
    assert len({tuple(c.ids) for c in many[2]}) > 1
    other = engine.generate(IDS[2:3], 4, role="policy", max_new_tokens=10, seeds=[7777])
    assert [c.ids for c in other[0]] != [c.ids for c in many[2]]


def test_samples_have_the_models_frequencies(engine: VLLMEngine, roles: Roles) -> None:
    """First tokens of 2,000 samples against the policy's probabilities: no temperature, top-p or top-k sneaks in."""
    n = 2000
    (row,) = engine.generate(IDS[:1], n, role="policy", max_new_tokens=1, seeds=[5])
    with roles.use("policy") as model, torch.no_grad():
        probs = model(input_ids=torch.tensor([IDS[0]])).logits[0, -1].double().softmax(-1)
    counts = torch.bincount(torch.tensor([c.ids[0] for c in row]), minlength=len(probs)).double()
    common = probs * n >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = n * torch.cat([probs[common], probs[~common].sum()[None]])
    chi_square, freedom = float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1
    assert freedom > 5
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5
    assert counts[~common].sum() > 0  # the tail is drawn from, too


def test_prompts_that_do_not_fit_into_one_pass(engine: VLLMEngine) -> None:
    """Of an evaluation, all at once: vLLM on a CPU ends when it cuts one that has a seed."""
    prompts = [[3 + (7 * i + j) % 290 for j in range(96)] for i in range(60)]  # 5,760 tokens; a pass takes 4,096
    drawn = engine.generate(prompts, 1, role="policy", max_new_tokens=2, seeds=list(range(60)))
    assert all(len(row) == 1 for row in drawn)


def test_a_hot_reload_changes_probe_and_samples(engine: VLLMEngine, roles: Roles) -> None:
    """The same prompts before and after: cached prefixes of the old weights are not used again."""
    (server,) = engine._servers
    name = engine._names("policy", server)[0]
    before = server.client.prompt_logprobs(name, PROBE, "x")
    draw_all(engine)
    change(roles, 0.1)
    engine.sync()
    after = server.client.prompt_logprobs(name, PROBE, "x")
    assert max(abs(a - b) for a, b in zip(after, before, strict=True)) > APART
    assert engine.probe_gap["policy"] < LORA_GAP
    drawn = draw_all(engine)
    assert largest_gap(roles, drawn["policy"], "policy") < LORA_GAP
    assert largest_gap(roles, drawn["anchor"], "anchor") < LORA_GAP


def test_a_stale_reload_is_caught(engine: VLLMEngine, roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    change(roles, 0.1 if ON_GPU else 1e-3)  # beyond the rounding
    monkeypatch.setattr(engine._servers[0].client, "load_adapter", lambda name, folder: None)
    with pytest.raises(EngineError, match="reload"):
        engine.sync()


def test_a_rank_too_large_is_refused(server: LocalServer, base: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rank 16.*--max-lora-rank"):
        connect(server, load(base, 16), tmp_path)


def short(completions: list[str]) -> list[float]:
    return [-float(len(c)) for c in completions]


def test_training(server: LocalServer, base: str, tmp_path: Path) -> None:
    """Three steps of J-BOND; both adapters move at each, and every sample scores as the weights that learn."""
    made = BONDTrainer(
        *(base, short, config(tmp_path, **OF_LORA, vllm_base_url=server.url), prompt_rows(9)),
        prompt_rows(4),
        peft_config=lora(),
    )
    made.train()
    gaps = [row[GAP_METRIC] for row in made.state.log_history if GAP_METRIC in row]
    assert len(gaps) == 3
    assert max(gaps) < LORA_GAP
    assert all(float((anchor - policy).detach().abs().max()) > 0 for _, anchor, policy in made.roles.anchor_pairs)
    assert "eval_effective_n" in made.evaluate()  # in step with the weights as they are now
    assert made.engine.probe_gap["policy"] < LORA_GAP  # type: ignore[attr-defined]


def test_a_judge_is_held_to_a_ranking_and_its_tokens_are_counted(server: LocalServer, base: str) -> None:
    """Of a model that was never trained: the schema alone makes rankings of its noise."""
    (judge,) = load_rewards(f"judge:{server.url}/v1?model={base}&cache=off", timeout=60)
    prompts = [prompt for prompt in PROMPTS[:6] for _ in range(2)]
    owner = [i // 2 for i in range(12)]
    found, again = [
        score([judge], prompts, ["Yes.", "No, never."] * 6, groups=owner, allow_bad_rows=True) for _ in "12"
    ]
    ranked = [i for i in range(0, 12, 2) if i not in found.bad]
    assert len(ranked) >= 3  # an id can be said twice under a schema; three times in a row is rare
    assert all(sorted(found.total[i : i + 2].tolist()) == [0.25, 0.75] for i in ranked)
    assert (found.total[ranked].tolist(), found.bad.keys()) == (again.total[ranked].tolist(), again.bad.keys())
    used = judge.function.usage  # type: ignore[attr-defined]
    assert used.is_counted
    assert used.tokens == used.prompt_tokens + used.completion_tokens > 300 * used.calls
    (other,) = load_rewards(f"judge:{server.url}/v1?model=another&cache=off", timeout=60)
    with pytest.raises(RewardError, match=r"HTTP 404.*another"):
        score([other], prompts[:2], ["a", "b"], groups=[0, 0])


def alive_in_group(group: int) -> list[str]:
    """Processes that still run; one that has ended but that nobody has waited for does not."""
    lines = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in lines.splitlines()]
    return [" ".join(row) for row in rows if row[0] == str(group) and not row[1].startswith("Z")]


def test_a_server_of_our_own(base: str, tmp_path: Path) -> None:
    """`vllm_server: auto` starts it, trains and leaves nothing running."""
    settings = {**OF_LORA, "vllm_server": "auto", "vllm_python": PYTHON, "vllm_start_timeout": 400.0, "max_steps": 1}
    made = BONDTrainer(*(base, short, config(tmp_path, **settings), prompt_rows(6)), peft_config=lora())
    made.train()
    server = made.engine._server  # type: ignore[attr-defined]
    assert len(alive_in_group(server.pid)) > 1  # the server and its workers
    made.engine.close()  # type: ignore[attr-defined]
    end = time.monotonic() + 10  # killed is not yet gone
    while alive_in_group(server.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert alive_in_group(server.pid) == []
    assert "Application startup complete" in (tmp_path / "vllm" / "server.log").read_text()


# -- full fine-tuning: one server, given policy's and anchor's weights in turn


def load_whole(folder: str) -> Roles:
    return Roles(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def move(roles: Roles, size: float) -> None:
    with torch.no_grad():
        for parameter in roles.model.parameters():
            parameter.add_(torch.randn_like(parameter) * size)


def connect_whole(server: LocalServer, roles: Roles, folder: Path) -> WholeModelEngine:
    client = VLLMClient(server.url, timeout=60)
    return WholeModelEngine(
        *([client], roles.model, {}, roles.use), processes=ALONE, eos_ids=EOS, probe_ids=PROBE, folder=folder
    )


def test_one_server_is_given_each_roles_weights_in_turn(whole_server: LocalServer, tied: str, tmp_path: Path) -> None:
    """Policy, anchor, reference, policy: each scores as our own weights of that role, on the same prompts again."""
    roles = load_whole(tied)
    move(roles, 0.02)
    engine = connect_whole(whole_server, roles, tmp_path)
    for _ in range(2):
        drawn = draw_all(engine)
        for role in ("policy", "anchor", "reference"):
            assert engine.probe_gap[role] < GAP  # type: ignore[index]
            assert largest_gap(roles, drawn[role], role) < GAP
        assert largest_gap(roles, drawn["policy"], "anchor") > APART
        assert largest_gap(roles, drawn["anchor"], "policy") > APART
        move(roles, 0.02)
        engine.sync()
    assert list(tmp_path.iterdir()) == []


def test_a_reload_of_whole_weights_that_did_nothing_is_caught(
    whole_server: LocalServer, tied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = load_whole(tied)
    engine = connect_whole(whole_server, roles, tmp_path)
    move(roles, 1e-6)  # about 1e-4 nats a token
    monkeypatch.setattr(engine._servers[0].client, "rpc", lambda method, **arguments: None)
    with pytest.raises(EngineError, match="reload"):
        engine.generate(IDS, 1, role="policy", max_new_tokens=4, seeds=SEEDS)


def test_full_fine_tuning(whole_server: LocalServer, tied: str, tmp_path: Path) -> None:
    """Two steps of J-BOND; the server's weights change for each draw, and every sample scores as what learns."""
    args = config(tmp_path, vllm_base_url=whole_server.url, max_steps=2, learning_rate=1e-3)
    made = BONDTrainer(tied, short, args, prompt_rows(6), prompt_rows(4))
    engine: Any = made.engine
    probes: list[float] = []
    loaded = engine._load

    def load(role: str, server: Any, path: Path) -> None:
        loaded(role, server, path)
        probes.append(
            sum(engine._servers[0].client.prompt_logprobs(engine._servers[0].base, engine._probe_ids, str(len(probes))))
        )

    engine._load = load
    made.train()
    gaps = [row[GAP_METRIC] for row in made.state.log_history if GAP_METRIC in row]
    assert len(gaps) == 2
    assert max(gaps) < GAP
    assert len(set(probes)) == len(probes) == 2  # the first step's roles are what the server was given at its start
    assert "eval_effective_n" in made.evaluate()
    assert engine.probe_gap["policy"] < GAP


def test_weights_of_another_shape_are_refused(whole_server: LocalServer, base: str, tmp_path: Path) -> None:
    """The last test of this server: it has no weights any more."""
    roles = Roles(tiny_causal(TOKENIZER, hidden=64))
    with pytest.raises(ConfigError, match=r"(size|shape).*architecture"):
        connect_whole(whole_server, roles, tmp_path)


def test_what_vllm_says_at_its_start_reaches_the_user(base: str, tmp_path: Path) -> None:
    options = ["--max-model-len", "256", "--dtype", "no-such-type"]
    with pytest.raises(ConfigError, match=r"no-such-type.*--dtype no-such-type"):
        LocalServer(PYTHON, base, options, log=tmp_path / "log", start_timeout=120, on_cpu=not ON_GPU)
