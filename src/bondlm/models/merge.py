"""Trained policies of one base, merged into one model, or one LoRA adapter, from their folders."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import PeftConfig
from peft.utils.other import get_pattern_key
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from bondlm.data.fingerprints import model_fingerprint, same_model, weights_digest
from bondlm.data.paths import refuse_absent_folder, why_not_loaded
from bondlm.errors import ConfigError
from bondlm.models.adapters import change_of_base, plain_lora
from bondlm.models.load import load_model, load_tokenizer, refused
from bondlm.models.task_vectors import LowRank, Merging, Method, Vector, dot, plus, scaled

_FACTORS = ((".lora_B.weight", ".lora_A.weight"), (".lora_embedding_B", ".lora_embedding_A"))
# Variants of LoRA whose change of a layer is not the product of two factors.
_NOT_A_PRODUCT = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "kasa_config", "arrow_config"),
    *("monteclora_config", "alora_invocation_tokens", "target_parameters", "trainable_token_indices"),
)


@dataclass(kw_only=True)
class Merge:
    """The runs' task vectors, merged tensor by tensor; `write` adds the result to the base.

    `norms` are the lengths of the runs' task vectors, `norm` is that of the merged one, `digests` are hashes of the
    runs' weights. `full_rank` is the rank that represents a merged adapter exactly; None for whole models.
    """

    folders: Sequence[Path]
    digests: Sequence[str]
    vectors: dict[str, Vector]
    start: dict[str, Vector]  # values of theta_0, where it has any
    norms: list[float]
    norm: float
    full_rank: int | None = None
    rank: int | None = None
    model: Any = field(default=None, repr=False)  # for whole models: one run's model, to write files with
    adapter: Any = field(default=None, repr=False)  # for adapters: the config to write

    def write(self, folder: Path, *, toward_reference: float) -> float:
        """Write theta_0 + (1 - toward_reference) * (merged task vector), and the tokenizer, like a run folder.

        Returns the relative error (Frobenius, over all layers) due to the adapter's rank; 0.0 for whole models.
        """
        tensors = {name: self._at(name, 1 - toward_reference) for name in self.vectors}
        error = self._write_model(folder, tensors) if self.adapter is None else self._write_adapter(folder, tensors)
        load_tokenizer(str(self.folders[0])).save_pretrained(folder)
        if (answering := self.folders[0] / GENERATION_CONFIG_NAME).is_file():
            shutil.copyfile(answering, folder / GENERATION_CONFIG_NAME)
        return error

    def _at(self, name: str, share: float) -> Vector:
        moved = scaled(self.vectors[name], share)
        return plus(moved, self.start[name]) if name in self.start else moved

    @torch.no_grad()
    def _write_model(self, folder: Path, tensors: dict[str, Vector]) -> float:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(tensors[name])
        self.model.save_pretrained(folder)
        return 0.0

    def _write_adapter(self, folder: Path, tensors: dict[str, Vector]) -> float:
        found: dict[str, Tensor] = {}
        lost = total = 0.0
        for name, tensor in tensors.items():
            if isinstance(tensor, LowRank):
                factors, lost_here, here = tensor.of_rank(self.rank or 0)
                lost, total = lost + lost_here, total + here
                up, down = next(pair for pair in _FACTORS if name.endswith(pair[0]))
                found[name], found[name.removesuffix(up) + down] = factors
            else:
                found[name] = tensor
        folder.mkdir(parents=True, exist_ok=True)
        self.adapter.save_pretrained(str(folder))
        found = {name: tensor.float().contiguous() for name, tensor in found.items()}
        safetensors.torch.save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return math.sqrt(lost / total) if total else 0.0


@dataclass(frozen=True, slots=True)
class _Start:
    """The model that the runs were trained from."""

    reference: str
    init_kwargs: Mapping[str, Any]

    def model(self) -> Any:
        return load_model(self.reference, dtype=torch.float32, **self.init_kwargs)


def merge_folders(
    folders: Sequence[Path],
    references: Sequence[str],
    *,
    method: Method,
    rank: int | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
) -> Merge:
    """Merge policies that were trained from one model.

    Args:
        folders: folders of the policies, at least two.
        references: the model that each was trained from, a folder or a hub name.
        method: "mean" or "slerp" (`bondlm.models.task_vectors`).
        rank: rank of a merged LoRA adapter; None is the rank that represents it exactly.
        init_kwargs: for `from_pretrained` of the models that they were trained from.

    Raises:
        ConfigError: they have different bases, tokenizers, end tokens, kinds, layers or ranks, there are fewer than
            two, or one is given twice; or `rank` is out of range.
    """
    is_adapter = _are_adapters(folders)
    digests = _refuse_twice(folders)
    _refuse_other_bases(folders, references)
    _refuse_other_tokens(folders)
    _refuse_other_ends(folders)
    how: dict[str, Any] = {"folders": folders, "digests": digests}
    start = _Start(references[0], init_kwargs or {})
    if is_adapter:
        return _merged_adapters(folders, start, method, rank, how)
    if rank is not None:
        raise ConfigError(f"rank={rank}: only LoRA adapters have one, but these are whole models: remove it")
    return _merged_models(folders, start, method, how)


# -- checks of the folders


def _are_adapters(folders: Sequence[Path]) -> bool:
    """Whether all are adapters; False if all are whole models."""
    if len(folders) < 2:
        raise ConfigError(
            f"{len(folders)} run is given: a merge needs at least 2, `bondlm merge RUN RUN --output_dir OUT`"
        )
    adapters = [(folder / "adapter_config.json").is_file() for folder in folders]
    for folder, is_adapter in zip(folders, adapters, strict=True):
        if not (is_adapter or (folder / "config.json").is_file()):
            raise ConfigError(f"{str(folder)!r} holds no trained model: name a folder that `bondlm train` has finished")
    if len(set(adapters)) > 1:
        kinds = ", ".join(f"{f}: {'adapter' if a else 'model'}" for f, a in zip(folders, adapters, strict=True))
        raise ConfigError(f"adapters and whole models cannot be merged ({kinds}): give runs of one kind")
    return adapters[0]


def _refuse_twice(folders: Sequence[Path]) -> list[str]:
    seen: dict[str, Path] = {}
    for folder in folders:
        digest = weights_digest(folder)
        if digest in seen:
            raise ConfigError(
                f"{str(seen[digest])!r} and {str(folder)!r} have the same weights, so merging them changes "
                "nothing: give runs that differ, at least in their seed"
            )
        seen[digest] = folder
    return list(seen)


def _refuse_other_bases(folders: Sequence[Path], references: Sequence[str]) -> None:
    refuse_absent_folder(references[0], "reference")
    first = model_fingerprint(references[0], None)
    for folder, reference in zip(folders[1:], references[1:], strict=True):
        if not same_model(first, model_fingerprint(reference, None)):
            raise ConfigError(
                f"{str(folders[0])!r} was trained from {references[0]!r} and {str(folder)!r} from {reference!r}: only "
                "runs from the same base can be merged. If it is the same model under two names, give --reference"
            )


def _refuse_other_tokens(folders: Sequence[Path]) -> None:
    first, *others = [load_tokenizer(str(folder)) for folder in folders]
    for folder, other in zip(folders[1:], others, strict=True):
        for what, mine, theirs in (
            ("tokenizers", first.get_vocab(), other.get_vocab()),
            ("chat templates", first.chat_template, other.chat_template),
            ("special tokens", first.special_tokens_map, other.special_tokens_map),
        ):
            if mine != theirs:
                raise ConfigError(
                    f"{str(folders[0])!r} and {str(folder)!r} have different {what}: merge runs that read and "
                    "write the same tokens"
                )


def _refuse_other_ends(folders: Sequence[Path]) -> None:
    """Refuse runs whose answers end at different tokens."""
    ends = {str(folder): end for folder in folders if (end := _end_ids(folder)) is not None}
    first = next(iter(ends), "")
    for folder, ids in ends.items():
        if ids != ends[first]:
            raise ConfigError(
                f"the answers of {first!r} end at the tokens {sorted(ends[first])} and those of {folder!r} at "
                f"{sorted(ids)} (eos_token_id in {GENERATION_CONFIG_NAME}): merge runs that were trained with the same "
                "ones"
            )


def _end_ids(folder: Path) -> set[int] | None:
    if not (folder / GENERATION_CONFIG_NAME).is_file():
        return None
    ids = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    return None if ids is None else {ids} if isinstance(ids, int) else set(ids)


# -- whole models


def _merged_models(folders: Sequence[Path], began: _Start, method: Method, how: dict[str, Any]) -> Merge:
    """Merge whole models; theta_0, one run's model and the sum are in memory in fp32, and for slerp a second sum."""
    start = dict(began.model().named_parameters())
    sums = {name: Merging(method) for name in start}
    norms = []
    for folder in folders:
        model = load_model(folder, dtype=torch.float32)
        weights = dict(model.named_parameters())
        _refuse_other_shapes(folder, began.reference, {n: p.shape for n, p in weights.items()}, start)
        with torch.no_grad():
            norms.append(math.sqrt(sum(sums[name].add(weights[name] - start[name]) for name in start)))
    return _finished(sums, norms, start={name: p.detach() for name, p in start.items()}, model=model, **how)


