"""Policy, anchor and reference of one model: each is what it says, and only the policy trains."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from tiny import PROMPTS, tiny_causal, tiny_gpt2, tiny_t5, tiny_tokenizer
from torch import Tensor, nn

from bondlm.models.adapters import wrap_adapter
from bondlm.models.roles import Roles

TOKENIZER = tiny_tokenizer()
IDS = torch.tensor([TOKENIZER.encode(PROMPTS[0])])
ROLES = ("policy", "anchor", "reference")
MODELS: dict[str, Callable[..., Any]] = {"llama": tiny_causal, "gpt2": tiny_gpt2, "t5": tiny_t5}
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


def lora(kind: str = "llama", **settings: Any) -> LoraConfig:
    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    arguments: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": task}
    return LoraConfig(**arguments | settings)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    extra = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **extra).logits


def logits_of(roles: Roles, role: str) -> Tensor:
    with roles.use(role) as model:
        assert not any(module.training for module in model.modules())
        return logits(model)


def shake(model: nn.Module, word: str, seed: int = 0) -> None:
    """Random values for the parameters whose name has `word`."""
    shake_all({name: p for name, p in model.named_parameters() if word in name}, seed)


def shake_anchor(roles: Roles, seed: int) -> None:
    shake_all({name: anchor for name, anchor, _ in roles.anchor_pairs}, seed)


def shake_all(tensors: dict[str, Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))


def merged(model: PeftModel, anchor_of: Roles | None = None) -> nn.Module:
    """A plain model of the policy, or of the anchor."""
    plain = deepcopy(model)
    anchors = {} if anchor_of is None else {name: anchor for name, anchor, _ in anchor_of.anchor_pairs}
    plain.load_state_dict(anchors, strict=False)
    return plain.merge_and_unload().eval()


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def fresh_roles(kind: str = "llama", **settings: Any) -> Roles:
    return Roles(wrap_adapter(MODELS[kind](TOKENIZER), lora(kind, **settings)))


@pytest.mark.parametrize("kind", MODELS)
def test_lora_roles_are_the_separately_merged_models(kind: str) -> None:
    base = MODELS[kind](TOKENIZER)
    expected = {"reference": logits(base)}
    roles = Roles(wrap_adapter(base, lora(kind)))
    for role in ROLES:  # all three start as the reference
        torch.testing.assert_close(logits_of(roles, role), expected["reference"], atol=1e-6, rtol=0)
    shake(roles.model, "lora_", seed=1)
    shake_anchor(roles, seed=2)
    expected["policy"] = logits(merged(roles.model))
    expected["anchor"] = logits(merged(roles.model, anchor_of=roles))
    assert not torch.allclose(expected["policy"], expected["anchor"], atol=0.1)
    assert not torch.allclose(expected["policy"], expected["reference"], atol=0.1)
    for role in (*ROLES, *reversed(ROLES)):
        torch.testing.assert_close(logits_of(roles, role), expected[role], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(logits(roles.model), expected["policy"], atol=1e-4, rtol=1e-5)


def test_a_trained_adapter_is_its_own_reference() -> None:
    model = wrap_adapter(tiny_causal(TOKENIZER), lora())
    shake(model, "lora_B")
    start = logits(merged(model))
    roles = Roles(model)
    for role in ROLES:
        torch.testing.assert_close(logits_of(roles, role), start, atol=2e-5, rtol=1e-5)
    shake(model, "lora_B.default", seed=9)
    moved = logits(merged(model))
    assert not torch.allclose(start, moved, atol=0.1)
    torch.testing.assert_close(logits_of(roles, "policy"), moved, atol=2e-5, rtol=1e-5)
    for role in ("anchor", "reference"):
        torch.testing.assert_close(logits_of(roles, role), start, atol=2e-5, rtol=1e-5)
    assert trainable(model) == {name for name, _ in model.named_parameters() if ".default." in name}


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("role", ROLES)
def test_after_an_exception_the_policy_is_active_and_alone_trains(role: str, mode: bool, trained: bool) -> None:
    model = wrap_adapter(tiny_gpt2(TOKENIZER), lora("gpt2"))
    if trained:
        shake(model, "lora_B")
    roles = Roles(model)
    shake(model, "lora_B.default", seed=2)
    policy = logits(merged(model))
    model.train(mode)
    before = trainable(model)
    with pytest.raises(ZeroDivisionError), roles.use(role):
        raise ZeroDivisionError
    assert model.active_adapter == "default"
    assert trainable(model) == before == {name for name, _ in model.named_parameters() if ".default." in name}
    assert all(module.training == mode for module in roles.core.modules())
    model.eval()
    torch.testing.assert_close(logits(model), policy, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_frozen_factors_stay_frozen(trained: bool) -> None:
    """With A frozen the average of the factors is exactly the average of the weights: PEFT must not thaw it."""
    model = wrap_adapter(tiny_causal(TOKENIZER), lora())
    if trained:
        shake(model, "lora_B")
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = trainable(model)
    roles = Roles(model)
    for role in ROLES:
        assert trainable(model) == before
        logits_of(roles, role)
    assert trainable(model) == before
    assert all("lora_B.default" in name for name in before)


def test_fully_trained_modules_beside_the_adapter_have_roles_too() -> None:
    base = tiny_causal(TOKENIZER)
    start = logits(base)
    roles = fresh_roles(modules_to_save=["lm_head"])
    pairs = {name: (anchor, policy) for name, anchor, policy in roles.anchor_pairs}
    (head,) = [name for name in pairs if "lm_head" in name]
    assert {name for name, _, policy in roles.anchor_pairs if policy.requires_grad} == trainable(roles.model)
    with torch.no_grad():
        pairs[head][1].mul_(2)
    torch.testing.assert_close(logits_of(roles, "policy"), 2 * start, atol=1e-4, rtol=1e-5)
    for role in ("anchor", "reference"):
        torch.testing.assert_close(logits_of(roles, role), start, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_full_copies_do_not_move_with_the_policy(kind: str) -> None:
    model = MODELS[kind](TOKENIZER)
    start = logits(model)
    roles = Roles(model.train())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert not torch.allclose(logits_of(roles, "policy"), start, atol=0.1)
    for role in ("anchor", "reference"):
        assert torch.equal(logits_of(roles, role), start)
        with roles.use(role) as copy:
            assert trainable(copy) == set()
    assert all(module.training for module in model.modules())
    assert trainable(model) == {name for name, _ in model.named_parameters()}


def test_the_pairs_are_what_trains() -> None:
    roles = fresh_roles()
    pairs = roles.anchor_pairs
    assert {name for name, _, _ in pairs} == trainable(roles.model)
    assert not any(anchor.requires_grad for _, anchor, _ in pairs)
    assert len({id(p) for _, anchor, policy in pairs for p in (anchor, policy)}) == 2 * len(pairs)
    model = tiny_causal(TOKENIZER)
    model.get_input_embeddings().weight.requires_grad_(False)
    roles = Roles(model)
    assert {name for name, _, _ in roles.anchor_pairs} == trainable(model)
    with roles.use("anchor") as anchor_model:
        named = dict(anchor_model.named_parameters())
        assert all(named[name] is anchor for name, anchor, _ in roles.anchor_pairs)


def test_adapters_are_fp32_on_a_bf16_base() -> None:
    roles = Roles(wrap_adapter(tiny_causal(TOKENIZER, dtype=torch.bfloat16), lora()))
    assert {p.dtype for _, anchor, policy in roles.anchor_pairs for p in (anchor, policy)} == {torch.float32}
    assert roles.core.get_input_embeddings().weight.dtype == torch.bfloat16


def test_the_reference_is_on_the_accelerator_only_while_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full fine-tuning holds policy, optimizer and one anchor there. Seen by what is moved: no accelerator is here."""
    roles = Roles(tiny_causal(tiny_tokenizer()))
    moves: list[str] = []
    monkeypatch.setattr(roles._copies["anchor"], "to", lambda device: moves.append(f"anchor to {device}"))
    monkeypatch.setattr(
        "bondlm.models.roles._copied_to", lambda device, data: moves.append(str(device)) or data.clone()
    )
    roles.to(torch.device("cuda"))
    assert moves == ["anchor to cuda"]
    with roles.use("anchor"), roles.use("policy"):
        assert moves == ["anchor to cuda"]
    reference = roles._copies["reference"]
    at_rest = {name: (p.data_ptr(), p.clone()) for name, p in reference.named_parameters()}
    with roles.use("reference") as model:
        assert set(moves[1:]) == {"cuda"}
        for name, p in model.named_parameters():
            assert p.data_ptr() != at_rest[name][0]
            assert torch.equal(p, at_rest[name][1])
    for name, p in reference.named_parameters():  # the same memory again: nothing was copied back
        assert p.data_ptr() == at_rest[name][0]
    assert len(moves) == 1 + len([*reference.parameters(), *reference.buffers()])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("peft", [False, True])
def test_mixed_precision_is_that_of_autocast_in_every_role_and_leaves_the_weights_alone(kind: str, peft: bool) -> None:
    model = MODELS[kind](TOKENIZER)
    roles = Roles(wrap_adapter(model, lora(kind)) if peft else model)
    if peft:
        shake(roles.model, "lora_B.default")
    plain = {role: logits_of(roles, role) for role in ROLES}
    before = list(roles.model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        wanted = {role: logits_of(roles, role) for role in ROLES}
    roles.autocast = torch.bfloat16
    for role in ROLES:
        seen = logits_of(roles, role)
        assert torch.equal(seen, wanted[role])
        assert not torch.equal(seen.float(), plain[role])  # it did compute in bf16
    assert all(a is b for a, b in zip(before, roles.model.parameters(), strict=True))
