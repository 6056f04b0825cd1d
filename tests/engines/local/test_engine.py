"""The engine against a plain sampler: one row at a time, no cache, no padding, the whole prefix at every token."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from tiny import PROMPTS, tiny_causal, tiny_gpt2, tiny_t5, tiny_tokenizer
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration

from bondlm.engines import Completion
from bondlm.engines.local.decoding import similar_lengths
from bondlm.engines.local.engine import TransformersEngine, row_uniforms, sample_tokens
from bondlm.errors import NonFiniteError, ResourceError
from bondlm.models.adapters import wrap_adapter
from bondlm.models.logprobs import collate, sequence_logprobs
from bondlm.models.roles import Roles

TOKENIZER = tiny_tokenizer()
MODELS: dict[str, Callable[..., Any]] = {"llama": tiny_causal, "gpt2": tiny_gpt2, "t5": tiny_t5}
IDS = [TOKENIZER.encode(prompt) for prompt in PROMPTS[:5]]
SEEDS = [11, 12, 13, 14, 15]
MANY_EOS = list(range(0, 300, 7))  # completions then end at many different lengths
BUDGET = 10


@contextmanager
def lent(model: nn.Module) -> Iterator[nn.Module]:
    yield model


def engine_of(model: nn.Module, *, eos_ids: Sequence[int] = MANY_EOS, **settings: Any) -> TransformersEngine:
    return TransformersEngine(lambda role: lent(model), eos_ids=eos_ids, **{"pad_id": 0, **settings})


def generate(engine: TransformersEngine, num_samples: int = 3, **changes: Any) -> list[list[Completion]]:
    arguments: dict[str, Any] = {"role": "policy", "max_new_tokens": BUDGET, "seeds": SEEDS, "prompts": IDS} | changes
    return engine.generate(arguments.pop("prompts"), num_samples, **arguments)


@torch.no_grad()
def plain_logits(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    if model.config.is_encoder_decoder:
        decoder = [model.config.decoder_start_token_id, *completion]
        out = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([decoder]), use_cache=False)
    else:
        out = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False)
    return out.logits[0, -1]


def plain_sample(
    model: Any, prompt: Sequence[int], uniforms: np.ndarray, eos_ids: Sequence[int], temperature: float = 1.0
) -> list[int]:
    """The first token whose cumulated probability exceeds the uniform number, again and again."""
    ids: list[int] = []
    for uniform in uniforms:
        logits = plain_logits(model, prompt, ids)
        if temperature == 0:
            ids.append(int(logits.argmax()))
        else:
            probs = (logits / temperature).softmax(-1).double().numpy()
            ids.append(int(np.argmax(probs.cumsum() > uniform * probs.sum())))
        if ids[-1] in eos_ids:
            break
    return ids


def plain_samples(model: Any, num_samples: int = 3, temperature: float = 1.0) -> list[list[list[int]]]:
    return [
        [plain_sample(model, prompt, row_uniforms(seed, j, BUDGET), MANY_EOS, temperature) for j in range(num_samples)]
        for prompt, seed in zip(IDS, SEEDS, strict=True)
    ]


def ids_of(completions: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.ids for c in row] for row in completions]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("kind", MODELS)
def test_samples_are_those_of_the_plain_sampler(kind: str, temperature: float) -> None:
    model = MODELS[kind](TOKENIZER)
    completions = generate(engine_of(model), temperature=temperature)
    assert ids_of(completions) == plain_samples(model, temperature=temperature)
    for prompt, row in zip(IDS, completions, strict=True):
        for c in row:
            expected = 0.0
            for t, token in enumerate(c.ids):
                logits = plain_logits(model, prompt, c.ids[:t])
                logps = (logits / (temperature or 1.0)).log_softmax(-1)
                assert c.logprobs[t] == pytest.approx(float(logps[token]), abs=1e-4)
                expected += float(logps[token])
            assert c.logprob == pytest.approx(expected, abs=1e-3)


def other_bart() -> Any:
    """Two encoder layers with 4 heads, three decoder layers with 2."""
    config = BartConfig(
        **{"vocab_size": len(TOKENIZER), "d_model": 32, "max_position_embeddings": 64, "init_std": 0.3},
        **{"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64},
        **{"decoder_layers": 3, "decoder_attention_heads": 2, "decoder_ffn_dim": 64},
    )
    torch.manual_seed(0)
    return BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    "build",
    [partial(tiny_t5, TOKENIZER, decoder_layers=4), partial(tiny_t5, TOKENIZER, decoder_layers=1), other_bart],
    ids=["t5 2 + 4", "t5 2 + 1", "bart 2 + 3"],
)
def test_a_decoder_may_have_other_layers_than_its_encoder(build: Callable[[], Any]) -> None:
    model = build()
    assert ids_of(generate(engine_of(model))) == plain_samples(model)


@pytest.mark.parametrize("kind", MODELS)
def test_end_of_sequence_is_kept_and_the_budget_cuts(kind: str) -> None:
    completions = generate(engine_of(MODELS[kind](TOKENIZER)), 6)
    flat = [c for row in completions for c in row]
    assert {c.finished for c in flat} == {True, False}
    for c in flat:
        assert 1 <= len(c.ids) == len(c.logprobs) <= BUDGET
        assert not set(c.ids[:-1]) & set(MANY_EOS)
        assert c.finished == (c.ids[-1] in MANY_EOS)
        assert c.finished or len(c.ids) == BUDGET


def test_end_of_sequence_on_the_last_token_of_the_budget_is_finished() -> None:
    model = tiny_causal(TOKENIZER)
    (c,) = generate(engine_of(model), 1, prompts=IDS[:1], seeds=SEEDS[:1])[0]
    again = generate(engine_of(model), 1, prompts=IDS[:1], seeds=SEEDS[:1], max_new_tokens=len(c.ids))
    assert again == [[c]]
    assert c.finished


@pytest.mark.parametrize("kind", MODELS)
def test_a_sample_does_not_depend_on_the_batch(kind: str) -> None:
    model = MODELS[kind](TOKENIZER)
    together = generate(engine_of(model), 4)
    for max_rows in (1, 2, 3, 7, 12):
        assert ids_of(generate(engine_of(model, max_rows=max_rows), 4)) == ids_of(together)
    order = [3, 0, 4, 2, 1]
    shuffled = generate(engine_of(model), 4, prompts=[IDS[i] for i in order], seeds=[SEEDS[i] for i in order])
    assert ids_of(shuffled) == [ids_of(together)[i] for i in order]
    for i in range(len(IDS)):
        alone = generate(engine_of(model), 2, prompts=[IDS[i]], seeds=[SEEDS[i]])
        assert ids_of(alone) == [ids_of(together)[i][:2]]  # nor on how many samples are asked for
    # The same prompt with another seed is another sample, and samples of a prompt differ.
    assert ids_of(generate(engine_of(model), 4, seeds=[s + 100 for s in SEEDS])) != ids_of(together)
    assert len({tuple(ids) for row in ids_of(together) for ids in row}) > 15


@pytest.mark.parametrize("kind", MODELS)
def test_rows_that_ended_leave_the_batch(kind: str) -> None:
    model = MODELS[kind](TOKENIZER)
    sizes: list[int] = []

    def note_rows(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        name = "decoder_input_ids" if "decoder_input_ids" in kwargs else "input_ids"
        sizes.append(len(kwargs[name]))

    model.register_forward_pre_hook(note_rows, with_kwargs=True)
    completions = generate(engine_of(model), 6)
    lengths = [len(c.ids) for row in completions for c in row]
    prefill, *steps = sizes
    assert prefill == len(IDS)  # a prompt is prefilled once, not once a sample
    assert steps == sorted(steps, reverse=True)
    assert len(set(steps)) >= 3
    for t, rows in enumerate(steps, start=1):
        running = sum(length > t for length in lengths)
        if kind == "t5":  # no more than a quarter of the rows has ended; when all were kept, nothing to drop
            assert 0.75 * rows < running <= rows
        else:
            assert running == rows


@pytest.mark.parametrize(("max_rows", "num_samples"), [(1, 3), (4, 10), (6, 3), (96, 3)])
def test_at_most_max_rows_are_decoded_together(max_rows: int, num_samples: int) -> None:
    model = tiny_causal(TOKENIZER)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda m, a, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    completions = generate(engine_of(model, max_rows=max_rows, eos_ids=[2]), num_samples)
    assert max(sizes) == min(max_rows, num_samples * len(IDS))
    assert [len(row) for row in completions] == [num_samples] * len(IDS)


@pytest.mark.parametrize("kind", MODELS)
def test_logprobs_are_those_that_the_trainer_computes(kind: str) -> None:
    model = MODELS[kind](TOKENIZER)
    completions = generate(engine_of(model))
    rows = [(prompt, [c.ids]) for prompt, row in zip(IDS, completions, strict=True) for c in row]
    start_id = model.config.decoder_start_token_id if model.config.is_encoder_decoder else None
    with torch.no_grad():
        recomputed = sequence_logprobs(model, collate(rows, 0, start_id=start_id))[:, 0]
    sampled = torch.tensor([c.logprob for row in completions for c in row])
    torch.testing.assert_close(sampled, recomputed, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_the_padding_id_plays_no_part(kind: str) -> None:
    """So a tokenizer whose padding is its end-of-sequence token is as good as any other."""
    model = MODELS[kind](TOKENIZER)
    assert ids_of(generate(engine_of(model, pad_id=MANY_EOS[3]))) == ids_of(generate(engine_of(model, pad_id=5)))


def chi_square_excess(counts: np.ndarray, probs: np.ndarray) -> float:
    """Chi-square over the outcomes with at least 10 expected (the rest pooled), in its own standard deviations."""
    expected = probs * counts.sum()
    common = expected >= 10
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    freedom = len(observed) - 1
    return float(((observed - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("kind", MODELS)
def test_frequencies_follow_the_distribution_of_the_model(kind: str) -> None:
    model = MODELS[kind](TOKENIZER)
    (row,) = generate(engine_of(model), 4000, prompts=IDS[:1], seeds=[5], max_new_tokens=1)
    counts = np.bincount([c.ids[0] for c in row], minlength=300)
    logits = plain_logits(model, IDS[0], [])
    assert abs(chi_square_excess(counts, logits.softmax(-1).double().numpy())) < 5
    assert chi_square_excess(counts, (1.2 * logits).softmax(-1).double().numpy()) > 10  # the check would see another
    assert [c.finished for c in row] == [c.ids[0] in MANY_EOS for c in row]


def test_sample_tokens_by_hand() -> None:
    probs = torch.tensor([[0.2, 0.0, 0.5, 0.3]] * 6)
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = sample_tokens(probs.log(), uniforms, 1.0)
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]  # token 1 has probability 0 and is never taken
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.2, 0.2, 0.5, 0.5, 0.3, 0.3]))
    tokens, logprobs = sample_tokens(probs.log(), uniforms, 0.0)
    assert tokens.tolist() == [2] * 6
    assert logprobs[0].exp().item() == pytest.approx(0.5)


def test_uniforms_belong_to_the_sample_alone() -> None:
    assert np.array_equal(row_uniforms(7, 2, 10)[:4], row_uniforms(7, 2, 4))
    assert not np.array_equal(row_uniforms(7, 2, 4), row_uniforms(7, 3, 4))
    assert not np.array_equal(row_uniforms(7, 2, 4), row_uniforms(8, 2, 4))


def use_of(model: nn.Module) -> Callable[[str], AbstractContextManager[nn.Module]]:
    return Roles(model).use  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_dropout_is_off_while_sampling_and_the_mode_comes_back(kind: str) -> None:
    model = MODELS[kind](TOKENIZER, dropout=0.5)
    expected = plain_samples(model)
    model.train()
    engine = TransformersEngine(use_of(model), eos_ids=MANY_EOS, pad_id=0)
    for role in ("policy", "anchor", "reference"):
        assert ids_of(generate(engine, role=role)) == expected
    assert all(module.training for module in model.modules())
    model.eval()
    generate(engine)
    assert not any(module.training for module in model.modules())


def lora_roles(kind: str) -> tuple[Roles, dict[str, Any]]:
    """Roles with three different distributions, and a plain model of each, the adapter's products added."""
    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    base = MODELS[kind](TOKENIZER)
    plain = {"reference": deepcopy(base)}
    model = wrap_adapter(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type=task))
    roles = Roles(model)
    torch.manual_seed(0)
    own: dict[str, Any] = {"policy": {}, "anchor": {}}
    with torch.no_grad():
        for name, anchor, parameter in roles.anchor_pairs:
            if "lora_B" in name:
                own["policy"][name], own["anchor"][name] = parameter.normal_(std=0.1), anchor.normal_(std=0.1)
    for role, values in own.items():
        merged = deepcopy(model)
        merged.load_state_dict(values, strict=False)
        plain[role] = merged.merge_and_unload().eval()
    return roles, plain


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", MODELS)
def test_every_role_of_a_lora_model_samples_from_its_own_distribution(kind: str) -> None:
    roles, plain = lora_roles(kind)
    engine = TransformersEngine(roles.use, eos_ids=MANY_EOS, pad_id=0)
    samples = {role: ids_of(generate(engine, role=role)) for role in ("policy", "anchor", "reference")}
    for role, ids in samples.items():
        assert ids == plain_samples(plain[role]), role
    assert samples["policy"] != samples["anchor"] != samples["reference"]


