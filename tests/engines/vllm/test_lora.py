"""Two adapters on a vLLM server, against a stub: what is sent, and whose weights answer. A real one: test_real.py."""

import copy
import gc
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_causal

from bondlm.engines import RemoteEngine
from bondlm.engines.agreement import GAP_METRIC
from bondlm.engines.local.engine import TransformersEngine
from bondlm.engines.vllm.lora import VLLMEngine
from bondlm.errors import ConfigError, DataError, EngineError, NonFiniteError
from bondlm.models.adapters import wrap_adapter
from bondlm.models.roles import Roles
from engines.vllm import stub as stub_module
from engines.vllm.helpers import EOS, IDS, SEEDS, TOKENIZER, change, connect, draw_both, ignore_reloads, trainer
from engines.vllm.stub import Answer, Stub, serving

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


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


@pytest.mark.parametrize(
    "more", [{"use_rslora": True}, {"alpha_pattern": {"v_proj": 32}, "rank_pattern": {"q_proj": 2}}]
)
def test_every_layer_is_served_with_its_own_scaling(more: dict[str, Any], tmp_path: Path) -> None:
    """By a server that knows one scaling for all layers, too."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **more)
    roles = Roles(wrap_adapter(tiny_causal(TOKENIZER), lora))
    change(roles, 0.1)
    with serving(Stub(roles.model, EOS)) as stub:
        drawn = draw_both(connect(stub, roles, tmp_path))
    here = TransformersEngine(roles.use, eos_ids=EOS, pad_id=0)
    expected = here.generate(IDS, 2, role="policy", max_new_tokens=6, seeds=[s >> 2 for s in SEEDS])
    for ours, theirs in zip(drawn["policy"], expected, strict=True):
        assert [c.ids for c in ours] == [c.ids for c in theirs]
        assert [c.logprobs for c in ours] == [pytest.approx(c.logprobs, abs=1e-5) for c in theirs]


def test_runs_share_a_server(engine: VLLMEngine, stub: Stub, roles: Roles, tmp_path: Path) -> None:
    """Each draws from its own adapters, the reference's included: names shared by all runs gave it the other's."""
    before = draw_both(engine)
    other = Roles(copy.deepcopy(roles.model))
    change(other, 0.5)
    theirs = connect(stub, other, tmp_path / "other")
    assert draw_both(theirs)["policy"] != before["policy"]
    assert draw_both(engine) == before


def test_the_distribution_is_not_cut(engine: VLLMEngine, stub: Stub) -> None:
    """What a server may take from the model's generation_config.json is set off in every request."""
    draw_both(engine)
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    for body in stub.drawn():
        assert {name: body[name] for name in neutral} == neutral
        assert body["ignore_eos"] is True
        assert body["stop_token_ids"] == EOS
    assert {b["model"].rsplit("-", 1)[1] for b in stub.drawn()} == {"policy", "anchor"}


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
    # With `load_inplace` vLLM would read the folder again at each step of the model.
    assert not any("load_inplace" in body for body in stub.bodies("/v1/load_lora_adapter"))
    assert len(set(paths)) == len(paths) == 5  # the reference does not move
    salts = {(body["model"], body["cache_salt"]) for body in stub.drawn()}
    assert len(salts) == 4
    assert {str(p) for p in tmp_path.iterdir()} == {paths[0], *paths[-2:]}  # the old ones are removed


def test_a_prompt_longer_than_the_context_is_not_sent(engine: VLLMEngine, stub: Stub) -> None:
    before = len(stub.requests)
    with pytest.raises(DataError, match=r"prompt 1 .*\b300 tokens.*256"):
        engine.generate([IDS[0], [5] * 300], 1, role="policy", max_new_tokens=4, seeds=[1, 2])
    assert len(stub.requests) == before


def test_a_reload_that_did_nothing_is_caught(engine: VLLMEngine, stub: Stub, roles: Roles) -> None:
    change(roles, 1e-3)  # far below what a gap of 0.5 nats would show
    stub.fault = ignore_reloads(10**9)
    with pytest.raises(EngineError, match=r"policy.*reload") as caught:
        engine.sync()
    assert caught.value.exit_code == 5


def test_a_server_that_was_started_anew_gets_the_reference_again(engine: VLLMEngine, stub: Stub) -> None:
    """Each step sends policy and anchor; the next evaluation ended the run, since the reference was not there."""
    before = engine.generate(IDS, 2, role="reference", max_new_tokens=6, seeds=SEEDS)
    stub.start_anew()
    engine.sync()
    assert engine.generate(IDS, 2, role="reference", max_new_tokens=6, seeds=SEEDS) == before
    stub.start_anew()
    draw_both(engine)


def test_a_reload_is_tried_twice(engine: VLLMEngine, stub: Stub, roles: Roles) -> None:
    change(roles, 1e-3)
    stub.fault = ignore_reloads(1)
    engine.sync()
    assert engine.probe_gap["policy"] < 1e-4


