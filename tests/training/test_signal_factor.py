"""A signal that is made stronger until the measured N is the one that was asked for."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer.helpers import logged, trainer

from bondlm.bestofn import self_bond_gradient
from bondlm.bestofn.own_quantiles import win_table
from bondlm.objectives import SelfBOND
from bondlm.training.signal_factor import MAX_CHANGE, MAX_FACTOR, MAX_TIED, SignalFactor, learning_pace

OUTCOMES = 60
SETTINGS: dict[str, Any] = {
    **{"objective": "self_bond", "anchor": "fixed", "n": 4, "num_samples": 4},
    **{"adaptive_strength": True, "max_steps": 3},
}


@pytest.mark.parametrize("warmup", [5, 100])
@pytest.mark.parametrize("steps_to_follow", [20, 100])
@pytest.mark.parametrize(("n", "price"), [(4, 0.8), (4, 1.8), (8, 1.0), (8, 3.0)])
def test_a_policy_that_pays_more_gets_a_stronger_signal(
    n: int, price: float, steps_to_follow: int, warmup: int
) -> None:
    """It rests where the signal over `price` is what a free policy would need, and gets there without overshooting."""
    factor, log_n, largest = SignalFactor(n), 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 1001):
        pace = min(1.0, step / warmup)
        log_n += pace * (math.log(n) * factor.factor / price - log_n) / steps_to_follow
        largest = max(largest, log_n)
        wins = 1 / (1 + math.exp(-log_n)) + 0.03 * float(torch.randn((), generator=generator))
        factor.update(wins, pace)
    assert factor.factor == pytest.approx(price, rel=0.15)
    assert log_n == pytest.approx(math.log(n), abs=0.15)
    assert largest < math.log(n) + 0.3


def test_on_a_table_the_solved_strength_stays() -> None:
    """Exact descent on equal outcomes, with the exact win rate: nothing is to be changed there, and n is reached."""
    n, num_samples = 4, 8
    ref = torch.full((OUTCOMES,), 1 / OUTCOMES, dtype=torch.float64)
    rewards = torch.arange(OUTCOMES, dtype=torch.float64)
    logits, factor = ref.log(), SignalFactor(n)
    for _ in range(700):
        probs = logits.softmax(-1)
        solved = self_bond_gradient(logits, ref, rewards, n, num_samples, "tilt")
        kl = probs * ((probs / ref).log() - (probs * (probs / ref).log()).sum())
        gradient = factor.factor * (solved - kl) + kl  # the signal's part alone is multiplied
        logits = logits - 0.05 * gradient / probs
        factor.update(float((probs * (torch.arange(OUTCOMES) + 0.5) / OUTCOMES).sum()), 1.0)
    assert factor.factor == pytest.approx(1.0, abs=0.03)
    assert factor.measured_n == pytest.approx(n, rel=0.02)


def test_it_changes_by_little_has_an_end_and_waits_for_the_policy() -> None:
    factor = SignalFactor(8)
    factor.update(0.9, pace=0.0)  # a learning rate of 0
    assert factor.factor == 1.0
    factor = SignalFactor(8)
    before = factor.factor
    for _ in range(200):
        factor.update(0.5, pace=1.0)
        assert factor.factor / before <= 1 + MAX_CHANGE + 1e-12
        before = factor.factor
    assert factor.factor == MAX_FACTOR
    for _ in range(400):
        factor.update(1.0, pace=1.0)  # beats all there is
    assert factor.factor == 1 / MAX_FACTOR
    again = SignalFactor(8)
    again.load_state(factor.state())
    for one in (again, factor):
        one.update(0.7, pace=0.5)
    assert again.state() == factor.state()


def test_where_many_samples_tie_it_stays() -> None:
    """With 0/1 rewards N reads too high: followed, the measured N would be 8 where the policy is at 5.7."""
    factor = SignalFactor(8)
    for _ in range(100):
        factor.update(0.6, pace=1.0, tied=0.5)
    assert factor.factor == 1.0
    assert factor.measured_n is None
    again = SignalFactor(8)
    again.load_state(factor.state())
    assert again.state() == factor.state()
    again.load_state({"factor": 1.0, "fast": 0.6, "slow": 0.6, "tied": 0.0})
    assert again.measured_n == pytest.approx(1.5)
    few = SignalFactor(8)
    few.update(0.6, pace=1.0, tied=0.05)
    assert few.factor > 1.0


def equally_likely(levels: int) -> torch.Tensor:
    return torch.linspace(0, 1, levels + 1).double()


def one_level(low: float, high: float) -> torch.Tensor:
    """All of the reference's quantiles from `low` to `high` tie; elsewhere the levels are as good as continuous."""
    return torch.cat([torch.linspace(0, low, 300), torch.linspace(high, 1, 300)]).double()


