"""The learned quantile: Sessa et al. 2024, arXiv 2407.14622, appendix B.1.

A small model p_theta(x, y) of the chance that a sample of the anchor is at most as good as y. Its label is one
comparison, 1{r(y') <= r(y)}, and its loss is the binary cross-entropy (Eq. 25), minimised together with the policy: one
step per rollout. In the paper it is a second language model. Here it is a small network on features of the frozen
reference, which need no training: its last hidden states, averaged over the completion, and at the last token.

Shapes: B completions, D hidden size.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from bondlm.data.context import positions
from bondlm.models.facts import takes_argument
from bondlm.models.logprobs import Group, by_length, collate, within_budget
from bondlm.models.memory import try_or_halve

WIDTH = 128


class QuantileModel(nn.Module):
    """log p_theta(x, y) from the reference's features; it has its own optimizer."""

    def __init__(self, hidden_size: int, *, learning_rate: float, seed: int) -> None:
        """`hidden_size` is the reference's; the initial weights depend only on `seed`."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the accelerators
            last = nn.Linear(WIDTH, 1)
            self.net = nn.Sequential(nn.LayerNorm(2 * hidden_size), nn.Linear(2 * hidden_size, WIDTH), nn.GELU(), last)
        nn.init.zeros_(last.weight)  # it starts with p = 1/2 everywhere
        nn.init.zeros_(last.bias)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=learning_rate, weight_decay=0.01)

    @torch.no_grad()
    def log_quantile(self, features_BD: Tensor) -> Tensor:
        """Log p_theta (B,), <= 0, float32."""
        return logsigmoid(self.net(features_BD).squeeze(1))

    def update(self, features_BD: Tensor, labels_B: Tensor) -> float:
        """One step on the binary cross-entropy against `labels_B` in [0, 1]; returns the loss before it, in nats.

        If the loss or the gradient is not finite, it takes no step, since that would ruin the model permanently.
        """
        with torch.enable_grad():
            loss = binary_cross_entropy_with_logits(self.net(features_BD).squeeze(1), labels_B)
            self.optimizer.zero_grad()
            loss.backward()
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        if all(torch.isfinite(each).all() for each in (loss, *gradients)):
            self.optimizer.step()
        return float(loss.detach())

    def tensors(self) -> dict[str, Tensor]:
        """Weights and the optimizer's moments, for a checkpoint."""
        state = {f"net.{name}": tensor.detach() for name, tensor in self.net.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{i}.{name}": tensor for name, tensor in moments.items()}
        return state

    def load_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state from `tensors`; names and shapes must match exactly (KeyError, RuntimeError)."""
        self.net.load_state_dict({n.removeprefix("net."): t for n, t in state.items() if n.startswith("net.")})
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})


@torch.no_grad()
def completion_features(
    model: Any,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    pad_id: int,
    *,
    start_id: int | None,
    device: torch.device,
    batch_rows: int = 16,
) -> Tensor:
    """Features (B, 2 D) fp32 of (prompt, completion) rows: last hidden states, their mean and the last one.

    At most `batch_rows` rows go through the model together; fewer after an out-of-memory error, or if the model makes
    logits of all columns and these would be too many.

    Raises:
        ResourceError: not even one row fits into the memory.
    """
    groups: list[Group] = [(prompt, [completion]) for prompt, completion in rows]
    features: list[Tensor] = [torch.empty(0)] * len(rows)
    pending, size = by_length(groups), batch_rows
    makes_all = start_id is not None or not takes_argument(model, "logits_to_keep")
    while pending:
        chunk = pending[:size]
        if makes_all:
            chunk = chunk[: within_budget(model, [groups[i] for i in chunk])]
        found, fitting = try_or_halve(
            partial(_chunk_features, model, [groups[i] for i in chunk], pad_id, start_id, device),
            len(chunk),
            "completions",
            doing="reading the features of",
            advice=f"its prompt has {len(rows[chunk[-1]][0])} tokens and it has {len(rows[chunk[-1]][1])}: use a "
            "smaller model or dtype, or a smaller max_completion_length",
        )
        if found is None:
            size = fitting
            continue
        for i, feature in zip(chunk, found, strict=True):
            features[i] = feature
        pending = pending[len(chunk) :]
    return torch.stack(features)


def _chunk_features(
    model: Any, groups: Sequence[Group], pad_id: int, start_id: int | None, device: torch.device
) -> Tensor:
    """One forward pass."""
    batch = collate(groups, pad_id, start_id=start_id)
    mask_BT = batch.pop("completion_mask")[:, 0].to(device)
    ids_BT = batch.pop("completion_ids")[:, 0]
    # A token's own column comes right after the column that predicts it.
    if start_id is None:
        column_BT = batch.pop("predictor")[:, 0].to(device) + 1
        columns = batch.pop("logits_to_keep")
        if takes_argument(model, "logits_to_keep"):
            batch["logits_to_keep"] = columns[:1]  # the head's output is not used
    else:
        decoded = torch.cat([batch["decoder_input_ids"][:, :1], ids_BT], dim=1)
        batch["decoder_input_ids"] = decoded[:, : positions(model.config, "decoder")]  # a table may have no more
        column_BT = torch.arange(mask_BT.shape[1], device=device).expand(mask_BT.shape) + 1
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    out = model(**inputs, output_hidden_states=True, use_cache=False)
    states = out.hidden_states if start_id is None else out.decoder_hidden_states
    column_BT = column_BT.clamp(max=states[-1].shape[1] - 1)  # beyond the row there is only padding
    hidden_BTD = states[-1].gather(1, column_BT.unsqueeze(2).expand(-1, -1, states[-1].shape[2])).float()
    mean_BD = (hidden_BTD * mask_BT.unsqueeze(2)).sum(1) / mask_BT.sum(1, keepdim=True)
    last_B = mask_BT.sum(1).long() - 1
    last_BD = hidden_BTD[torch.arange(len(groups), device=device), last_B]
    return torch.cat([mean_BD, last_BD], dim=1)


def quantile_model(hidden_size: int, args: Any) -> QuantileModel:
    """A fresh quantile model on the run's device."""
    return QuantileModel(hidden_size, learning_rate=args.quantile_learning_rate, seed=args.seed).to(args.device)
