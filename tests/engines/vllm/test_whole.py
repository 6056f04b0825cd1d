"""Full fine-tuning over vLLM, against a stub server: whose weights it holds, its faults. Real: test_real.py."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import prompt_rows, tiny_causal
from transformers import LlamaConfig, LlamaForCausalLM

from bondlm import BONDTrainer
from bondlm.engines.agreement import GAP_METRIC
from bondlm.engines.choose import served_dtype, whole_model_options
from bondlm.engines.local.engine import TransformersEngine
from bondlm.engines.vllm.http import WHOLE_OPTIONS, VLLMClient
from bondlm.engines.vllm.whole import WholeModelEngine, weights_digest, write_weights, written_bytes
from bondlm.errors import ConfigError, EngineError, ResourceError
from bondlm.models.adapters import wrap_adapter
from bondlm.models.roles import Roles
from engines.vllm.helpers import ALONE, EOS, IDS, PROBE, SEEDS, TOKENIZER, config, draw_both, length
from engines.vllm.stub import Answer, Stub, first, serving


def change(model: torch.nn.Module, size: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * size)


@pytest.fixture
def roles() -> Roles:
    torch.manual_seed(0)
    made = Roles(tiny_causal(TOKENIZER))
    change(made.model, 0.02)  # policy and anchor differ
    return made


@pytest.fixture
def stub() -> Iterator[Stub]:
    """It holds other weights, as a server that was started without any."""
    with serving(Stub(tiny_causal(TOKENIZER, seed=7), EOS)) as made:
        yield made


@pytest.fixture
def plain_stub() -> Iterator[Stub]:
    """Ending where the tokenizer says."""
    with serving(Stub(tiny_causal(TOKENIZER, seed=7), [2])) as made:
        yield made


def connect(stub: Stub, roles: Roles, folder: Path) -> WholeModelEngine:
    client = VLLMClient(stub.url, timeout=20.0, max_wait=0.02, start_options=WHOLE_OPTIONS)
    return WholeModelEngine(
        *([client], roles.model, {}, roles.use), processes=ALONE, eos_ids=EOS, probe_ids=PROBE, folder=folder
    )


@pytest.fixture
def engine(stub: Stub, roles: Roles, tmp_path: Path) -> WholeModelEngine:
    return connect(stub, roles, tmp_path)


def reloads(stub: Stub) -> list[str]:
    """Whose weights were loaded, in order."""
    calls = [body for body in stub.bodies("/collective_rpc") if body["method"] == "reload_weights"]
    return [Path(body["kwargs"]["weights_path"]).name.split("-")[0] for body in calls]


def test_each_role_draws_from_its_own_weights(engine: WholeModelEngine, roles: Roles, stub: Stub) -> None:
    drawn = draw_both(engine)
    here = TransformersEngine(roles.use, eos_ids=EOS, pad_id=0)
    for role, count in (("policy", 2), ("anchor", 3)):
        expected = here.generate(IDS, count, role=role, max_new_tokens=6, seeds=[s >> 2 for s in SEEDS])  # type: ignore[arg-type]
        assert [[c.ids for c in row] for row in drawn[role]] == [[c.ids for c in row] for row in expected]
    assert drawn["policy"][0][0] != drawn["anchor"][0][0]
    assert reloads(stub) == ["policy", "anchor"]
    engine.generate(IDS, 1, role="reference", max_new_tokens=2, seeds=SEEDS)  # the same weights as the anchor's
    assert reloads(stub) == ["policy", "anchor"]
    assert all(engine.probe_gap[role] < 1e-4 for role in ("policy", "anchor", "reference"))  # type: ignore[index]


def test_nothing_is_sent_to_a_server_that_holds_the_weights(
    engine: WholeModelEngine, roles: Roles, stub: Stub, tmp_path: Path
) -> None:
    sampling: Any = {"max_new_tokens": 4, "seeds": SEEDS}
    for _ in range(2):
        engine.sync()
        engine.generate(IDS, 1, role="policy", **sampling)
    assert reloads(stub) == ["policy"]
    change(roles.model, 1e-4)
    engine.sync()
    engine.generate(IDS, 1, role="policy", **sampling)
    engine.generate(IDS, 1, role="anchor", **sampling)
    engine.generate(IDS, 1, role="policy", **sampling)
    assert reloads(stub) == ["policy"] * 2 + ["anchor", "policy"]
    assert len({body["cache_salt"] for body in stub.drawn()}) == 4
    assert list(tmp_path.iterdir()) == []  # what the server has read is removed


def test_a_server_that_another_run_has_changed_gets_the_weights_again(
    engine: WholeModelEngine, roles: Roles, stub: Stub
) -> None:
    change(stub._model, 0.1)
    engine.generate(IDS, 1, role="policy", max_new_tokens=4, seeds=SEEDS)
    assert reloads(stub) == ["policy"] * 2


def ignored(times: int) -> Callable[[str, Any], Answer | None]:
    return first(times, (200, {"results": [None]}), "/collective_rpc")


def test_a_small_change_on_a_server_that_rounds_is_noticed(stub: Stub, roles: Roles, tmp_path: Path) -> None:
    """In bf16 server and trainer differ by more than another run may have moved; the server's own scores tell."""

    def round_off(answer: dict[str, Any]) -> None:
        for k, row in enumerate(answer["choices"][0].get("prompt_logprobs", [None])[1:]):
            row[next(iter(row))]["logprob"] += 0.06 * (-1) ** k

    stub.spoil = round_off
    engine = connect(stub, roles, tmp_path)
    for _ in range(2):
        engine.generate(IDS, 1, role="policy", max_new_tokens=4, seeds=SEEDS)
    assert reloads(stub) == ["policy"]
    change(stub._model, 5e-3)
    engine.generate(IDS, 1, role="policy", max_new_tokens=4, seeds=SEEDS)
    assert reloads(stub) == ["policy", "policy"]


