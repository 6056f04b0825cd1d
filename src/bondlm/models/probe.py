"""Test the user's model before step 1: its numbers must not depend on how they are computed.

Everything is compared with plain passes: one text at a time, no cache, no mask, no padding. Differences are in nats per
token, as a sample would have them: the expected difference of a token's log-probability under the plain distribution.
The texts are short, a few dozen tokens, but longer if the config has a window or a block that they would not fill.

Shapes: P prompts, L completions of each, T tokens of a completion, V vocabulary.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import DynamicCache

from bondlm.data.context import SELECTED, context_length, start_id
from bondlm.errors import ConfigError
from bondlm.models.facts import has_full_attention, text_config, vocabulary_size
from bondlm.models.logprobs import Group, batch_behind_prefix, collate, completion_logits
from bondlm.models.prefix import LEAST_SHARED, prefill_prefix, repeated
from bondlm.models.ways import remember, ways_of

_LOGGER = logging.getLogger(__name__)
# Nats per token. Rounding in fp32 stays below 1e-4; in bf16 and fp16 it reaches some hundredths.
TOLERANCE, LEAST_TOLERANCE, LOW_PRECISION_TOLERANCE = 2e-3, 5e-5, 0.1
REFUSED_IN_LOW_PRECISION = 0.5  # a router may round to another expert, which is not an error
SHORT, LONGEST = 24, 520  # tokens of a probed prompt: without limits on what a token sees, and at most
LIMITS = re.compile(r"window|chunk|local|block_size|topk|radius|keep|extent|budget|bucket")
NO_LIMITS = re.compile(r"max_window_layers|topk_group|moe|expert|chunk_size_feed_forward|lm_head|dropout|n_top|routed")
NOISE = re.compile(r"drop|jitter|noise")
FAILURES = (
    *(RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError, NotImplementedError),
)
Logits = list[Tensor]  # logits (T, V) of each completion


def check_model(model: Any, device: torch.device, *, is_noise_allowed: bool = False, distributed: bool = False) -> bool:
    """Refuse a model whose numbers depend on how they are computed; returns whether completions may share a row.

    Completions that share their prompt's row need a 4-dimensional mask (accepted by SDPA, but not by eager attention)
    and explicit positions. An encoder-decoder model can always encode a prompt once, but then calls its encoder
    separately, which sharded engines do not expect.

    Raises:
        ConfigError: it is noisy in training mode, attends to later tokens, or cannot be computed in batches.
    """
    check_decoder(model)
    with in_eval_mode(model):
        return _checked(model, device, is_noise_allowed=is_noise_allowed, distributed=distributed)


def _checked(model: Any, device: torch.device, *, is_noise_allowed: bool, distributed: bool) -> bool:
    name = type(model).__name__
    groups, is_low = probe_groups(model), is_low_precision(model)
    plain = plain_logits(model, groups, device)
    check_causal(model, groups, plain, device, name)
    if not is_noise_allowed:
        _check_noise(model, groups, device, name)
    _check_batches(model, groups, plain, device, name)
    if model.config.is_encoder_decoder:
        return not distributed and agrees(lambda: batched_logits(model, groups, device), plain, is_low=is_low)
    is_whole = sees_all(model)
    packed = is_whole and agrees(lambda: batched_logits(model, groups, device), plain, is_low=is_low)
    prefix = (
        ways_of(model).prefix
        and is_whole
        and agrees(lambda: _logits_behind_prefix(model, groups, device), plain, is_low=is_low)
    )
    remember(model, prefix=prefix)
    if has_full_attention(model.config) and not (packed and prefix):
        _LOGGER.info(
            f"{name}: completions {'share' if packed else 'do not share'} their prompt's row, prompts "
            f"{'share' if prefix else 'do not share'} what they begin with: a probe saw what stays exact"
        )
    return packed


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Lend the model in eval mode, in which it samples, and restore its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


# -- texts and their distributions


def limits(config: Any) -> dict[str, int]:
    """Fields of the config that limit how far a token sees, by name: windows, chunks, blocks, budgets."""
    fields = {key: value for key, value in text_config(config).to_dict().items() if isinstance(key, str)}
    names = (key for key in fields if LIMITS.search(key) and not NO_LIMITS.search(key))
    values = {key: fields[key] for key in names if key not in SELECTED}  # those limit the length of a text
    return {k: v for k, v in values.items() if isinstance(v, int) and not isinstance(v, bool) and v > 1}


def reach(model: Any) -> int:
    """The length of a probed prompt: beyond every limit of the config that is short enough to be tested."""
    crossed = [limit for limit in limits(model.config).values() if limit <= LONGEST - SHORT]
    wanted = SHORT + max(crossed, default=0)
    most = context_length(model.config)
    return wanted if most is None else max(2, min(wanted, most - 8))


def sees_all(model: Any) -> bool:
    """Whether, where a probe cannot tell, the config promises that all tokens see all earlier ones."""
    return has_full_attention(model.config) and all(v <= LONGEST - SHORT for v in limits(model.config).values())


def probe_ids(model: Any, count: int, seed: int = 0) -> list[int]:
    """Ordinary tokens, without those that have a special meaning in the config."""
    size = min(vocabulary_size(model.config), 1000)
    special = {
        v
        for key, v in model.config.to_dict().items()
        if str(key).endswith(("token_id", "token_index"))
        if isinstance(v, int)
    }
    ordinary = [i for i in range(size // 8, size) if i not in special] or [0]
    generator = torch.Generator().manual_seed(seed)
    return [ordinary[i] for i in torch.randint(len(ordinary), (count,), generator=generator).tolist()]


def probe_groups(model: Any) -> list[Group]:
    """Two prompts of very different lengths that begin alike, with two completions each."""
    length = reach(model)
    beginning = probe_ids(model, min(LEAST_SHARED, max(1, length - 1)))
    rest = probe_ids(model, max(1, length - len(beginning)), seed=1)
    completions = [probe_ids(model, 5, seed=2), probe_ids(model, 2, seed=3)]
    return [([*beginning, *rest], completions), ([*beginning, *rest[-1:]], completions[::-1])]


def plain_logits(model: Any, groups: Sequence[Group], device: torch.device) -> Logits:
    """Logits of each completion, from one pass over the whole text.

    Raises:
        ConfigError: the model does not accept plain text, or gives no distribution.
    """
    ones: list[Group] = [(prompt, [c]) for prompt, completions in groups for c in completions]
    try:
        plain = [each for one in ones for each in batched_logits(model, [one], device, is_plain=True)]
    except FAILURES as error:
        if _is_memory(error):
            raise
        raise ConfigError(f"{type(model).__name__} cannot compute a text from token ids only: {error}") from error
    if not all(torch.isfinite(each.float().logsumexp(-1)).all() for each in plain):  # a -inf only bans a token
        raise ConfigError(
            f"{type(model).__name__}: weights or logits are not finite, in {plain[0].dtype} on a text of a few tokens. "
            "Save the model again from weights that are finite, or try dtype=float32"
        )
    return plain


def _is_memory(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and bool(should_reduce_batch_size(error))


@torch.no_grad()
def batched_logits(model: Any, groups: Sequence[Group], device: torch.device, *, is_plain: bool = False) -> Logits:
    """Logits of each completion, all in one batch, as in learning and scoring."""
    batch = {k: v.to(device) for k, v in collate(groups, 0, start_id=start_id(model)).items()}
    if is_plain:
        for name in ("attention_mask", "position_ids"):
            batch.pop(name, None)
    return _cut(completion_logits(model, batch), groups)


@torch.no_grad()
def _logits_behind_prefix(model: Any, groups: Sequence[Group], device: torch.device) -> Logits:
    prompts = [list(prompt) for prompt, _ in groups]
    n = next(i for i, (a, b) in enumerate(zip(*prompts, strict=False)) if a != b) if prompts[0] != prompts[1] else 0
    n = min(n, min(map(len, prompts)) - 1)
    before = prefill_prefix(model, prompts[0][:n], DynamicCache(config=model.config))
    alone: list[Group] = [(prompt[n:], [c]) for prompt, (_, cs) in zip(prompts, groups, strict=True) for c in cs]
    batch = batch_behind_prefix(collate(alone, 0), n)
    batch = {k: v.to(device) for k, v in batch.items()}
    return _cut(completion_logits(model, batch, repeated(before, len(alone))), alone)


def _cut(logits_PLTV: Tensor, groups: Sequence[Group]) -> Logits:
    flat = [c for _, completions in groups for c in completions]
    return [each[: len(c)] for each, c in zip(logits_PLTV.flatten(0, 1), flat, strict=True)]


def nats_apart(seen: Tensor, plain: Tensor, *, is_low: bool) -> float:
    """Expected difference of a token's log-probability; the maximum over the given positions (N, V).

    In low precision (`is_low`) it is the mean over them.
    """
    mine, theirs = seen.float().log_softmax(-1), plain.float().log_softmax(-1)
    weighed = torch.where(theirs > -torch.inf, theirs.exp() * (mine - theirs).abs(), 0.0).sum(-1)
    found = weighed.mean() if is_low else weighed.max()
    return float(found) if torch.isfinite(found) else float("inf")


def is_low_precision(model: Any) -> bool:
    """Whether the model computes in bf16 or fp16, by its weights or by autocast; its logits may still be fp32."""
    return model.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(model.device.type)


def tolerance(*, is_low: bool) -> float:
    """The difference in nats per token that is allowed between two ways."""
    return LOW_PRECISION_TOLERANCE if is_low else TOLERANCE


def refused_beyond(*, is_low: bool) -> float:
    """The difference in nats per token above which a model is refused."""
    return REFUSED_IN_LOW_PRECISION if is_low else TOLERANCE


def difference(logits: Logits, plain: Logits, *, is_low: bool) -> float:
    """`nats_apart` of all completions together."""
    return nats_apart(torch.cat(logits), torch.cat(plain), is_low=is_low)


def agrees(compute: Callable[[], Logits], plain: Logits, *, is_low: bool) -> bool:
    """Whether this way gives the plain distributions; False if the model does not support it. OOM is raised."""
    try:
        logits = compute()
    except FAILURES as error:
        if _is_memory(error):
            raise
        return False
    return difference(logits, plain, is_low=is_low) <= tolerance_of(plain, is_low=is_low)


def tolerance_of(plain: Logits, *, is_low: bool) -> float:
    """The allowed difference in nats per token; less for a model whose tokens hardly depend on the prompt.

    The first and the last of `plain` follow different prompts. A freshly initialised model is nearly flat, so an error
    would show in its numbers only later.
    """
    usual = tolerance(is_low=is_low)
    if is_low:
        return usual
    return min(usual, max(LEAST_TOLERANCE, nats_apart(plain[0][:1], plain[-1][:1], is_low=is_low) / 100))


# -- refusals


def check_decoder(model: Any) -> None:
    """Check that an encoder-decoder model states its decoder's start token, and forces no other token behind it.

    Raises:
        ConfigError: it does not state it, or its generation config forces a first token (a target language).
    """
    if not model.config.is_encoder_decoder:
        return
    start = start_id(model)
    if start is None:
        raise ConfigError(
            f"{type(model).__name__}: its config has no decoder_start_token_id, the token that its decoder begins with"
        )
    forced = getattr(model.generation_config, "forced_bos_token_id", None)
    if forced is not None and forced not in (start, model.config.bos_token_id):  # BART learned to write its BOS
        raise ConfigError(
            f"{type(model).__name__}: its generation config forces completions to begin with token {forced} "
            "(forced_bos_token_id), but bondlm draws every token from the model. Let the decoder begin with it "
            f"(model_init_kwargs: {{decoder_start_token_id: {forced}}}), or remove it from generation_config.json if "
            "the model writes it by itself"
        )


def check_causal(model: Any, groups: Sequence[Group], plain: Logits, device: torch.device, name: str) -> None:
    """Check that a token's distribution does not depend on what follows.

    Raises:
        ConfigError: it does.
    """
    prompt, completions = groups[-1]
    first: Group = (prompt, [completions[0][:1]])
    (alone,) = batched_logits(model, [first], device, is_plain=True)
    is_low = is_low_precision(model)
    apart = nats_apart(plain[-len(completions)][:1], alone, is_low=is_low)
    if apart > refused_beyond(is_low=is_low):
        raise ConfigError(
            f"{name} attends to later tokens: what follows changes a token's distribution by {apart:.2g} nats. As "
            "configured it is not a causal language model (is_decoder=True turns some encoders into one)"
        )


@torch.no_grad()
def _check_noise(model: Any, groups: Sequence[Group], device: torch.device, name: str) -> None:
    """Check that two passes in training mode agree with each other and with eval mode, which samples."""
    one: list[Group] = [(groups[-1][0], [groups[-1][1][0]])]
    passes = []
    try:
        for training in (False, True, True):
            model.train(training)
            passes.append(batched_logits(model, one, device))
    except FAILURES as error:
        if _is_memory(error):
            raise
        raise ConfigError(f"{name} cannot compute a text in training mode: {error}") from error
    finally:
        model.eval()
    is_low = is_low_precision(model)
    apart = max(difference(seen, other, is_low=is_low) for seen, other in pairwise(passes))
    if apart > refused_beyond(is_low=is_low):
        names = ", ".join(noise_of(model)) or "something that bondlm has no name for"
        raise ConfigError(
            f"{name}: passes in training mode differ by {apart:.2g} nats per token: it applies {names} in training. "
            "Set it to 0 in the model's config (model_init_kwargs), or disable_dropout=False to train with noise"
        )


def noise_of(model: nn.Module) -> list[str]:
    """Noise rates (such as dropout) that are not 0, as `name=value`."""
    found = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            found["nn.Dropout"] = module.p
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            found["BatchNorm momentum"] = module.momentum or 0.0
        for name, value in vars(module).items():
            if NOISE.search(name) and isinstance(value, float) and value > 0:
                found[name] = value
    config = getattr(model, "config", None)
    for name, value in (text_config(config).to_dict() if config is not None else {}).items():
        if NOISE.search(str(name)) and isinstance(value, float) and value > 0 and name not in found:
            found[f"config.{name}"] = value
    return [f"{name}={value}" for name, value in found.items()]


def _check_batches(model: Any, groups: Sequence[Group], plain: Logits, device: torch.device, name: str) -> None:
    """Check that each text has the same logits in a batch, padded right, as on its own."""
    alone: list[Group] = [(prompt, [c]) for prompt, cs in groups for c in cs]
    is_low = is_low_precision(model)
    try:
        apart = difference(batched_logits(model, alone, device), plain, is_low=is_low)
    except FAILURES as error:
        if _is_memory(error):
            raise
        raise ConfigError(f"{name} cannot be computed in a batch of padded texts: {error}") from error
    if apart > refused_beyond(is_low=is_low):
        raise ConfigError(
            f"{name}: in a batch, padded on the right, a text gets other distributions than alone: {apart:.2g} nats "
            f"per token, of {refused_beyond(is_low=is_low)} allowed. The model mixes rows, counts padding, or numbers "
            "positions differently; bondlm cannot train it"
        )