def _refuse_other_shapes(folder: Path, reference: str, shapes: dict[str, Any], start: dict[str, Any]) -> None:
    odd = [
        name
        for name in sorted(shapes.keys() | start.keys())
        if name not in start or shapes.get(name) != start[name].shape
    ]
    if odd:
        raise ConfigError(
            f"{str(folder)!r} was not trained from {reference!r}: {len(odd)} tensors have another shape or are missing "
            f"(first: {odd[0]}). If the vocabulary was resized before training, save that model and give it with "
            "--reference"
        )


def _finished(sums: dict[str, Merging], norms: list[float], **more: Any) -> Merge:
    vectors = {name: merging.merged(name) for name, merging in sums.items()}
    norm = math.sqrt(sum(dot(vector, vector) for vector in vectors.values()))
    return Merge(vectors=vectors, norms=norms, norm=norm, **more)


# -- adapters


@dataclass(frozen=True, kw_only=True, slots=True)
class _Adapter:
    """A LoRA adapter's file: products by the name of B, including the scaling, and whole weights."""

    config: Any
    products: dict[str, LowRank]
    whole: dict[str, Tensor]

    @property
    def ranks(self) -> dict[str, int]:
        return {name: product.up.shape[1] for name, product in self.products.items()}


def _merged_adapters(
    folders: Sequence[Path], began: _Start, method: Method, rank: int | None, how: dict[str, Any]
) -> Merge:
    first, *others = adapters = [_read_adapter(folder) for folder in folders]
    for folder, other in zip(folders[1:], others, strict=True):
        _refuse_other_layers(folders[0], first, folder, other)
    start = _start_of(adapters[0], folders[0], began)
    sums = {name: Merging(method) for name in (*first.products, *first.whole)}
    norms = []
    for adapter in adapters:
        vectors = {name: _minus(v, start.get(name)) for name, v in (adapter.products | adapter.whole).items()}
        norms.append(math.sqrt(sum(sums[name].add(vector) for name, vector in vectors.items())))
    of_start = [vector.up.shape[1] for vector in start.values() if isinstance(vector, LowRank)]
    full = len(folders) * max(first.ranks.values()) + max(of_start, default=0)
    full = min(full, max(min(len(p.up), p.down.shape[1]) for p in first.products.values()))
    if rank is not None and not 1 <= rank <= full:
        raise ConfigError(f"rank={rank}: must be from 1 to {full}, which holds this merge exactly")
    config = _plain_config(first.config, rank or full, began)
    return _finished(sums, norms, start=start, full_rank=full, rank=rank or full, adapter=config, **how)


