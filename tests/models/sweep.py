"""Every family against the plain way: a forward pass of prompt + completion without cache, mask or tricks.

`python tests/models/sweep.py [families] [--write docs/models.md]` prints the table.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bondlm.engines.local.engine import TransformersEngine
from bondlm.engines.local.probe import find_decoding
from bondlm.models.facts import start_id, vocabulary_size
from bondlm.models.head import exact_head
from bondlm.models.load import disable_dropout
from bondlm.models.logprobs import Group, collate, score_groups, token_logprobs
from bondlm.models.probe import check_model

CPU = torch.device("cpu")
TOLERANCE = 2e-3  # nats per token, fp32
NUM_SAMPLES, MAX_NEW_TOKENS = 3, 7
Pairs = list[tuple[list[int], list[list[int]]]]


def prompts(vocabulary: int) -> dict[str, list[list[int]]]:
    """Prompts of many lengths, shorter and longer than the window; some batches have a common beginning."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(6, vocabulary, (length,), generator=generator).tolist()

    beginning = ids(12)
    return {
        "apart": [ids(n) for n in (3, 31, 14, 6)],
        "alike": [[*beginning, *ids(n)] for n in (2, 27, 9, 1)],
    }


@torch.no_grad()
def plain_logprobs(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Log-probability of each token, from one pass over the whole text."""
    if model.config.is_encoder_decoder:
        decoder = [start_id(model), *completion[:-1]]
        inputs = {"input_ids": torch.tensor([list(prompt)]), "decoder_input_ids": torch.tensor([decoder])}
        logits = model(**inputs, use_cache=False).logits[0]
    else:
        logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[
            0, len(prompt) - 1 : -1
        ]
    return logits.float().log_softmax(-1)[torch.arange(len(completion)), list(completion)]


@contextmanager
def lent(model: Any) -> Iterator[Any]:
    yield model


def check(model: Any, pad_id: int, eos_ids: list[int]) -> dict[str, float]:
    """The largest difference to the plain way, nats per token, of all that training asks of a model."""
    worst: dict[str, float] = {}

    def note(name: str, difference: float) -> None:
        worst[name] = max(worst.get(name, 0.0), difference if difference == difference else float("inf"))

    disable_dropout(model)
    find_decoding(model)
    shares = check_model(model, CPU)
    head = exact_head(model, CPU)
    engine = TransformersEngine(lambda role: lent(model), eos_ids=eos_ids, pad_id=pad_id)
    for batch in prompts(vocabulary_size(model.config)).values():
        drawn = engine.generate(
            batch, NUM_SAMPLES, role="policy", max_new_tokens=MAX_NEW_TOKENS, seeds=list(range(len(batch)))
        )
        pairs = [(prompt, [c.ids for c in row]) for prompt, row in zip(batch, drawn, strict=True)]
        plain = [[plain_logprobs(model, prompt, ids) for ids in row] for prompt, row in pairs]
        for row, expected in zip(drawn, plain, strict=True):
            for c, logps in zip(row, expected, strict=True):
                note("engine", float((torch.tensor(c.logprobs) - logps).abs().max()))
        groups: list[Group] = list(pairs) if shares else [(p, [c]) for p, cs in pairs for c in cs]
        flat = [logps for row in plain for logps in row]
        sums, lengths = torch.stack([logps.sum() for logps in flat]), torch.tensor([len(logps) for logps in flat])
        scores = score_groups(model, groups, pad_id, start_id=start_id(model), device=CPU).flatten()
        note("scoring", float(((scores - sums) / lengths).abs().max()))
        model.train()
        for _ in range(2):
            learned = token_logprobs(model, collate(groups, pad_id, start_id=start_id(model)), head=head)
            for logps, expected in zip(learned.detach().flatten(0, 1), flat, strict=True):
                note("learning", float((logps[: len(expected)] - expected).abs().max()))
        model.eval()
    return worst


def sensitivity(model: Any) -> float:
    """How much the last token's law depends on the first token of the prompt: 0 would make the sweep blind."""
    (prompt,) = prompts(vocabulary_size(model.config))["apart"][:1]
    other = [prompt[0] ^ 1, *prompt[1:]]
    completion = [7, 8]
    return float((plain_logprobs(model, prompt, completion) - plain_logprobs(model, other, completion)).abs().max())
