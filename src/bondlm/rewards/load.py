"""Turn users' reward specs (a string, a function, a model, or a list of these) into named rewards."""

import difflib
import importlib.util
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote

import torch
from torch import nn

from bondlm.data.paths import expanded
from bondlm.errors import ConfigError
from bondlm.models.load import fast_dtype
from bondlm.rewards.calls import RewardFunction
from bondlm.rewards.classifier import SequenceClassifierReward, trained_format
from bondlm.rewards.functions import load_function
from bondlm.rewards.http import HTTPReward
from bondlm.rewards.judge import JudgeReward
from bondlm.rewards.nli import NLIReward
from bondlm.rewards.ranking import RankReward
from bondlm.rewards.scoring import NamedReward
from bondlm.rewards.similarity import SimilarityReward

RewardSpec: TypeAlias = str | RewardFunction | nn.Module
SERVERS = ("judge:", "http://", "https://")


def _boolean_or_auto(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _temperature(text: str) -> float | None:
    return None if text == "none" else float(text)


_OF_JUDGES: dict[str, Callable[[str], Any]] = {
    **{name: str for name in ("model", "prompt", "reference", "cache", "key")},
    **{name: int for name in ("rounds", "seed", "concurrency", "max_calls", "max_tokens", "answer_tokens")},
    "temperature": _temperature,
}
_SHARED: dict[str, Callable[[str], Any]] = {"max_length": int, "truncate": str, "batch_size": int, "batch_tokens": int}
_KINDS: dict[str, tuple[Any, dict[str, Callable[[str], Any]]]] = {
    "classifier": (SequenceClassifierReward, {"append_eos": _boolean_or_auto, "prompt_format": str, **_SHARED}),
    "similarity": (SimilarityReward, _SHARED),
    "nli": (
        NLIReward,
        {
            "template": str,
            "positive": str,
            "negative": _words,
            "entailment_label": str,
            "premise_column": str,
            "premise_prefix": str,
            "output": str,
            **_SHARED,
        },
    ),
}


def load_rewards(
    specs: RewardSpec | Sequence[RewardSpec],
    weights: float | Sequence[float] | None = None,
    *,
    processing_classes: Any = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    timeout: float = 60.0,
    outage: float = 600.0,
    taken: Collection[str] = (),
) -> list[NamedReward]:
    """Load rewards.

    A spec is one of:

    - a callable with TRL's signature `f(prompts, completions, **columns) -> list[float]`, sync or async;
    - an `nn.Module`: a sequence classifier with one label; it needs a processing class;
    - `"module:function"` or `"path/to/file.py:function"`;
    - a `RankReward`, or `"rank:module:function"`: a function that ranks all samples of a prompt;
    - `"nli:MODEL"`: entailment (`NLIReward`); `"similarity:MODEL"`: cosine (`SimilarityReward`);
    - `"judge:URL?model=NAME"`: a chat model that ranks all samples of a prompt (`JudgeReward`, docs/rewards.md);
    - `"http://HOST/PATH"` or `"https://..."`: a server (`HTTPReward`);
    - `"MODEL"` or `"classifier:MODEL"`: a sequence classifier with one label (`SequenceClassifierReward`).

    MODEL is a folder or hub id. Options of the class follow it as in a web address, such as
    `"nli:models/t5?template=flan&premise_prefix=summarize: "` (`%26` for `&`, `%20` for a space that a shell
    would split at). All take `max_length`, `truncate`, `batch_size`, `batch_tokens`; `classifier` also
    `append_eos` and `prompt_format`; `nli` also `template`, `positive`, `negative` (comma-separated
    answers), `entailment_label`, `premise_column`, `premise_prefix`, `output`.

    Args:
        specs: one spec or a list.
        weights: one weight per reward; None means 1 for each.
        processing_classes: tokenizers of reward models, one for each spec, or None for the model's own; for a single
            spec, the tokenizer itself is accepted too.
        device: where models go.
        dtype: dtype of models that are loaded here; "auto" takes that of the checkpoint.
        timeout: seconds that a request to a server, or a call of an asynchronous function, may take.
        outage: seconds without any answer from a server after which the run gives up.
        taken: names that other rewards of the run have.

    Returns:
        Rewards named after the function or the last part of the model's path; a second one of the same name gets "_2".

    Raises:
        ConfigError: a spec, option, weight or processing class that cannot be used; for models, see their classes.
    """
    spec_list: list[Any] = list(specs) if isinstance(specs, (list, tuple)) else [specs]
    if not spec_list:
        raise ConfigError("no reward: give at least one function or model.")
    weight_list = _one_each("reward_weights", weights, len(spec_list), default=1.0)
    tokenizers = _one_each("reward_processing_classes", processing_classes, len(spec_list), default=None)
    if named := [tokenizer for tokenizer in tokenizers if isinstance(tokenizer, str | Path)]:
        raise ConfigError(f"reward_processing_classes: {str(named[0])!r} is a name: give the tokenizer itself.")
    rewards: list[NamedReward] = []
    for spec, weight, tokenizer in zip(spec_list, weight_list, tokenizers, strict=True):
        if isinstance(spec, str) and spec.startswith(SERVERS):
            name, function = _load_server(spec, timeout=timeout, outage=outage)
            _refuse_tokenizer(name, "a server", tokenizer)
        else:
            name, function = _load_one(spec, tokenizer, device, dtype)
        # A server has limits per request, and transient faults are retried, so a whole call may take longer.
        limit = None if isinstance(function, JudgeReward | HTTPReward) else timeout
        rewards.append(
            NamedReward(unused_name(name, {*taken, *(reward.name for reward in rewards)}), function, weight, limit)
        )
    return rewards


def _load_server(spec: str, **limits: Any) -> tuple[str, RewardFunction]:
    if spec.startswith("judge:"):
        judge = load_judge(spec, **limits)
        return _last_part(judge.model), judge
    server = HTTPReward(spec, **limits)
    return _last_part(server.name), server


def load_judge(spec: str, **limits: Any) -> JudgeReward:
    """The judge that `"judge:URL?model=NAME&..."` names; `limits` are its timeout and outage.

    Raises:
        ConfigError: there is no model, an option is unknown, or the criterion cannot be read.
    """
    url, _, query = spec.removeprefix("judge:").partition("?")
    options = dict(_option("judge", part, _OF_JUDGES) for part in query.split("&") if part)
    if not url.startswith(("http://", "https://")) or not options.get("model"):
        raise ConfigError("a judge is written judge:URL?model=NAME, with the URL of an OpenAI-compatible API")
    if "prompt" in options:
        options["criterion"] = _criterion(options.pop("prompt"))
    return JudgeReward(url, options.pop("model"), **options, **limits)


def _criterion(name: str) -> str:
    try:
        text = Path(expanded(name)).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(
            f"judge option prompt={name!r}, the file with the criterion, cannot be read: {reason}"
        ) from error
    if not text:
        raise ConfigError(f"judge option prompt={name!r}: the file with the criterion is empty")
    return text


def rewards_of_run(specs: Any, args: Any, processing_classes: Any) -> list[NamedReward]:
    """The rewards of a training run with these settings; empty if it learns from samples that are already scored.

    Raises:
        ConfigError: as `load_rewards`, or tokenizers without a reward.
    """
    if specs is None:
        if processing_classes is not None:
            raise ConfigError("reward_processing_classes: there are no reward_funcs that would use them, remove it")
        return []
    settings: dict[str, Any] = {"device": args.device, "dtype": fast_dtype(args.device)}
    settings |= {"timeout": args.reward_timeout_s, "outage": args.reward_outage_s}
    return load_rewards(specs, args.reward_weights, processing_classes=processing_classes, **settings)


def is_model(spec: str) -> bool:
    """Whether a spec names a model, not a function to import or a server."""
    kind, _, rest = spec.partition(":")
    return kind in _KINDS or not rest


def _one_each(name: str, values: Any, count: int, default: Any) -> list[Any]:
    if values is None:
        return [default] * count
    items = list(values) if isinstance(values, (list, tuple)) else [values]
    if len(items) != count:
        raise ConfigError(f"{name} has {len(items)} entries for {count} rewards: give one per reward.")
    return items


def unused_name(name: str, taken: Collection[str]) -> str:
    """The name, with "_2", "_3", .. if others have it."""
    number, candidate = 2, name
    while candidate in taken:
        number, candidate = number + 1, f"{name}_{number}"
    return candidate


def _load_one(
    spec: RewardSpec, tokenizer: Any, device: torch.device | str, dtype: torch.dtype | str
) -> tuple[str, RewardFunction]:
    if isinstance(spec, nn.Module):
        if tokenizer is None:
            raise ConfigError(
                f"the reward {type(spec).__name__} is a module: give its tokenizer in reward_processing_classes."
            )
        path = getattr(getattr(spec, "config", None), "name_or_path", "")
        how: Any = {"prompt_format": trained_format(path)} if path else {}
        return _last_part(path or type(spec).__name__), SequenceClassifierReward(spec.to(device), tokenizer, **how)
    if isinstance(spec, str):
        kind, _, rest = spec.partition(":")
        if is_model(spec):
            return _load_model_reward(kind if rest else "classifier", rest or kind, tokenizer, device, dtype)
        name = spec.rpartition(":")[2]
        ranks = kind == "rank"
        function = RankReward(load_function(expanded(rest)), name) if ranks else _load_named_function(spec, kind)
    elif callable(spec):
        name, function = _function_name(spec), spec
    else:
        raise ConfigError(f"a reward is {spec!r} ({type(spec).__name__}): give a string, a callable or an nn.Module.")
    _refuse_tokenizer(name, "a function", tokenizer)
    return name, function


def _refuse_tokenizer(name: str, what: str, tokenizer: Any) -> None:
    if tokenizer is not None:
        raise ConfigError(f"the reward {name!r} is {what}, which does not use a processing class: give None for it.")


def _load_named_function(spec: str, kind: str) -> RewardFunction:
    near = difflib.get_close_matches(kind, [*_KINDS, "rank", "judge"], n=1)
    try:
        return load_function(expanded(spec))
    except ConfigError as error:
        if not near:
            raise
        raise ConfigError(f"{error} Did you mean '{near[0]}:'?") from error


def _function_name(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__).strip("<>")  # "<lambda>" -> "lambda"


def _load_model_reward(
    kind: str, rest: str, tokenizer: Any, device: torch.device | str, dtype: torch.dtype | str
) -> tuple[str, RewardFunction]:
    path, _, query = expanded(rest).partition("?")
    if path.endswith(".py"):
        raise ConfigError(f"reward {path!r} is a file: name the function in it, '{path}:function'.")
    reward_class, known = _KINDS[kind]
    options = dict(_option(kind, part, known) for part in query.split("&") if part)
    hint = _function_hint(path) if kind == "classifier" else ""
    try:
        reward = reward_class.from_pretrained(path, device=device, dtype=dtype, tokenizer=tokenizer, **options)
    except ConfigError as error:
        raise ConfigError(f"{error}{hint}") from error
    return _last_part(path), reward


def _function_hint(path: str) -> str:
    """For a name that may be meant as a function, as TRL's scripts write `my_lib.rewards.f`: how it is written here.

    Raises:
        ConfigError: it is one of a package that Python finds; the hub need not be asked.
    """
    if not all(part.isidentifier() for part in path.split(".")) or Path(path).exists():
        return ""
    module, _, function = path.rpartition(".")
    hint = f" A function is written '{module or 'module'}:{function}'."
    package = path.partition(".")[0]
    if module and (package in sys.modules or importlib.util.find_spec(package) is not None):
        raise ConfigError(f"reward {path!r} is not a model.{hint}")
    return hint


def _option(kind: str, text: str, known: dict[str, Callable[[str], Any]]) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if name not in known or not equals:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}."
        shown = name if kind == "judge" else text  # the rest may contain a key
        raise ConfigError(f"reward option {shown!r}: '{kind}:' takes name=value, and {hint}")
    try:
        return name, known[name](unquote(value))
    except ValueError as error:
        raise ConfigError(f"reward option {text!r}: {value!r} is not a number that it can have.") from error


def _last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or path
