"""Steps that can be recorded as a CUDA graph give the samples of steps that cannot.

Without a GPU nothing is recorded: the same steps (a cache at full length, a mask, in-place counters) run one by one,
and only the recording itself is left to tests that are skipped there.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny import PROMPTS, tiny_causal, tiny_gpt2, tiny_t5, tiny_tokenizer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    FalconConfig,
    FalconForCausalLM,
    Gemma3Config,
    MixtralConfig,
    MixtralForCausalLM,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from bondlm.engines.local.cuda_graph import CudaGraphs
from bondlm.engines.local.engine import TransformersEngine
from bondlm.models.adapters import wrap_adapter
from bondlm.models.roles import Roles

TOKENIZER = tiny_tokenizer()
SYSTEM = TOKENIZER.encode("All of these begin alike. ")
IDS = [SYSTEM + TOKENIZER.encode(prompt) for prompt in PROMPTS[:6]]
MANY_EOS = list(range(0, 300, 17))


def tiny_umt5(tokenizer: Any) -> Any:
    """Each layer has relative positions of its own."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes)
    return UMT5ForConditionalGeneration(config).eval()


MODELS: dict[str, Callable[..., Any]] = {
    "llama": tiny_causal,
    "gpt2": tiny_gpt2,
    "t5": tiny_t5,
    "umt5": tiny_umt5,
}
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
DEVICES = ["cpu", CUDA]


@pytest.fixture(autouse=True)
def _also_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU step as a GPU does; what it could not record there is not recorded here."""
    usable = CudaGraphs.usable

    def anywhere(self: CudaGraphs, model: Any) -> bool:
        with monkeypatch.context() as m:
            m.setattr(type(model), "device", torch.device("cuda"))
            return usable(self, model)

    monkeypatch.setattr(CudaGraphs, "usable", anywhere)


def engine_of(model: Any, **settings: Any) -> TransformersEngine:
    @contextmanager
    def use(role: str) -> Iterator[Any]:
        yield model

    return TransformersEngine(use, eos_ids=MANY_EOS, pad_id=0, **settings)


def drawn(engine: TransformersEngine, num_samples: int, seed: int = 0) -> list[list[list[int]]]:
    seeds = [seed + i for i in range(len(IDS))]
    rows = engine.generate(IDS, num_samples, role="policy", max_new_tokens=20, seeds=seeds)
    return [[c.ids for c in row] for row in rows]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_samples", [2, 25])  # of 150 rows some leave the batch on the way
@pytest.mark.parametrize("kind", MODELS)
def test_samples_are_those_of_ordinary_steps(kind: str, num_samples: int, device: str) -> None:
    model = MODELS[kind](TOKENIZER).to(device)
    ordinary = drawn(engine_of(model, cuda_graphs=False), num_samples)
    engine = engine_of(model)
    assert drawn(engine, num_samples) == ordinary
    assert engine._graphs.wanted
    with torch.no_grad():  # other weights in the same place: nothing of the last rollout is left
        for parameter in model.parameters():
            parameter.mul_(1.3)
    ordinary = drawn(engine_of(model, cuda_graphs=False), num_samples, seed=9)
    assert drawn(engine, num_samples, seed=9) == ordinary


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_two_roles_in_one_batch(device: str, autocast: torch.dtype | None) -> None:
    roles = Roles(wrap_adapter(tiny_causal(TOKENIZER), LoraConfig(r=3, target_modules="all-linear")))
    roles.autocast = autocast
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in roles.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    roles.model.to(device)
    wanted: Any = {"policy": (1, range(6)), "anchor": (2, range(10, 16))}
    results = []
    for graphs in (True, False):
        engine = TransformersEngine(
            roles.use, eos_ids=MANY_EOS, pad_id=0, use_together=roles.use_together, cuda_graphs=graphs
        )
        results.append(engine.generate_roles(IDS, wanted, max_new_tokens=12))
        assert engine._graphs.wanted == graphs
    for role in ("policy", "anchor"):
        one, two = ([c for row in result[role] for c in row] for result in results)
        pairs = list(zip(one, two, strict=True))
        same = [a.ids == b.ids for a, b in pairs]
        assert all(same) if autocast is None else sum(same) > 0.7 * len(same)  # bf16 rounding tips a token now and then
        for a, b in pairs:
            if a.ids == b.ids:
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4 if autocast is None else 0.2)


def test_the_decoder_of_t5_is_stepped_at_a_fixed_length() -> None:
    """Every step but the first, which fills what the decoder reads of the prompt; adapters of two roles, too."""
    roles = Roles(wrap_adapter(tiny_t5(TOKENIZER), LoraConfig(r=3, target_modules="all-linear")))
    with torch.no_grad():
        for parameter in roles.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter) * parameter.requires_grad)
    masks: list[Any] = []
    core = roles.core
    core.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs.get("decoder_attention_mask")), with_kwargs=True
    )
    wanted: Any = {role: (3, list(range(len(IDS)))) for role in ("policy", "anchor")}
    how: Any = {"eos_ids": MANY_EOS, "pad_id": 0, "use_together": roles.use_together}
    ordinary = TransformersEngine(roles.use, **how, cuda_graphs=False).generate_roles(IDS, wanted, max_new_tokens=12)
    assert not any(mask is not None for mask in masks)
    masks.clear()
    fixed = TransformersEngine(roles.use, **how).generate_roles(IDS, wanted, max_new_tokens=12)
    assert len({mask.shape[-1] for mask in masks if mask is not None}) == 1
    for role, rows in ordinary.items():
        assert [[c.ids for c in row] for row in fixed[role]] == [[c.ids for c in row] for row in rows]
        for mine, theirs in zip(fixed[role], rows, strict=True):
            for one, other in zip(mine, theirs, strict=True):
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def is_fixed(kwargs: dict[str, Any]) -> bool:
    """Whether a model's call is a step that can be recorded."""
    return kwargs.get("attention_mask", torch.zeros(0)).dim() == 4


