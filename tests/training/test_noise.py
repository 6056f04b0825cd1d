"""The gradient's noise scale: unbiased estimates from gradients whose law is known, and where it is measured."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from trainer.helpers import logged, trainer

from bondlm.training import noise
from bondlm.training.clock import StepMeans
from bondlm.training.noise import SCALE, SQUARE, TRACE, NoiseScale, with_noise_scale
from bondlm.training.processes import World

ALONE = World(size=1, rank=0, device=torch.device("cpu"))


def scale_of(means: StepMeans, *, accumulate: int = 4, world_size: int = 1, fp16: bool = False) -> NoiseScale:
    args = SimpleNamespace(gradient_accumulation_steps=accumulate, world_size=world_size, fp16=fp16, fsdp=None)
    accelerator: Any = SimpleNamespace(gradient_state=SimpleNamespace(plugin_kwargs={}))
    return NoiseScale(args, accelerator, means)


@pytest.mark.parametrize("world_size", [1, 2])
def test_it_is_the_trace_over_the_square_of_the_gradient(world_size: int) -> None:
    """Gradients of a prompt N(G, 4 I) in 50 dimensions, |G|^2 = 10: 200 and 10, a noise scale of 20 prompts."""
    generator = torch.Generator().manual_seed(0)
    layer, means = nn.Linear(50, 1, bias=False), StepMeans()
    measured, true = scale_of(means, world_size=world_size), torch.full((50,), 10**0.5 / 50**0.5)
    small, total = 3, 12.0
    for _ in range(3000):
        assert measured.starts(noise.EVERY, 4)
        each = true + 2 * torch.randn(int(total), 50, generator=generator)
        # As the trainer's loss has it: one process's sum, times their number, over the prompts of all.
        layer.weight.grad = (each[:small].sum(dim=0) * world_size / total)[None]
        measured.note(layer, small, total, is_last=False)
        measured.note(layer, small, total, is_last=False)  # what comes between is not looked at
        layer.weight.grad = each.mean(dim=0)[None]
        measured.note(layer, small, total, is_last=True)
    logs = with_noise_scale(means.drain(ALONE))
    assert logs[TRACE] == pytest.approx(200, rel=0.02)
    assert logs[SQUARE] == pytest.approx(10, rel=0.1)
    assert logs[SCALE] == pytest.approx(20, rel=0.1)


def test_where_it_is_not_measured() -> None:
    means = StepMeans()
    assert not scale_of(means, accumulate=1).starts(noise.EVERY, 1)
    assert not scale_of(means, fp16=True).starts(noise.EVERY, 4)
    assert not scale_of(means).starts(noise.EVERY + 1, 4)
    assert not scale_of(means).starts(noise.EVERY, 1)  # the last window of an epoch may have one batch
    measured, layer = scale_of(means), nn.Linear(2, 1)
    assert measured.starts(noise.EVERY, 2)
    layer.weight.grad = torch.full((1, 2), float("nan"))
    measured.note(layer, 2, 4.0, is_last=False)
    measured.note(layer, 2, 4.0, is_last=True)
    measured.starts(noise.EVERY, 2)
    measured.note(layer, 0, 4.0, is_last=False)  # no prompt of the first batch counts
    measured.note(layer, 2, 4.0, is_last=True)
    assert means.drain(ALONE) == {}


def test_a_gradient_that_noise_hides_has_no_scale() -> None:
    assert with_noise_scale({TRACE: 5.0, SQUARE: -0.1}) == {TRACE: 5.0, SQUARE: -0.1}
    assert with_noise_scale({TRACE: 5.0, SQUARE: 2.0})[SCALE] == 2.5
    assert with_noise_scale({"loss": 1.0}) == {"loss": 1.0}


def test_a_run_logs_it_from_its_real_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RLOO's gradient of a prompt is its own: those of the step's first two prompts are a step of two prompts'."""
    monkeypatch.setattr(noise, "EVERY", 1)
    rows = {}
    for size, accumulate in ((2, 4), (8, 1), (2, 1)):
        settings: dict[str, Any] = {"objective": "rloo", "num_samples": 3, "anchor": "fixed", "beta_rl": 0.1}
        settings |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate, "max_steps": 1}
        folder = tmp_path / f"{size}x{accumulate}"
        trainer(folder, **settings, max_grad_norm=1e-3).train()  # the norm is that before clipping
        rows[size, accumulate] = logged(folder)[0]
    measured, whole, part = rows.values()
    small, big = part["grad_norm"] ** 2, whole["grad_norm"] ** 2
    assert measured[TRACE] == pytest.approx((small - big) / (1 / 2 - 1 / 8), rel=1e-3)
    assert measured[SQUARE] == pytest.approx((8 * big - 2 * small) / (8 - 2), rel=1e-3, abs=1e-3 * big)
    assert measured["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
    assert not any(TRACE in row for row in (whole, part))