def _minus(vector: Vector, start: Vector | None) -> Vector:
    return vector if start is None else plus(vector, scaled(start, -1.0))


def _plain_config(config: Any, rank: int, began: _Start) -> Any:
    made = plain_lora(config, rank)
    if not (Path(began.reference) / "adapter_config.json").is_file():
        made.base_model_name_or_path, made.revision = began.reference, began.init_kwargs.get("revision")
    return made


def _read_adapter(folder: Path) -> _Adapter:
    path = folder / "adapter_model.safetensors"
    with refused(lambda error: f"cannot read the adapter {str(folder)!r}: {why_not_loaded(str(folder), error)}"):
        config: Any = PeftConfig.from_pretrained(str(folder))
        rest = safetensors.torch.load_file(path) if path.is_file() else None
    odd = [name for name in _NOT_A_PRODUCT if getattr(config, name, None)]
    kind = str(config.peft_type).rsplit(".", 1)[-1]
    if kind != "LORA" or odd or change_of_base(config):
        said = odd[0] if odd else change_of_base(config) or kind
        raise ConfigError(
            f"{str(folder)!r}: {said} is not plain LoRA, but only LoRA adapters and whole models can be merged"
        )
    if rest is None:
        raise ConfigError(f"{str(folder)!r}: no adapter_model.safetensors; save it as safetensors")
    products = {}
    for up, down in _FACTORS:
        for name in [name for name in rest if name.endswith(up)]:
            module = name.removesuffix(up)
            b, a = rest.pop(name).double(), rest.pop(module + down).double()
            products[name] = LowRank(_scaling(config, module, b.shape[-1]) * b, a)
    strange = [name for name in rest if ".lora_" in name]
    if strange or any(p.up.ndim != 2 or p.down.ndim != 2 for p in products.values()):
        raise ConfigError(
            f"{str(folder)!r}: the adapter has layers that are not a product of two matrices ({strange[:1]})"
        )
    return _Adapter(config=config, products=products, whole={name: tensor.float() for name, tensor in rest.items()})