def test_a_model_that_reads_its_mask_otherwise_is_found_out() -> None:
    """Falcon with ALiBi says that it can be compiled, and counts positions from a mask of two axes."""
    sizes = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = FalconForCausalLM(FalconConfig(**sizes, alibi=True, multi_query=False)).eval()
    assert CudaGraphs().usable(model)
    engine = engine_of(model)
    with pytest.warns(UserWarning, match="CUDA graphs"):
        samples = drawn(engine, 2)
    assert samples == drawn(engine_of(model, cuda_graphs=False), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drawn(engine, 2) == samples  # said once


def test_another_distribution_is_found_out() -> None:
    model = tiny_causal(TOKENIZER)
    forward = model.forward

    def forgets_its_mask(*args: Any, **kwargs: Any) -> Any:
        if is_fixed(kwargs):
            kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])
        return forward(*args, **kwargs)

    model.forward = forgets_its_mask
    engine = engine_of(model)
    with pytest.warns(UserWarning, match=r"CUDA graphs.* 0\.\d\d .*total variation"):
        samples = drawn(engine, 2)
    assert samples == drawn(engine_of(model, cuda_graphs=False), 2)


def test_out_of_memory_is_no_reason_to_do_without() -> None:
    model = tiny_causal(TOKENIZER)
    expected = drawn(engine_of(model, cuda_graphs=False), 3)
    failures = iter([True])

    def fail_once(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if is_fixed(kwargs) and next(failures, False):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    model.register_forward_pre_hook(fail_once, with_kwargs=True)
    engine = engine_of(model)
    with pytest.warns(UserWarning, match=r"out of memory.*\b18 rows.*\b9\b"):
        assert drawn(engine, 3) == expected
    assert engine._graphs.wanted


def attempts_of(outcomes: list[Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    """Record with recordings that end as `outcomes` say; returns the result and what was done in between."""
    done: list[str] = []

    def recorded(work: Any, stream: Any) -> Any:
        done.append("record")
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr("bondlm.engines.local.cuda_graph._recorded", recorded)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda: object())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty"))
    return CudaGraphs().record(lambda: torch.zeros(1), torch.device("cuda")), done


def test_a_recording_without_memory_is_tried_again_in_an_emptied_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    full = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    assert attempts_of([full, "recording"], monkeypatch) == ("recording", ["record", "empty", "record"])
    with pytest.raises(RuntimeError, match="out of memory"):
        attempts_of([full, full], monkeypatch)


def test_a_recording_that_fails_otherwise_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match=r"CUDA graphs.*operation not permitted"):
        assert attempts_of([RuntimeError("operation not permitted")], monkeypatch) == (None, ["record"])


def tiny_bart() -> Any:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
    return BartForConditionalGeneration(BartConfig(vocab_size=len(TOKENIZER), **sizes))


def test_what_is_never_recorded() -> None:
    graphs = CudaGraphs()
    assert graphs.usable(tiny_causal(TOKENIZER))
    assert not CudaGraphs(wanted=False).usable(tiny_causal(TOKENIZER))
    assert not graphs.usable(tiny_bart())  # its positions are counted in Python
    sees_images = deepcopy(tiny_causal(TOKENIZER))  # Gemma 3: the window is in the config of its language model
    sees_images.config = Gemma3Config(text_config={"sliding_window": 16, "num_hidden_layers": 2})
    sees_images.config._attn_implementation = "sdpa"
    assert not graphs.usable(sees_images)
    spread = tiny_causal(TOKENIZER)
    spread.hf_device_map = {"": 0}
    assert not graphs.usable(spread)
    eager = tiny_causal(TOKENIZER)
    eager.set_attn_implementation("eager")
    assert not graphs.usable(eager)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_recording_replays_and_a_model_that_cannot_be_recorded_goes_on_without() -> None:
    model = tiny_causal(TOKENIZER).cuda()
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    engine = engine_of(model)
    drawn(engine, 2)
    calls.clear()
    drawn(engine, 2)
    assert len(calls) == 4  # the common beginning, the rest, one step as warm-up, one that is recorded
    config = MixtralConfig(
        **{"vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": None},
        experts_implementation="eager",  # asks on the CPU which experts were chosen: no graph can do that
    )
    torch.manual_seed(0)
    experts = MixtralForCausalLM(config).eval().cuda()
    engine = engine_of(experts)
    with pytest.warns(UserWarning, match="CUDA graphs"):
        samples = drawn(engine, 2)
    assert samples == drawn(engine_of(experts, cuda_graphs=False), 2)
    torch.cuda.empty_cache()  # the device is as usable as before
    held = torch.cuda.memory_reserved()
    torch.rand(2**20, device="cuda")
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == held
    assert drawn(engine_of(tiny_causal(TOKENIZER).cuda()), 2)
