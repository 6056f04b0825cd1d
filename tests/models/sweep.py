"""Every family against the plain way: a forward pass of prompt + completion without cache, mask or tricks.

`PYTHONPATH=tests python -m models.sweep [families]` prints the table; with `--write` the page of the docs gets it.
"""

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bondlm.data.context import start_id
from bondlm.engines.local.engine import TransformersEngine
from bondlm.engines.local.probe import find_decoding
from bondlm.errors import ConfigError
from bondlm.models.facts import vocabulary_size
from bondlm.models.head import exact_head
from bondlm.models.load import disable_dropout
from bondlm.models.logprobs import Group, collate, score_groups, token_logprobs
from bondlm.models.probe import FAILURES, check_model
from bondlm.models.ways import Ways, ways_of
from models.families import EOS, NAMES, PAD, CannotBuildError, build

CPU = torch.device("cpu")
TOLERANCE = 2e-3  # nats per token, fp32
NUM_SAMPLES, MAX_NEW_TOKENS = 3, 7
PAGE = Path(__file__).parents[2] / "docs" / "models.md"


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


def check(model: Any, pad_id: int, eos_ids: list[int]) -> tuple[dict[str, float], bool]:
    """The largest difference to the plain way, nats per token, of all that training asks of a model.

    And whether completions share their prompt's row.
    """
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
    return worst, shares


def sensitivity(model: Any) -> float:
    """How much the last token's law depends on the first token of the prompt: 0 would make the sweep blind."""
    (prompt,) = prompts(vocabulary_size(model.config))["apart"][:1]
    other = [prompt[0] ^ 1, *prompt[1:]]
    completion = [7, 8]
    return float((plain_logprobs(model, prompt, completion) - plain_logprobs(model, other, completion)).abs().max())


# -- verdicts and the page that holds them


class Verdict(NamedTuple):
    """What is known of a family: "exact", "refused" or "not tried", and how or why."""

    family: str
    verdict: str
    note: str


def verdict(family: str) -> Verdict:
    """Build a tiny model of the family and hold all that training asks of it against the plain way."""
    try:
        model = build(family)
    except CannotBuildError as error:
        return Verdict(family, "not tried", f"no small config: {_first_line(error)}")
    try:
        worst, shares = check(model, PAD, EOS)
    except ConfigError as error:
        return Verdict(family, "refused", _first_line(error))
    wrong = {name: difference for name, difference in worst.items() if difference > TOLERANCE}
    if wrong:
        return Verdict(family, "WRONG", ", ".join(f"{name} {difference:.2g}" for name, difference in wrong.items()))
    if sensitivity(model) < 5 * TOLERANCE:
        return Verdict(family, "BLIND", "its distributions hardly depend on the prompt")
    return Verdict(family, "exact", how(ways_of(model), shares))


def how(ways: Ways, shares: bool) -> str:
    """In words what is computed together."""
    if not ways.cached:
        decoding = "the whole text at every token (slow)"
    else:
        decoding = "all prompts together" if ways.padded else "one prompt length at a time"
    shared = [name for name, shared in (("beginnings", ways.prefix), ("prompts", shares)) if shared]
    return f"{decoding}; shared: {' and '.join(shared) or 'nothing'}"


def _first_line(error: Exception) -> str:
    """The reason without numbers, which differ from machine to machine."""
    text = re.sub(r"\s+", " ", str(error)).strip().replace("|", "/")
    text = re.sub(r"^Class validation error.*?Error: ", "", text)
    text = re.sub(r"^\w+(?:: | (?=attends|cannot))", "", text)
    text = re.sub(r" by [\d.e-]+ nats.*| alone: [\d.e-]+ nats.*", lambda m: " alone" * m[0].startswith(" alone"), text)
    return text.split(". ")[0]


def on_page() -> dict[str, Verdict]:
    """The rows of the table in the docs."""
    rows = (line.strip("| \n").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines())
    return {
        row[0].strip("`"): Verdict(row[0].strip("`"), row[1], row[2]) for row in rows if len(row) == 3 and "`" in row[0]
    }


def write_page(found: dict[str, Verdict]) -> None:
    """Replace the page's table; rows of families that were not tried now stay."""
    text = PAGE.read_text(encoding="utf-8")
    merged = on_page() | found
    rows = [f"| `{v.family}` | {v.verdict} | {v.note} |" for _, v in sorted(merged.items())]
    begin = text.index("| Family |")
    head = text[begin:].splitlines()[:2]
    PAGE.write_text(text[:begin] + "\n".join([*head, *rows]) + "\n", encoding="utf-8")


def main() -> None:
    """Print the table, and write it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="default: all")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    found = {}
    for family in options.families or NAMES:
        try:
            found[family] = verdict(family)
        except FAILURES as error:
            found[family] = Verdict(family, "CRASH", _first_line(error))
        print(" | ".join(found[family]), flush=True)
    if options.write:
        write_page(found)


if __name__ == "__main__":
    sys.exit(main())