def test_a_start_that_failed_leaves_nothing_in_the_way_of_the_next(stub: Stub, roles: Roles, tmp_path: Path) -> None:
    def wrong(path: str, body: Any) -> Answer | None:
        if path != "/v1/completions" or not body["model"].endswith("-policy"):
            return None
        rows = [{str(token): {"logprob": -30.0}} for token in body["prompt"][1:]]
        return 200, {"choices": [{"prompt_token_ids": body["prompt"], "prompt_logprobs": [None, *rows]}]}

    stub.fault = wrong
    for _ in range(2):
        with pytest.raises(EngineError, match="differ by"):
            connect(stub, roles, tmp_path)


def test_small_stale_moves_add_up(engine: VLLMEngine, stub: Stub, roles: Roles) -> None:
    """Each move is below what a server in 16 bits must follow; all together are not."""
    engine._kept[0].noise = 1e-2
    stub.fault = ignore_reloads(10**9)
    change(roles, 3e-4)
    engine.sync()  # not seen yet

    def go_on() -> None:
        for _ in range(500):
            change(roles, 3e-4)
            engine.sync()

    with pytest.raises(EngineError, match="reload"):
        go_on()


def test_weights_that_have_not_moved_are_not_stale(engine: VLLMEngine) -> None:
    for _ in range(3):
        engine.sync()


@pytest.mark.parametrize("learning_rate", [1e-4, 1e-3])
def test_rounding_of_mixed_precision_is_not_taken_for_a_stale_reload(
    learning_rate: float, plain_stub: Stub, tmp_path: Path
) -> None:
    """The trainer's probe moves by autocast's rounding, that of a server in fp32 by the steps alone."""
    made = trainer(tmp_path, plain_stub, bf16=True, learning_rate=learning_rate, max_steps=8)
    made.train()
    assert made.state.global_step == 8
    for size in (0.1, 0.3, 1.0):  # nor is it after long ways
        change(made.roles, size)
        made.engine.sync()  # type: ignore[attr-defined]
    plain_stub.fault = ignore_reloads(10**9)
    change(made.roles, 0.3)
    with pytest.raises(EngineError, match=r"reload|differ by"):
        made.engine.sync()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("part", "factor"), [("v_proj", 0.0), ("lora_B", 0.5)], ids=["without a layer", "another scaling"]
)
def test_a_part_of_an_adapter_is_caught(
    engine: VLLMEngine, stub: Stub, roles: Roles, monkeypatch: pytest.MonkeyPatch, part: str, factor: float
) -> None:
    """The probe moves, about as far as it should."""
    whole = stub_module.scaled

    def spoiled(folder: Path) -> dict[str, torch.Tensor]:
        return {name: tensor * (factor if part in name else 1.0) for name, tensor in whole(folder).items()}

    monkeypatch.setattr(stub_module, "scaled", spoiled)
    change(roles, 3e-2)
    with pytest.raises(EngineError, match="differ by"):
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
    with pytest.raises(NonFiniteError, match="-policy"):
        engine.sync()


def test_a_server_with_another_model_is_refused(roles: Roles, tmp_path: Path) -> None:
    other = Roles(wrap_adapter(tiny_causal(TOKENIZER, seed=7), LORA))
    with serving(Stub(other.model, EOS)) as stub, pytest.raises(ConfigError, match="another model"):
        connect(stub, roles, tmp_path)


def test_a_server_whose_base_is_a_little_otherwise_is_refused(roles: Roles, tmp_path: Path) -> None:
    """As one that has the file of a model that was fine-tuned in memory."""
    with serving(Stub(roles.model, EOS)) as stub:
        with torch.no_grad():
            for parameter in stub._model.get_base_model().parameters():
                parameter.mul_(1.04)
        with pytest.raises(ConfigError, match=r"another model.*differ by 0\.[1234]"):
            connect(stub, roles, tmp_path)


def test_training_samples_what_it_learns(plain_stub: Stub, tmp_path: Path) -> None:
    made = trainer(tmp_path, plain_stub)
    made.train()
    gaps = [row[GAP_METRIC] for row in made.state.log_history if GAP_METRIC in row]
    assert len(gaps) == 3
    assert max(gaps) < 1e-4
    assert len({body["cache_salt"] for body in plain_stub.drawn()}) == 6  # policy and anchor, anew at each step


def test_nothing_keeps_the_engine_of_a_trainer_that_is_deleted(plain_stub: Stub, tmp_path: Path) -> None:
    made = trainer(tmp_path, plain_stub, max_steps=1)
    made.train()
    engine = weakref.ref(made.engine)
    del made
    gc.collect()
    assert engine() is None


def test_training_on_stale_samples_ends(plain_stub: Stub, tmp_path: Path) -> None:
    made = trainer(tmp_path, plain_stub)
    plain_stub.fault = ignore_reloads(10**9)
    with pytest.raises(EngineError, match="reload"):
        made.train()
    assert made.state.global_step <= 1
