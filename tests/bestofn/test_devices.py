"""Tables follow the device of what they are looked up with: seen with fake tensors, which need no GPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bondlm import bestofn
from bondlm.bestofn import matching, order

FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "win_rates": bestofn.win_rates,
    "best_of_n_win_rates": lambda mine, refs: bestofn.best_of_n_win_rates(refs),
    "quantile": bestofn.quantile,
    "clamped": lambda mine, refs: bestofn.log_quantile(mine, refs, "clamped"),
    "best_of_n_curve": lambda mine, refs: order.best_of_n_curve(refs),
    "best_of_n_opponents": lambda mine, refs: matching.best_of_n_opponents(mine, refs, [1, 2]),
    "truncated_log_quantiles": matching.truncated_log_quantiles,
    "best_of_n_log_quantiles": lambda mine, refs: matching.best_of_n_log_quantiles(refs),
    "clamped signal": lambda mine, refs: bestofn.mean_signal(mine, mine, 3, estimate="clamped", k=4),
    "smoothed signal": lambda mine, refs: bestofn.mean_signal(mine, mine, 3, estimate="smoothed", k=4),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_are_where_the_rewards_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bestofn.quantiles, bestofn.order, bestofn.oracle.exact_signal):
        for check in ("check_no_nan", "check_finite"):  # these look at values, and fake tensors have none
            monkeypatch.setattr(module, check, lambda values, name: None, raising=False)
    monkeypatch.setattr(bestofn.oracle.exact_signal, "check_probs", lambda probs, name: probs)
    with FakeTensorMode():
        mine = torch.rand(3, 4, dtype=torch.float64, device="cuda")
        refs = torch.rand(3, 6, dtype=torch.float64, device="cuda")
        assert FUNCTIONS[name](mine, refs).device.type == "cuda"
