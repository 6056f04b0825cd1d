"""Draw and save all figures of a report, with their captions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

from bondlm.report.canvas import drawing, save
from bondlm.report.curves import curve_figure, phase_figure
from bondlm.report.figures import best_of_n_figure, plane_figure, quantile_figure, reward_plane_figure
from bondlm.report.read import Run
from bondlm.report.safe import visible


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """One figure of the page."""

    name: str
    title: str
    caption: str
    svg: str
    training: bool


def draw_figures(runs: Sequence[Run], folder: Path) -> list[Drawn]:
    """Draw what the runs hold, write `NAME.svg` and `NAME.png` into `folder`, return the SVGs for the page."""
    runs = [replace(run, name=visible(run.name)) for run in runs]
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with drawing():
        for name, title, caption, make, training in _plan(runs):
            figure = make()
            if figure is not None:
                svg = save(figure, folder, name)
                drawn.append(Drawn(name=name, title=title, caption=caption, svg=svg, training=training))
    return drawn


def _plan(runs: Sequence[Run]) -> list[tuple[str, str, str, Callable[[], Figure | None], bool]]:
    """Name, title, caption and drawing function of each figure, and whether it is about training."""
    first = runs[0]
    return [
        (
            "best-of-n",
            "Best-of-N curve",
            "Mean reward of the reference's Best-of-N. The policy stands at its effective N, matched on win rate: "
            "above the curve, its mean reward is higher than that of Best-of-N with the same win rate. Band and bars: "
            "95% intervals.",
            lambda: best_of_n_figure(first),
            False,
        ),
        (
            "kl-plane",
            "Win rate against KL",
            "The line is exact Best-of-N with continuous rewards, labelled with N. It has nearly the highest win rate "
            "for each KL, so the distance of a run to its right is wasted KL. Grey: RLOO on another task (T5 "
            "summaries), with beta_rl swept. Small marks: evaluations during training.",
            lambda: plane_figure(runs),
            False,
        ),
        (
            "reward-plane",
            "Reward against KL",
            "The line is the reference's own Best-of-N: the mean reward of its samples, and the KL that it needs, with "
            "the ties that the samples show. Small marks: evaluations during training.",
            lambda: reward_plane_figure(runs),
            False,
        ),
        (
            "quantiles",
            "Quantiles",
            "Where the policy's samples fall among the reference's for the same prompt. Best-of-N has density "
            "N u^(N−1); the reference is flat.",
            lambda: quantile_figure(first),
            False,
        ),
        *_training_plan(runs),
    ]


def _training_plan(runs: Sequence[Run]) -> list[tuple[str, str, str, Callable[[], Figure | None], bool]]:
    return [
        (
            "training-reward",
            "Reward",
            "Of the training samples (line) and of held-out prompts (points).",
            lambda: curve_figure(runs, "reward", "reward", evaluated="eval_reward"),
            True,
        ),
        (
            "training-kl",
            "KL to the reference",
            "Of the training samples (line) and of held-out prompts (points), in nats per completion.",
            lambda: curve_figure(runs, "kl", "KL, nats", evaluated="eval_kl"),
            True,
        ),
        (
            "training-effective-n",
            "Effective N",
            "Of held-out prompts (points); with adaptive_strength also of the training samples (line).",
            lambda: curve_figure(runs, "bond/effective_n", "effective N", evaluated="eval_effective_n"),
            True,
        ),
        (
            "training-penalty",
            "Penalty rate",
            "Share of policy samples that are worse than both anchor samples: 1/3 for a policy equal to its anchor, "
            "less for a better one.",
            lambda: curve_figure(runs, "bond/penalty_rate", "penalty rate"),
            True,
        ),
        ("phases", "Time of a step", "Mean seconds by phase, with shares.", lambda: phase_figure(runs), True),
    ]