@pytest.mark.parametrize(
    ("n", "num_samples", "ends", "most"),
    [
        *((n, k, equally_likely(levels), 1.03) for n, k, levels in [(2, 4, 14), (4, 8, 24), (4, 4, 24), (8, 8, 44)]),
        (2, 4, one_level(0.213, 0.6), 1.045),
        (4, 4, one_level(0.356, 0.759), 1.115),
        (4, 8, one_level(0.325, 0.756), 1.1),
        (8, 4, one_level(0.55, 0.869), 1.2),
        (8, 8, one_level(0.506, 0.867), 1.185),
    ],
)
def test_up_to_that_share_of_ties_n_is_measured_well(n: int, num_samples: int, ends: torch.Tensor, most: float) -> None:
    """From the expected wins of Best-of-n; levels end at the reference's quantiles `ends`."""
    table = torch.tensor(win_table(n, num_samples)).nan_to_num()
    shares = torch.stack([ends[:-1] ** n, torch.diff(ends**n), 1 - ends[1:] ** n])
    counts = [(a, b) for a in range(num_samples + 1) for b in range(num_samples + 1 - a)]
    ways = [math.comb(num_samples, a) * math.comb(num_samples - a, b) * float(table[a, b]) for a, b in counts]
    wins = sum(
        float((torch.diff(ends) * way * shares[0] ** a * shares[1] ** b * shares[2] ** (num_samples - a - b)).sum())
        for way, (a, b) in zip(ways, counts, strict=True)
    )
    tied = float((shares[1] ** 2).sum())
    assert 0.9 * MAX_TIED < tied < 1.1 * MAX_TIED
    assert most - 0.03 < wins / (1 - wins) / n < most


def test_the_pace_is_that_of_the_optimizer() -> None:
    """Through a warm-up and down again, whatever its largest learning rate is; without one to read it is 1."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    assert learning_pace(optimizer) == 1.0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step, 8 - step) / 4)
    seen = []
    for _ in range(8):
        seen.append(learning_pace(optimizer))
        optimizer.step()
        schedule.step()
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
    optimizer.param_groups[0]["lr"] = None
    del optimizer.param_groups[0]["initial_lr"]
    assert learning_pace(optimizer) == 1.0


def test_the_pace_is_that_of_a_schedule_that_looks_at_a_metric() -> None:
    """Also behind a resume, whose optimizer is new and brings its state from the checkpoint."""
    weight = torch.nn.Parameter(torch.zeros(1))
    groups = [{"params": [weight], "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=9.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    assert learning_pace(optimizer) == 1.0
    for expected in (1.0, 0.5, 0.25):  # the first is no plateau yet
        schedule.step(3.0)
        assert learning_pace(optimizer) == expected
    again = torch.optim.SGD([{"params": [weight], "lr": 0.5}], lr=9.0)
    torch.optim.lr_scheduler.ReduceLROnPlateau(again)
    again.load_state_dict(optimizer.state_dict())
    assert learning_pace(again) == 0.25


def test_a_run_measures_n_and_multiplies_its_signal(tmp_path: Path) -> None:
    """What is logged is what its own samples say; the next step's signal is the table's times the factor."""
    rollouts: list[Any] = []
    made = trainer(
        tmp_path,
        **SETTINGS,
        num_logged_samples=0,
    )
    plain = made.step.roll_out

    def kept(*args: Any, **how: Any) -> Any:
        rollouts.append(plain(*args, **how))
        return rollouts[-1]

    made.step.roll_out = kept  # type: ignore[method-assign]
    made.train()
    factor, solved = SignalFactor(4), SelfBOND(n=4, num_samples=4)
    for row, rollout in zip(logged(tmp_path), rollouts, strict=False):
        rewards = rollout.samples.rewards_PM
        signal = solved.select(rewards[:, :4], rewards[:, :4]).signal_PC
        assert torch.allclose(rollout.signal_PC, signal * factor.factor)
        own, reference = rewards[:, :4], rewards[:, 4:]
        if not (own == reference).any():
            factor.update(float((own > reference).double().mean()), 1.0)
        else:
            table = torch.tensor(win_table(4, 4))
            wins = table[(own < reference).sum(1), (own == reference).sum(1)]
            factor.update(float(wins.mean()), 1.0)
        assert row["bond/signal_factor"] == pytest.approx(factor.factor)
        assert row["bond/effective_n"] == pytest.approx(factor.measured_n)
    assert len(rollouts) == 3
    assert factor.factor > 1.02


def zero_or_one(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text) % 2) for text in completions]


def test_a_run_with_rewards_of_0_and_1_keeps_the_solved_strength(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        trainer(tmp_path, **SETTINGS, reward=zero_or_one, num_logged_samples=0).train()
    rows = [row for row in logged(tmp_path) if "bond/signal_factor" in row]
    assert [row["bond/signal_factor"] for row in rows] == [1.0] * 3
    assert not any("bond/effective_n" in row for row in rows)
    assert caplog.text.count("adaptive_strength does not adapt") == 1
