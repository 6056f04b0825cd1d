"""Merging folders of trained policies: the weights that come out, and what is refused."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_causal, tiny_t5, tiny_tokenizer
from torch import Tensor
from transformers import GenerationConfig

from bondlm.errors import ConfigError
from bondlm.models.adapters import save_adapter
from bondlm.models.load import load_model
from bondlm.models.merge import Merge, merge_folders
from bondlm.models.task_vectors import Merging


def base(folder: Path, *, seed: int = 0, make: Callable[..., Any] = tiny_causal, **of_tokenizer: Any) -> Path:
    tokenizer = tiny_tokenizer(**of_tokenizer)
    make(tokenizer, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapter(folder: Path, of: Path, seed: int, **lora: Any) -> Path:
    """An adapter on the model `of`, or further training of the adapter `of`, with values that depend on the seed."""
    model: Any = load_model(of, dtype=torch.float32)
    torch.manual_seed(seed)
    if not isinstance(model, PeftModel):
        settings = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | lora
        model = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(model, folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def trained(folder: Path, of: Path, seed: int) -> Path:
    """All weights of the model `of`, moved."""
    model: Any = load_model(of, dtype=torch.float32)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    """Every weight as the model computes with it, its adapter merged."""
    model: Any = load_model(folder, dtype=torch.float32)
    model = model.merge_and_unload() if isinstance(model, PeftModel) else model
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def spherical(one: Tensor, two: Tensor) -> Tensor:
    if not (one.any() and two.any()):
        return (one + two) / 2
    angle = math.acos(float((one * two).sum() / (one.norm() * two.norm())))
    return (one + two) * math.sin(angle / 2) / math.sin(angle)


def expected(method: str, start: Path, runs: list[Path], toward: float) -> dict[str, Tensor]:
    theta, (one, two) = weights(start), [weights(run) for run in runs]
    mix = spherical if method == "slerp" else lambda d, e: (d + e) / 2
    return {n: theta[n] + (1 - toward) * mix(one[n] - theta[n], two[n] - theta[n]) for n in theta}


def check(merge: Merge, out: Path, want: dict[str, Tensor], *, toward: float) -> None:
    assert merge.write(out, toward_reference=toward) < 1e-6
    got = weights(out)
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["mean", "slerp"])
@pytest.mark.parametrize("lora", [{}, {"use_rslora": True, "modules_to_save": ["lm_head"]}], ids=["plain", "rslora"])
def test_adapters_merge_as_the_weights_that_they_stand_for(tmp_path: Path, method: Any, lora: dict[str, Any]) -> None:
    start = base(tmp_path / "base")
    runs = [adapter(tmp_path / f"run{seed}", start, seed, **lora) for seed in (1, 2)]
    merge = merge_folders(runs, [str(start)] * 2, method=method)
    assert (merge.rank, merge.full_rank) == (4, 4)
    check(merge, tmp_path / "out", expected(method, start, runs, 0.3), toward=0.3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "lora", [{"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
def test_adapters_with_a_head_that_the_base_ties(tmp_path: Path, lora: dict[str, Any]) -> None:
    """The merged head is the mean of the runs' heads, and the embedding stays the base's."""
    start = base(tmp_path / "base", make=partial(tiny_causal, tied=True))
    runs = [adapter(tmp_path / f"run{seed}", start, seed, **lora) for seed in (1, 2)]
    merge_folders(runs, [str(start)] * 2, method="mean").write(tmp_path / "out", toward_reference=0.0)
    states = torch.randn(5, 32)

    def embedding_and_head(folder: Path) -> tuple[Tensor, Tensor]:
        model = load_model(folder, dtype=torch.float32)
        return model.get_input_embeddings().weight.detach(), model.get_output_embeddings()(states).detach()

    (embedding, head), (of_base, untouched) = embedding_and_head(tmp_path / "out"), embedding_and_head(start)
    one, two = (embedding_and_head(run)[1] for run in runs)
    assert torch.equal(embedding, of_base)
    torch.testing.assert_close(head, (one + two) / 2, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(head, untouched, atol=1e-2)


def test_numbers_that_runs_moved_apart_get_their_mean() -> None:
    merging = Merging("slerp")
    for value in (0.001, -0.002):
        merging.add(torch.tensor([value]))
    torch.testing.assert_close(merging.merged("scale"), torch.tensor([-0.0005]))
    merging = Merging("slerp")
    for sign in (1, -1):
        merging.add(sign * torch.ones(2))
    with pytest.raises(ConfigError, match="moved gate in opposite directions"):
        merging.merged("gate")


def test_ranks_that_differ_by_layer_and_embeddings(tmp_path: Path) -> None:
    start = base(tmp_path / "base")
    lora = {"target_modules": ["embed_tokens", "q_proj", "up_proj"], "rank_pattern": {"q_proj": 3}}
    lora |= {"alpha_pattern": {"up_proj": 1, "^model.layers.0.self_attn.q_proj": 48}}
    runs = [adapter(tmp_path / f"run{seed}", start, seed, **lora) for seed in (1, 2)]
    merge = merge_folders(runs, [str(start)] * 2, method="slerp")
    assert merge.full_rank == 6
    check(merge, tmp_path / "out", expected("slerp", start, runs, 0.0), toward=0.0)


def test_a_lower_rank_says_its_error(tmp_path: Path) -> None:
    start = base(tmp_path / "base")
    runs = [adapter(tmp_path / f"run{seed}", start, seed) for seed in (1, 2)]
    error = merge_folders(runs, [str(start)] * 2, method="mean", rank=2).write(tmp_path / "out", toward_reference=0.0)
    want, got, theta = expected("mean", start, runs, 0.0), weights(tmp_path / "out"), weights(start)
    lost = sum(float((got[n] - want[n]).square().sum()) for n in theta)
    whole = sum(float((want[n] - theta[n]).square().sum()) for n in theta)
    assert 0.05 < error < 1
    assert error == pytest.approx(math.sqrt(lost / whole), rel=1e-3)
    with pytest.raises(ConfigError, match="rank=5"):
        merge_folders(runs, [str(start)] * 2, method="mean", rank=5)


def test_runs_that_went_on_from_an_adapter_merge_around_it(tmp_path: Path) -> None:
    start = adapter(tmp_path / "start", base(tmp_path / "base"), 7)
    runs = [adapter(tmp_path / f"run{seed}", start, seed) for seed in (1, 2)]
    merge = merge_folders(runs, [str(start)] * 2, method="slerp")
    assert merge.full_rank == 6  # of the runs, and of the adapter that they started with
    merge.write(tmp_path / "out", toward_reference=0.5)
    theta, (one, two), got = weights(start), [weights(run) for run in runs], weights(tmp_path / "out")
    for name in theta:
        want = theta[name] + 0.5 * spherical(one[name] - theta[name], two[name] - theta[name])
        torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "make"), [("slerp", tiny_causal), ("mean", tiny_t5)])
def test_whole_models_merge_tensor_by_tensor(tmp_path: Path, method: Any, make: Any) -> None:
    start = base(tmp_path / "base", make=make)
    runs = [trained(tmp_path / f"run{seed}", start, seed) for seed in (1, 2)]
    merge = merge_folders(runs, [str(start)] * 2, method=method)
    theta, moved = weights(start), [weights(run) for run in runs]
    of_runs = [math.sqrt(sum(float((w[n] - theta[n]).square().sum()) for n in theta)) for w in moved]
    assert merge.norms == pytest.approx(of_runs)
    check(merge, tmp_path / "out", expected(method, start, runs, 0.7), toward=0.7)
    with pytest.raises(ConfigError, match="rank"):
        merge_folders(runs, [str(start)] * 2, method=method, rank=2)


def test_what_has_no_merge_is_refused_by_name(tmp_path: Path) -> None:
    start, other = base(tmp_path / "base"), base(tmp_path / "other", seed=5)
    one, two = (adapter(tmp_path / f"run{seed}", start, seed) for seed in (1, 2))
    tokens = adapter(tmp_path / "tokens", start, 3)
    tiny_tokenizer(adds_bos=True).save_pretrained(tokens)
    template = adapter(tmp_path / "template", start, 4)
    tiny_tokenizer(chat=False).save_pretrained(template)
    (template / "chat_template.jinja").unlink()
    ends = [adapter(tmp_path / f"ends{seed}", start, seed) for seed in (5, 6)]
    for folder, ids in zip(ends, ([1, 7], [7]), strict=True):
        GenerationConfig(eos_token_id=ids).save_pretrained(folder)
    cases: list[tuple[list[Path], list[Path], str]] = [
        ([one], [start], "at least 2"),
        ([one, one], [start, start], "same weights"),
        ([one, two, adapter(tmp_path / "again", start, 1)], [start] * 3, "same weights"),
        ([one, two], [start, other], "same base"),
        ([one, tokens], [start, start], "tokenizers"),
        ([one, template], [start, start], "chat templates"),
        ([one, *ends], [start] * 3, r"ends5' end at the tokens \[1, 7\] and those of .*ends6' at \[7\]"),
        ([one, trained(tmp_path / "whole", start, 3)], [start, start], "adapter"),
        ([one, adapter(tmp_path / "rank", start, 3, r=3)], [start, start], "ranks"),
        ([one, adapter(tmp_path / "layers", start, 3, target_modules=["v_proj"])], [start, start], "layers"),
        ([one, adapter(tmp_path / "dora", start, 3, use_dora=True)], [start, start], "use_dora"),
        ([one, adapter(tmp_path / "pissa", start, 3, init_lora_weights="pissa")], [start, start], "pissa"),
        ([one, tmp_path], [start, start], "no trained model"),
    ]
    for folders, references, said in cases:
        with pytest.raises(ConfigError, match=said):
            merge_folders(folders, [str(each) for each in references], method="mean")


def test_an_adapter_whose_file_is_cut_is_refused(tmp_path: Path) -> None:
    start = base(tmp_path / "base")
    runs = [adapter(tmp_path / f"run{seed}", start, seed) for seed in (1, 2)]
    path = runs[1] / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"run2.*SafetensorError"):
        merge_folders(runs, [str(start)] * 2, method="mean")


def test_a_model_of_another_shape_is_no_run_of_this_base(tmp_path: Path) -> None:
    start, wider = base(tmp_path / "base"), base(tmp_path / "wider", make=lambda t, **k: tiny_causal(t, hidden=64, **k))
    runs = [trained(tmp_path / "one", start, 1), trained(tmp_path / "two", wider, 2)]
    with pytest.raises(ConfigError, match="another shape"):
        merge_folders(runs, [str(start)] * 2, method="mean")