def test_every_reload_looks_for_the_weights(engine: WholeModelEngine, stub: Stub) -> None:
    """A server that was restarted without weights since the last step would not."""
    draw_both(engine)
    methods = [body["method"] for body in stub.bodies("/collective_rpc")]
    assert methods == ["update_config", "reload_weights"] * (len(methods) // 2)


def test_a_reload_that_did_nothing_is_caught(engine: WholeModelEngine, roles: Roles, stub: Stub) -> None:
    change(roles.model, 1e-5)
    stub.fault = ignored(10**9)
    with pytest.raises(EngineError, match=r"policy weights.*reload") as caught:
        draw_both(engine)
    assert caught.value.exit_code == 5


def test_a_reload_is_tried_twice(engine: WholeModelEngine, roles: Roles, stub: Stub) -> None:
    change(roles.model, 1e-3)
    stub.fault = ignored(1)
    draw_both(engine)
    assert engine.probe_gap["policy"] < 1e-4


def test_the_anchors_weights_are_not_taken_for_the_policys(engine: WholeModelEngine, roles: Roles, stub: Stub) -> None:
    """Policy and anchor take turns: a server that keeps the one when it is given the other is caught."""
    draw_both(engine)  # the anchor's are there now
    stub.fault = ignored(10**9)
    with pytest.raises(EngineError, match="policy weights"):
        draw_both(engine)


def test_a_reload_of_a_part_is_caught(engine: WholeModelEngine, roles: Roles, stub: Stub) -> None:
    """As vLLM on a CPU reloads a tied model whose head it is not given. The probe moves, about as far as it should."""
    head = stub._model.lm_head.weight
    kept = roles.model.lm_head.weight.detach().clone()

    def spoil(answer: dict[str, Any]) -> None:
        with torch.no_grad():
            head.copy_(kept)

    answer = stub.answer

    def but_the_head(path: str, body: Any) -> Answer:
        result = answer(path, body)
        if path == "/collective_rpc":
            spoil({})
        return result

    stub.answer = but_the_head  # type: ignore[method-assign]
    change(roles.model, 5e-3)
    with pytest.raises(EngineError, match="differ by"):
        draw_both(engine)


def test_a_server_without_the_route_says_how_to_start_it(stub: Stub, roles: Roles, tmp_path: Path) -> None:
    stub.fault = first(10**9, (404, {"detail": "Not Found"}), "/collective_rpc")
    with pytest.raises(ConfigError, match=r"VLLM_SERVER_DEV_MODE=1 python -m vllm.*--load-format dummy"):
        connect(stub, roles, tmp_path)


@pytest.mark.parametrize("said", ["Repo id must be in the form 'repo_name'", "size of tensor a (64) must match"])
def test_a_server_that_cannot_load_the_weights_is_refused(stub: Stub, roles: Roles, tmp_path: Path, said: str) -> None:
    """A folder that it does not see, another architecture; trying again would find a server without weights."""

    def fault(path: str, body: Any) -> Answer | None:
        return (500, {"error": {"message": said}}) if body and body.get("method") == "reload_weights" else None

    stub.fault = fault
    with pytest.raises(ConfigError) as caught:
        connect(stub, roles, tmp_path)
    for part in (said, "path", "architecture", str(tmp_path)):
        assert part in str(caught.value)
    assert reloads(stub) == ["policy"]


def test_a_full_disk_is_an_error(
    engine: WholeModelEngine, roles: Roles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(roles.model, "save_pretrained", full)
    change(roles.model, 1e-3)
    with pytest.raises(ResourceError, match=f"{tmp_path}.*No space left"):
        draw_both(engine)


def test_training_samples_what_it_learns(plain_stub: Stub, tmp_path: Path) -> None:
    """Three steps of J-BOND, and an evaluation with the reference, a third set of weights."""
    made = BONDTrainer(
        *(tiny_causal(TOKENIZER), length, config(tmp_path, vllm_base_url=plain_stub.url, learning_rate=1e-3)),
        *(prompt_rows(6), prompt_rows(3)),
        processing_class=TOKENIZER,
    )
    made.train()
    gaps = [row[GAP_METRIC] for row in made.state.log_history if GAP_METRIC in row]
    assert len(gaps) == 3
    assert max(gaps) < 1e-4
    # At the first step policy and anchor are the same.
    assert reloads(plain_stub) == ["policy", *(["policy", "anchor"] * 2)]
    assert "eval_effective_n" in made.evaluate()
    assert reloads(plain_stub)[-2:] == ["reference", "policy"]


def test_a_fixed_anchor_is_sent_once(plain_stub: Stub, tmp_path: Path) -> None:
    """Best-of-N SFT draws from the anchor alone."""
    changes = {"objective": "best_of_n_sft", "anchor": "fixed", "vllm_base_url": plain_stub.url, "learning_rate": 1e-3}
    made = BONDTrainer(
        *(tiny_causal(TOKENIZER), length, config(tmp_path, **changes), prompt_rows(6)), processing_class=TOKENIZER
    )
    made.train()
    assert reloads(plain_stub) == ["policy"]  # which it still was


def test_a_stale_server_pauses_the_run_which_goes_on_with_a_good_one(plain_stub: Stub, tmp_path: Path) -> None:
    def trainer() -> BONDTrainer:
        changes = {"save_strategy": "steps", "save_steps": 100, "learning_rate": 1e-3, "vllm_base_url": plain_stub.url}
        args = config(tmp_path, **changes)
        return BONDTrainer(*(tiny_causal(TOKENIZER), length, args, prompt_rows(6)), processing_class=TOKENIZER)

    def stale_at_the_third_step(path: str, body: Any) -> Answer | None:
        is_reload = path == "/collective_rpc" and body["method"] == "reload_weights"
        return (200, {"results": [None]}) if is_reload and len(reloads(plain_stub)) > 3 else None

    plain_stub.fault = stale_at_the_third_step
    with pytest.raises(EngineError, match="policy weights"):
        trainer().train()
    assert (tmp_path / "checkpoint-2" / "manifest.json").is_file()
    plain_stub.fault = lambda path, body: None
    made = trainer()  # gives the server the start's weights; the checkpoint's follow
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 3
    assert [row[GAP_METRIC] < 1e-4 for row in made.state.log_history if GAP_METRIC in row] == [True] * 3


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_tied_head_is_written_too(tmp_path: Path, autocast: torch.dtype | None) -> None:
    roles = Roles(tiny_causal(TOKENIZER, tied=True))
    roles.autocast = autocast
    with roles.use("policy") as model:
        write_weights(model, tmp_path / "weights")
    state = {k: v for file in (tmp_path / "weights").glob("*.safetensors") for k, v in load_file(file).items()}
    assert set(state) == {name for name, _ in roles.model.named_parameters()} | {"lm_head.weight"}
    assert torch.equal(state["lm_head.weight"].float(), roles.model.lm_head.weight.to(autocast).float())
    assert torch.equal(state["model.embed_tokens.weight"], state["lm_head.weight"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_what_is_written_fits_into_the_room_that_was_looked_for(
    tmp_path: Path, autocast: torch.dtype | None, tied: bool
) -> None:
    """A large vocabulary, as Gemma's: under autocast the embedding was written in fp32 next to two heads."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    roles = Roles(LlamaForCausalLM(LlamaConfig(vocab_size=20_000, tie_word_embeddings=tied, **shape)))
    roles.autocast = autocast
    embedding = roles.model.model.embed_tokens.weight
    with roles.use("policy") as model:
        write_weights(model, tmp_path / "weights")
    written = sum(file.stat().st_size for file in (tmp_path / "weights").iterdir())
    room = written_bytes(roles.core, served_dtype(roles))
    assert 0.9 * room < written <= room
    assert roles.model.model.embed_tokens.weight is embedding
    assert embedding.dtype == torch.float32


def test_options_of_our_server(tmp_path: Path) -> None:
    args = config(tmp_path, vllm_server="auto", vllm_server_args=["--max-model-len", "512"])
    plain = " ".join(whole_model_options(Roles(tiny_causal(TOKENIZER)), args))
    assert plain == (
        "--dtype float32 --load-format dummy --generation-config vllm --logprobs-mode processed_logprobs "
        "--enforce-eager --no-enable-chunked-prefill --max-model-len 512"
    )


def test_a_server_computes_in_what_the_trainer_does(tmp_path: Path) -> None:
    """Also where the launcher asked for it, and no setting."""
    roles = Roles(tiny_causal(TOKENIZER))
    roles.autocast = torch.bfloat16
    assert whole_model_options(roles, config(tmp_path))[:2] == ["--dtype", "bfloat16"]
    adapted = Roles(wrap_adapter(tiny_causal(TOKENIZER), LoraConfig(target_modules=["q_proj"])))
    adapted.autocast = torch.bfloat16
    assert served_dtype(adapted) == torch.bfloat16


def test_a_digest_sees_every_bit() -> None:
    model = torch.nn.Linear(3, 3).to(torch.bfloat16)  # 18 bytes and 6: not only whole words
    before = weights_digest(model)
    assert weights_digest(model) == before
    model.weight.data[2, 2] *= 1.01  # past autograd's version counter, as some optimizers write
    assert weights_digest(model) != before


def test_a_digest_sees_the_order() -> None:
    model = torch.nn.Linear(8, 8, bias=False)
    before = weights_digest(model)
    model.weight.data = model.weight.data.flip(0).clone()
    assert weights_digest(model) != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_digest_of_parts_of_one_tensor(dtype: torch.dtype) -> None:
    """At an offset that no 64-bit word begins at, as a library that flattens parameters leaves them."""
    flat, model = torch.randn(100).to(dtype), torch.nn.Module()
    model.a, model.b = torch.nn.Parameter(flat[:3]), torch.nn.Parameter(flat[3:43])
    before = weights_digest(model)
    flat[41] += 1
    assert weights_digest(model) != before
