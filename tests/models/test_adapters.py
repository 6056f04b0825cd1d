"""Adapters of every kind: one start for all roles, a partner for all that trains, a folder that plain PEFT loads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    BOFTConfig,
    C3AConfig,
    EvaConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    PolyConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from tiny import PROMPTS, tiny_causal, tiny_tokenizer
from torch import Tensor

from bondlm.engines.local.engine import TransformersEngine
from bondlm.errors import ConfigError
from bondlm.models.adapters import (
    check_adapter,
    check_start,
    fresh_adapter,
    remove_adapters,
    save_adapter,
    without_wrapper,
    wrap_adapter,
)
from bondlm.models.anchor import Anchor
from bondlm.models.roles import Roles

TOKENIZER = tiny_tokenizer()
IDS = torch.tensor([TOKENIZER.encode(PROMPTS[0])])
SEEN = IDS[0, :3].tolist()
LAYERS = ["q_proj", "v_proj"]
ROLES = ("policy", "anchor", "reference")
ETA = 0.3


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": LAYERS, "task_type": "CAUSAL_LM"} | settings)


KINDS: dict[str, Any] = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "lora with a bias": lora(lora_bias=True),
    "lora on embeddings": lora(target_modules=[*LAYERS, "embed_tokens"]),
    "lora and tokens": lora(trainable_token_indices=SEEN),
    "lora and a head": lora(modules_to_save=["lm_head"]),
    "lora and norms": lora(modules_to_save=["norm", "input_layernorm"]),
    "pissa": lora(init_lora_weights="pissa"),
    "olora": lora(init_lora_weights="olora"),
    "eva": lora(init_lora_weights="eva", eva_config=EvaConfig()),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "mica": lora(init_lora_weights="mica"),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=4, target_modules=LAYERS),
    "lokr": LoKrConfig(r=4, target_modules=LAYERS),
    "vera": VeraConfig(r=4, target_modules=LAYERS),
    "boft": BOFTConfig(boft_block_size=4, target_modules=LAYERS),
    "oft": OFTConfig(oft_block_size=4, r=0, target_modules=LAYERS),
    "fourierft": FourierFTConfig(n_frequency=20, init_weights=True, target_modules=LAYERS),
    "c3a": C3AConfig(block_size=8, init_weights=True, target_modules=LAYERS),
    "hra": HRAConfig(r=4, target_modules=LAYERS),
    "layer norms": LNTuningConfig(target_modules=["input_layernorm"]),
    "randlora": RandLoraConfig(r=4, target_modules=LAYERS),
    "shira": ShiraConfig(r=2, target_modules=LAYERS),
    "road": RoadConfig(group_size=8, target_modules=LAYERS),
    "miss": MissConfig(r=4, target_modules=LAYERS),
    "tokens alone": TrainableTokensConfig(token_indices=SEEN, target_modules=["embed_tokens"]),
}
START_ELSEWHERE: dict[str, Any] = {
    "repeated layers": lora(layer_replication=[(0, 2), (1, 2)]),
    "fourierft": FourierFTConfig(n_frequency=20, target_modules=LAYERS),
    "vblora": VBLoRAConfig(r=2, target_modules=LAYERS, vector_length=8, num_vectors=8, topk=2),
    "random lora": lora(init_lora_weights=False),
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def logits_of(roles: Roles, role: str) -> Tensor:
    with roles.use(role) as model:
        return logits(model)


def learn(model: Any, steps: int = 2) -> None:
    """Steps that move all that trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_any_kind(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = logits(tiny_causal(TOKENIZER))
    model = fresh_adapter(tiny_causal(TOKENIZER), KINDS[kind], sharded=False)
    roles = Roles(model)
    check_adapter(model)
    check_start(model, roles.use, sharded=False)
    for role in ROLES:  # before the first step: the given model
        torch.testing.assert_close(logits_of(roles, role), given, atol=1e-4, rtol=0)
    # A step: the anchor of all that trains moves by eta of the way.
    start = values(model)
    anchor = Anchor(roles.anchor_pairs, schedule="ema", eta=ETA, update_every=1)
    learn(model)
    moved = values(model)
    metrics = anchor.update(1)
    assert set(anchor.state_dict()) == set(start) == {name for name, _, _ in roles.anchor_pairs}
    for name, value in anchor.state_dict().items():
        assert not torch.equal(moved[name], start[name]), name
        torch.testing.assert_close(value, (1 - ETA) * start[name] + ETA * moved[name], atol=1e-6, rtol=1e-5)
    assert metrics["anchor/gap_closed"] == pytest.approx(1, abs=1e-5)
    gap = sum(float((moved[name] - start[name]).square().sum()) for name in start) ** 0.5
    assert metrics["anchor/distance"] == pytest.approx(gap, rel=1e-5)
    # Each role computes with its own values: the anchor with those of the closed form, put into a policy.
    policy = logits(model)
    assert float((policy - given).abs().max()) > 0.05
    model.load_state_dict(anchor.state_dict(), strict=False)
    between = logits(model)
    model.load_state_dict(moved, strict=False)
    expected = {"policy": policy, "anchor": between, "reference": given}
    for role in (*ROLES, *reversed(ROLES)):
        torch.testing.assert_close(logits_of(roles, role), expected[role], atol=1e-4, rtol=0)
    assert set(values(model)) == set(start)  # what trained still does
    # Policy and anchor drawn together are what each draws alone.
    wanted: Any = {"policy": (1, [1]), "anchor": (2, [2])}
    drawn = [
        TransformersEngine(roles.use, eos_ids=[2], pad_id=0, use_together=together).generate_roles(
            [IDS[0].tolist()], wanted, max_new_tokens=4
        )
        for together in (None, roles.use_together)
    ]
    ids = [{role: [c.ids for row in rows for c in row] for role, rows in each.items()} for each in drawn]
    assert ids[0] == ids[1]
    # What is saved, plain PEFT loads onto the base that it names.
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_causal(TOKENIZER), str(tmp_path))
    torch.testing.assert_close(logits(loaded), policy, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", START_ELSEWHERE)
def test_a_kind_that_starts_elsewhere_is_refused_or_is_the_given_model(kind: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match="peft_config"):
        fresh_adapter(tiny_causal(TOKENIZER), START_ELSEWHERE[kind], sharded=False)
    model = wrap_adapter(tiny_causal(TOKENIZER), START_ELSEWHERE[kind])
    given, roles = logits(model), Roles(model)
    for role in ROLES:
        assert torch.equal(logits_of(roles, role), given)
    learn(model)
    assert not torch.allclose(logits_of(roles, "policy"), given, atol=1e-3)
    for role in ("anchor", "reference"):
        assert torch.equal(logits_of(roles, role), given)


@pytest.mark.parametrize("kind", ["lora", "lora and tokens", "ia3", "layer norms"])
def test_a_trained_adapter_is_its_own_reference(kind: str) -> None:
    model = wrap_adapter(tiny_causal(TOKENIZER), KINDS[kind])
    learn(model)
    start, roles = logits(model), Roles(model)
    learn(model)
    for role in ("anchor", "reference"):
        assert torch.equal(logits_of(roles, role), start)


@pytest.mark.parametrize("kind", ["lora", "lora on embeddings", "lora and a head", "lora and tokens", "layer norms"])
def test_adapters_are_taken_off_a_model(kind: str) -> None:
    """Not by PEFT: who runs a cell of a notebook again has the base alone, with an old adapter's layers inside."""
    base = tiny_causal(TOKENIZER)
    given, names = logits(base), [name for name, _ in base.named_parameters()]
    learn(wrap_adapter(base, KINDS[kind]))
    assert not torch.allclose(logits(base), given, atol=1e-2)
    again = fresh_adapter(base, KINDS["ia3"], sharded=False)
    assert torch.equal(logits(again), given)
    remove_adapters(base)
    assert torch.equal(logits(base), given)
    assert [name for name, _ in base.named_parameters()] == names


CHANGED = {"pissa": KINDS["pissa"], "olora": KINDS["olora"], "repeated layers": START_ELSEWHERE["repeated layers"]}


@pytest.mark.parametrize("kind", CHANGED)
def test_a_base_that_an_adapter_has_changed_is_not_taken_for_the_given_one(kind: str) -> None:
    base = tiny_causal(TOKENIZER)
    wrap_adapter(base, CHANGED[kind])
    with pytest.raises(ConfigError, match="load the model again"):
        fresh_adapter(base, KINDS["lora"], sharded=False)


def test_a_role_that_is_another_model_is_noticed_before_the_first_step() -> None:
    model = wrap_adapter(tiny_causal(TOKENIZER), KINDS["dora"])
    roles = Roles(model)
    check_start(model, roles.use, sharded=False)
    for _, anchor, _ in roles.anchor_pairs:
        anchor.add_(0.1)
    with pytest.raises(ConfigError, match="LORA: before the first step the anchor is"):
        check_start(model, roles.use, sharded=False)


def test_a_kind_that_needs_more_than_a_text_is_refused() -> None:
    config = PolyConfig(r=2, target_modules=LAYERS, n_tasks=2, n_skills=2)
    with pytest.raises(ConfigError, match="POLY"):
        fresh_adapter(tiny_causal(TOKENIZER), config, sharded=False)
    with pytest.raises(ConfigError, match="alora_invocation_tokens"):
        fresh_adapter(tiny_causal(TOKENIZER), lora(alora_invocation_tokens=[5]), sharded=False)


def test_an_adapter_of_another_name_lies_at_the_root_of_its_folder(tmp_path: Path) -> None:
    from peft import get_peft_model

    model = get_peft_model(tiny_causal(TOKENIZER), lora(), adapter_name="anchor")
    learn(model)
    save_adapter(model, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    loaded = PeftModel.from_pretrained(tiny_causal(TOKENIZER), str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))


@torch.no_grad()
def test_an_adapter_on_a_tied_head_leaves_the_embedding_alone() -> None:
    """Merged, it would be added to both: a sampler's model was nats per token away from the trained one."""
    model = get_peft_model(tiny_causal(TOKENIZER, tied=True), LoraConfig(target_modules=["q_proj", "lm_head"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.3)
    ids = torch.arange(20)[None]
    trained = model(input_ids=ids).logits
    assert torch.allclose(without_wrapper(model)(input_ids=ids).logits, trained, atol=1e-5)
