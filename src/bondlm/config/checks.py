"""What must hold of the settings of a run together; each problem is one sentence with the value seen."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from typing import Any

from bondlm.config.settings import Setting
from bondlm.errors import ConfigError
from bondlm.objectives.make import OBJECTIVES, anchor_may_move, make_objective, users


def problems(c: Any, settings: Mapping[str, Setting], defaults: Mapping[str, Any]) -> list[str]:
    """Every contradiction, each as one sentence that says the value seen and what is allowed."""
    found = [*_outside_of_range(c, settings, defaults), *_unused(c, settings, defaults), *_contradictions(c)]
    if found:
        return found
    try:
        plan = make_objective(c.objective, vars(c)).plan
    except ConfigError as error:
        return [str(error)]
    if c.gamma_ref and (plan.policy == 0 or not anchor_may_move(c.objective)):
        why = "its KL to the reference has weight 1" if plan.policy else "it draws no samples of the policy"
        found.append(f"gamma_ref={c.gamma_ref!r}: objective={c.objective!r} does not use it ({why}), remove it")
    elif c.gamma_ref and c.anchor == "fixed":
        found.append(
            f"gamma_ref={c.gamma_ref!r}: anchor='fixed' is the reference itself, and the objective has a KL to it; "
            "remove gamma_ref, or let the anchor move"
        )
    if c.missing_eos == "worst" and plan.total == 1:
        found.append(
            f"missing_eos='worst': objective={c.objective!r} draws one sample per prompt, and there is no other to "
            "rank it below; use 'drop', or a reward that looks at `truncated`"
        )
    return found


def _outside_of_range(c: Any, settings: Mapping[str, Setting], defaults: Mapping[str, Any]) -> Iterator[str]:
    for name, setting in settings.items():
        value = getattr(c, name)
        if setting.rule is None or (value is None and defaults[name] is None):
            continue
        if (problem := setting.rule.problem(name, value)) is not None:
            yield problem


def _unused(c: Any, settings: Mapping[str, Setting], defaults: Mapping[str, Any]) -> Iterator[str]:
    """Settings that differ from their defaults, though nothing in this run looks at them."""
    for name, setting in settings.items():
        if getattr(c, name) == defaults.get(name, MISSING):
            continue
        other, value = setting.needs or ("objective", c.objective)
        owners = users(name) or users(other)
        if owners and c.objective in OBJECTIVES and c.objective not in owners:
            yield _not_used(c, name, "objective", owners)
        elif getattr(c, other) != value:
            yield _not_used(c, name, other, (value,))


def _not_used(c: Any, name: str, other: str, values: tuple[str, ...]) -> str:
    do = f"{', '.join(map(repr, values))} {'do' if len(values) > 1 else 'does'}"
    if name == "beta" and c.objective in users("beta_rl"):
        do += "; the KL coefficient that TRL calls beta is beta_rl"
    return f"{name}={getattr(c, name)!r}: {other}={getattr(c, other)!r} does not use it ({do}), remove it"


def _contradictions(c: Any) -> Iterator[str]:
    """What two settings say together."""
    if c.anchor != "fixed" and not anchor_may_move(c.objective):
        yield (
            f"anchor={c.anchor!r}: objective={c.objective!r} has no moving anchor, its KL is to the model it started "
            "from; remove the setting"
        )
    if c.target_n is not None and c.target_n > c.eval_num_reference_samples:
        yield (
            f"target_n={c.target_n}: must be at most eval_num_reference_samples={c.eval_num_reference_samples}, which "
            "cannot show more"
        )
    for name in ("target_n", "kl_budget"):
        if getattr(c, name) is not None and c.eval_strategy == "no":
            yield (
                f"{name}={getattr(c, name)}: only an evaluation looks at it, and eval_strategy='no' makes none in "
                "training: set eval_strategy='steps' with eval_steps, and an eval_dataset"
            )