@pytest.mark.parametrize("kind", MODELS)
def test_what_all_prompts_begin_with_is_prefilled_once_and_changes_no_sample(kind: str) -> None:
    model = MODELS[kind](TOKENIZER)
    system = TOKENIZER.encode("You answer in one short sentence, and you are kind. ")
    prompts = [system + ids for ids in IDS]
    calls: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda m, a, kwargs: calls.append(tuple(kwargs["input_ids"].shape)) if "input_ids" in kwargs else None,
        with_kwargs=True,
    )
    together = ids_of(generate(engine_of(model), prompts=prompts))
    hook.remove()
    if kind != "t5":
        assert calls[0][0] == 1
        assert calls[0][1] >= len(system) - 1
        assert calls[1] == (len(IDS), max(map(len, prompts)) - calls[0][1])
    for i, prompt in enumerate(prompts):
        assert ids_of(generate(engine_of(model), prompts=[prompt], seeds=[SEEDS[i]])) == [together[i]]


@pytest.mark.parametrize("begin", ["", "You answer in one short sentence, and you are kind. "])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompts_of_similar_length_are_prefilled_together_and_change_no_sample(
    kind: str, begin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[kind](TOKENIZER)
    prompts = [TOKENIZER.encode(begin) + ids for ids in IDS]
    together = ids_of(generate(engine_of(model), prompts=prompts))
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda m, a, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    monkeypatch.setattr("bondlm.engines.local.decoding.PADDING_WORTH_A_PASS", 0)
    assert ids_of(generate(engine_of(model), prompts=prompts)) == together
    shared = shapes.pop(0)[1] if begin else 0
    of_each_length = Counter(len(prompt) - shared for prompt in prompts)
    assert [tuple(s) for s in shapes if s[1] > 1] == [(of_each_length[n], n) for n in sorted(of_each_length)[::-1]]
    assert len(of_each_length) > 2


def test_a_group_of_similar_lengths_ends_before_its_padding_is_worth_a_pass() -> None:
    lengths = [90, 80, 80, 30, 30, 29, 5]
    groups = [list(group) for group in similar_lengths(lengths, worth_a_pass=20)]
    assert groups == [[0, 1, 2], [3, 4, 5], [6]]
    assert [list(g) for g in similar_lengths(lengths, worth_a_pass=math.inf)] == [list(range(7))]
    assert [len(g) for g in similar_lengths(lengths, worth_a_pass=0)] == [1, 2, 2, 1, 1]
    parts = similar_lengths(lengths, worth_a_pass=math.inf, most_tokens=85)
    assert [list(g) for g in parts] == [[0], [1], [2], [3, 4], [5, 6]]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_many_long_prompts_are_prefilled_a_part_at_a_time_and_change_no_sample(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator, where padding ends no group."""
    model = MODELS[kind](TOKENIZER)
    monkeypatch.setattr("bondlm.engines.local.decoding.PADDING_WORTH_A_PASS", math.inf)
    together = ids_of(generate(engine_of(model)))
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(lambda m, a, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    most = 2 * max(map(len, IDS))
    monkeypatch.setattr("bondlm.engines.local.decoding.PREFILL_TOKENS", most)
    assert ids_of(generate(engine_of(model))) == together
    prefills = [shape for shape in shapes if shape[1] > 1]
    assert 1 < len(prefills) < len(IDS)
    assert all(shape.numel() <= most for shape in prefills)
    assert sum(shape[0] for shape in prefills) == len(IDS)


def greedy_for_memory(model: Any, most_rows: int, message: str = "DefaultCPUAllocator: can't allocate memory") -> None:
    """Let the model fail as torch does when it is given more than `most_rows` rows."""

    def check(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if len(kwargs.get("input_ids", kwargs.get("decoder_input_ids"))) > most_rows:  # type: ignore[arg-type]
            raise RuntimeError(message)

    model.register_forward_pre_hook(check, with_kwargs=True)


@pytest.mark.parametrize("kind", MODELS)
def test_out_of_memory_halves_the_rows_and_changes_no_sample(kind: str) -> None:
    model = MODELS[kind](TOKENIZER)
    expected = ids_of(generate(engine_of(model), 4))
    greedy_for_memory(model, 3)
    engine = engine_of(model)
    with pytest.warns(UserWarning, match=r"out of memory.*\d rows.*\d"):
        assert ids_of(generate(engine, 4)) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the engine remembers: it does not run out again
        assert ids_of(generate(engine, 4)) == expected


@pytest.mark.filterwarnings("ignore:bondlm. out of memory")
def test_out_of_memory_with_one_row_says_what_to_do() -> None:
    model = tiny_causal(TOKENIZER)
    greedy_for_memory(model, 0)
    with pytest.raises(ResourceError, match=r"out of memory.*max_completion_length"):
        generate(engine_of(model))


def test_an_error_that_only_mentions_memory_is_not_retried() -> None:
    model = tiny_causal(TOKENIZER)
    greedy_for_memory(model, 0, "a bad memory")
    with pytest.raises(RuntimeError, match="a bad memory"):
        generate(engine_of(model))


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_model_that_breaks_down_draws_nothing(temperature: float) -> None:
    """NaN would be drawn as the last token of the vocabulary, over and over."""
    model = tiny_causal(TOKENIZER)
    engine = engine_of(model)
    generate(engine, temperature=temperature)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="log-probability"):
        generate(engine, temperature=temperature)