def _scaling(config: Any, module: str, rank: int) -> float:
    name = module.removeprefix("base_model.model.")  # as PEFT matches it when attaching the adapter
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.lora_alpha)
    return float(alpha) / (math.sqrt(rank) if config.use_rslora else rank)


def _refuse_other_layers(first_folder: Path, first: _Adapter, folder: Path, other: _Adapter) -> None:
    for what, mine, theirs in (
        ("layers", first.products.keys() | first.whole.keys(), other.products.keys() | other.whole.keys()),
        ("ranks", first.ranks, other.ranks),
        ("shapes", _shapes(first), _shapes(other)),
    ):
        if mine != theirs:
            raise ConfigError(
                f"the adapters of {str(first_folder)!r} and {str(folder)!r} have different {what}: merge runs with the "
                "same lora_r and lora_target_modules"
            )


def _shapes(adapter: _Adapter) -> dict[str, Any]:
    products = {name: (len(p.up), p.down.shape[1]) for name, p in adapter.products.items()}
    return products | {name: tuple(tensor.shape) for name, tensor in adapter.whole.items()}


def _start_of(adapter: _Adapter, folder: Path, began: _Start) -> dict[str, Vector]:
    """Theta_0 of what an adapter trains: no products for a fresh adapter, otherwise those that it started with."""
    reference = began.reference
    if (Path(reference) / "adapter_config.json").is_file():
        start = _read_adapter(Path(reference))
        _refuse_other_layers(Path(reference), start, folder, adapter)
        return {**start.products, **start.whole}
    if adapter.config.init_lora_weights is False:
        raise ConfigError(
            f"{str(folder)!r}: its adapter did not start empty (init_lora_weights=False): give --reference"
        )
    if not adapter.whole:
        return {}
    base = dict(began.model().named_parameters(remove_duplicate=False))  # an adapter may hold a tied head
    weights = {name: base.get(_name_in_base(name)) for name in adapter.whole}
    odd = [name for name, w in weights.items() if w is None or w.shape != adapter.whole[name].shape]
    if odd:
        raise ConfigError(f"{str(folder)!r}: {reference!r} has no weight like {odd[0]}, which the adapter holds whole")
    return {name: w.detach() for name, w in weights.items() if w is not None}


def _name_in_base(name: str) -> str:
    """The name in the base: PEFT keeps an embedding whole next to its factors, under the layer that it has wrapped."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
