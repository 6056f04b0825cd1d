"""Weight-averaged reward models: several from one start, averaged into one reward model (WARM, arXiv 2401.12187).

    r(x, y) = r_w(x, y)   with   w = (w_1 + ... + w_M) / M

The members start with the same head, fitted to the features of the untouched model ("linear probing"), so that they
stay close enough to be averaged. They differ in the order of the pairs, the learning rate and dropout and, if given, in
the checkpoints of a fine-tuning run that they start from. The mean keeps only a share of what a single member has
learned from a wrong label, but all of what every member has learned.

Shapes: B pairs, D features that the head reads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from bondlm.errors import ConfigError
from bondlm.stages.reward_model import Pairs, in_batches, load_base, margin_of

RATES = (1.0, 0.5)  # of the learning rate, in turn
DROPOUTS = (0.05, 0.1, 0.0)  # in turn: six members have six different combinations of both


@dataclass(frozen=True, kw_only=True)
class Member:
    """The settings of one reward model's training."""

    start: str
    seed: int
    learning_rate: float
    dropout: float | None  # None: the model's own


def members_of(options: Mapping[str, Any], learning_rate: float) -> list[Member]:
    """The members that the options of `bondlm reward-model` ask for; by default a single, ordinary one.

    Raises:
        ConfigError: a value is invalid, a list is longer than the number of members, or a list has no effect.
    """
    count, seed = options.get("members", 1), int(options.get("seed", 42))
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"members={count!r}: must be a whole number, at least 1")
    model, rate = str(options["model"]), float(options.get("learning_rate", learning_rate))
    rates = _numbers(options, "member_learning_rates", count, lambda x: x > 0, "above 0")
    dropouts = _numbers(options, "member_dropouts", count, lambda x: 0 <= x < 1, "at least 0 and below 1")
    starts = [str(start) for start in _listed(options, "member_starts", count)]
    if count == 1:
        return [Member(start=model, seed=seed, learning_rate=rate, dropout=None)]
    rates, starts = rates or [rate * share for share in RATES], starts or [model]
    dropouts = dropouts or list(DROPOUTS)
    return [
        Member(
            start=starts[i % len(starts)],
            seed=seed + i,
            learning_rate=rates[i % len(rates)],
            dropout=dropouts[i % len(dropouts)],
        )
        for i in range(count)
    ]


def _numbers(
    options: Mapping[str, Any], name: str, count: int, is_right: Callable[[float], bool], what: str
) -> list[float]:
    values = _listed(options, name, count)
    wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, (int, float)) or not is_right(v)]
    if wrong:
        raise ConfigError(f"{name}: {wrong[0]!r} must be a number {what}")
    return [float(value) for value in values]


def _listed(options: Mapping[str, Any], name: str, count: int) -> list[Any]:
    value = options.get(name)
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    if count == 1:
        raise ConfigError(f"{name} does nothing for one reward model: set members to 2 or more")
    if not 1 <= len(values) <= count:
        raise ConfigError(f"{name} has {len(values)} values for members={count}: give one to {count}")
    return values


def last_linear(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the layer that makes the reward.

    Raises:
        ConfigError: the model has no layer with one output.
    """
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no linear layer of one output as its head: members=1 trains it")
    return found[-1]


@torch.no_grad()
def _feature_gaps(model: Any, pairs: Pairs, rows: Sequence[Mapping[str, Any]], batch_size: int) -> Tensor:
    """The head's input for the chosen answer minus that for the rejected one (B, D), float64."""
    name, _ = last_linear(model)
    parent, head = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    kept, order, gaps = getattr(parent, head), [], []
    setattr(parent, head, nn.Identity())  # the model then returns the input of the head as its logits
    try:
        for chunk, inputs in in_batches(pairs, rows, batch_size, model.device):
            order += chunk
            read = model(**inputs).logits.double().cpu()
            gaps.append(read[: len(chunk)] - read[len(chunk) :])
    finally:
        setattr(parent, head, kept)
    return torch.cat(gaps)[torch.tensor(order).argsort()]


def probe_head(model: Any, pairs: Pairs, rows: Sequence[Mapping[str, Any]], *, batch_size: int = 32) -> None:
    """Fit only the head to the pairs, in place: Bradley-Terry on the features of the untouched model.

    The objective is convex: the mean loss over B pairs, plus |w|^2 / (2B) for features with a mean square of 1. The
    loss has the pairs' margins.
    """
    model.eval()
    gaps_BD = _feature_gaps(model, pairs, rows, batch_size)
    scale = gaps_BD.pow(2).sum(dim=1).mean().sqrt().clamp(min=1e-12)
    x_BD, margin_B = gaps_BD / scale, margin_of(rows).double()
    w_D = torch.zeros(x_BD.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([w_D], max_iter=500, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = softplus(margin_B - x_BD @ w_D).mean() + w_D.dot(w_D) / (2 * len(x_BD))
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    _, head = last_linear(model)
    with torch.no_grad():
        head.weight.copy_((w_D / scale).unsqueeze(0))
        if head.bias is not None:
            head.bias.zero_()  # pairs do not determine it


def load_member(member: Member, base: Any, tokenizer: Any, *, seed: int) -> Any:
    """A model to train: the weights of the member's start with the head of `base` and the member's dropout.

    Args:
        member: the settings of its training.
        base: the model whose head all members share.
        tokenizer: the tokenizer of `base`.
        seed: the seed that `base` was loaded with, so that weights that no checkpoint has are the same in all members.

    Raises:
        ConfigError: the start is not a model of the same shape and vocabulary as `base`.
    """
    model, own = load_base(member.start, seed=seed)
    weights = base.state_dict()
    if {name: t.shape for name, t in model.state_dict().items()} != {name: t.shape for name, t in weights.items()}:
        raise ConfigError(f"member_starts: {member.start!r} has other weights than the model: give one of its kind")
    if own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"member_starts: {member.start!r} has another vocabulary than the model")
    body = f"{base.base_model_prefix}."
    model.load_state_dict({name: t for name, t in weights.items() if not name.startswith(body)}, strict=False)
    if member.dropout is not None:
        set_dropout(model, member.dropout)
    return model


def set_dropout(model: nn.Module, rate: float) -> None:
    """Set every dropout of the model to this rate, only in the modules: the saved config is not changed."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, rate)
