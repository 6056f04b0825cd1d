"""Policy and anchor in one batch: the samples that each gives alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny import PROMPTS, tiny_causal, tiny_gpt2, tiny_t5, tiny_tokenizer
from torch import nn

from bondlm.engines import Role
from bondlm.engines.local.engine import TransformersEngine
from bondlm.models.adapters import wrap_adapter
from bondlm.models.roles import Roles
from bondlm.models.row_adapters import RowAdapters, RowsNotKnownError, can_join, joined

TOKENIZER = tiny_tokenizer()
MODELS: dict[str, Callable[..., Any]] = {"llama": tiny_causal, "gpt2": tiny_gpt2, "t5": tiny_t5}
SYSTEM = TOKENIZER.encode("All begin alike. ")
IDS = [SYSTEM + TOKENIZER.encode(prompt) for prompt in PROMPTS[:4]]
MANY_EOS = list(range(0, 300, 7))
WANTED: dict[Role, tuple[int, list[int]]] = {"policy": (1, [11, 12, 13, 14]), "anchor": (3, [21, 22, 23, 24])}
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


def roles_of(kind: str = "llama", **settings: Any) -> Roles:
    """Two adapters that differ from each other and from the base."""
    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    lora: dict[str, Any] = {"r": 3, "lora_alpha": 12, "target_modules": "all-linear", "task_type": task}
    roles = Roles(wrap_adapter(MODELS[kind](TOKENIZER), LoraConfig(**lora | settings)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, anchor, parameter in roles.anchor_pairs:
            for tensor in (parameter, anchor):
                tensor.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return roles


def engine_of(roles: Roles, *, together: bool, **settings: Any) -> TransformersEngine:
    use_together = roles.use_together if together else None
    return TransformersEngine(roles.use, eos_ids=MANY_EOS, pad_id=0, use_together=use_together, **settings)


def count_calls(model: nn.Module) -> list[int]:
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("worth_a_pass", [64, 0])  # with 0 every length is prefilled by itself
@pytest.mark.parametrize("max_rows", [None, 5])
@pytest.mark.parametrize("kind", MODELS)
def test_one_batch_gives_what_each_role_gives_alone(
    kind: str, max_rows: int | None, worth_a_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bondlm.engines.local.decoding.PADDING_WORTH_A_PASS", worth_a_pass)
    roles = roles_of(kind)
    calls = count_calls(roles.core)
    alone = engine_of(roles, together=False, max_rows=max_rows).generate_roles(IDS, WANTED, max_new_tokens=12)
    calls_alone = len(calls)
    before = dict(roles.model.named_parameters())
    one = engine_of(roles, together=True, max_rows=max_rows).generate_roles(IDS, WANTED, max_new_tokens=12)
    if max_rows is None:
        assert len(calls) - calls_alone < 0.7 * calls_alone  # it was one batch
    assert list(one) == ["policy", "anchor"]
    ids = {role: [[c.ids for c in row] for row in rows] for role, rows in alone.items()}
    assert {role: [[c.ids for c in row] for row in rows] for role, rows in one.items()} == ids
    assert [row[:1] for row in ids["anchor"]] != ids["policy"]  # the two distributions differ
    for role, rows in alone.items():
        for a, b in zip(rows, one[role], strict=True):
            assert [c.logprob for c in a] == pytest.approx([c.logprob for c in b], abs=1e-4)
    after = dict(roles.model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_samples_in_mixed_precision_are_near_those_of_each_role_alone() -> None:
    roles = roles_of()
    roles.autocast = torch.bfloat16
    together = roles.use_together(("policy", "anchor"))
    assert together is not None
    ids = torch.tensor([IDS[0], IDS[0]])
    with torch.no_grad(), together as (model, rows):
        rows.set([0, 1])
        one = model(input_ids=ids).logits
    for k, role in enumerate(("policy", "anchor")):
        with torch.no_grad(), roles.use(role) as model:
            torch.testing.assert_close(one[k], model(input_ids=ids).logits[k], atol=0.05, rtol=0.05)
    assert one.dtype == torch.bfloat16
    assert float((one[0] - one[1]).abs().max()) > 0.5


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}])
def test_other_adapters_than_plain_lora_are_drawn_one_by_one(settings: dict[str, Any]) -> None:
    roles = roles_of(target_modules=["q_proj", "v_proj"], **settings)
    assert not can_join(roles.model)
    assert roles.use_together(("policy", "anchor")) is None
    drawn = engine_of(roles, together=True).generate_roles(IDS, WANTED, max_new_tokens=3)
    assert [len(row) for row in drawn["anchor"]] == [3] * 4


def test_full_copies_and_the_reference_are_not_adapters_of_one_model() -> None:
    assert Roles(tiny_causal(TOKENIZER)).use_together(("policy", "anchor")) is None
    assert roles_of().use_together(("policy", "reference")) is None


def test_a_layer_that_sees_tokens_instead_of_rows_is_noticed_and_costs_the_common_batch_alone() -> None:
    roles = roles_of()
    own = dict(roles.model.named_parameters())
    with joined(roles.model, [own], rows := RowAdapters(2, torch.device("cpu"))):
        rows.set([0, 1, 1])
        layer = next(m for m in roles.model.modules() if hasattr(m, "lora_A")).lora_A["default"]
        assert layer(torch.zeros(3, 4, 32)).shape == (3, 4, 6)
        with pytest.raises(RowsNotKnownError, match=r"3 rows.*\(12, 6\)"):
            layer(torch.zeros(12, 32))
    alone = engine_of(roles, together=False).generate_roles(IDS, WANTED, max_new_tokens=3)
    mlp = roles.core.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x.flatten(0, 1)).view(x.shape)  # as experts are called
    engine = engine_of(roles, together=True)
    for _ in range(2):
        assert engine.generate_roles(IDS, WANTED, max_new_tokens=3) == alone
