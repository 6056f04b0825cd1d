"""Policy and reference together: samples of each, and the log-probabilities of both for these samples."""

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bondlm.data.columns import PROMPT_IDS
from bondlm.data.rendering import Rendering
from bondlm.engines import Role
from bondlm.errors import ConfigError, NonFiniteError
from bondlm.evaluation.files import finished_prompts, read_samples
from bondlm.evaluation.samples import from_rows
from bondlm.models.facts import vocabulary_size
from bondlm.models.logprobs import row_logprobs
from bondlm.rewards import SUM, Aggregation, NamedReward, applies_everywhere
from bondlm.rollout.sampler import Sampler
from bondlm.rollout.samples import Samples, SamplingParams, draw
from bondlm.rollout.seeds import Seeds
from bondlm.runs.folder import append_jsonl

_log = logging.getLogger(__name__)
CHUNK = 16  # prompts between two writes


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """The model that draws samples, the number per prompt, and how they are drawn."""

    name: str  # its row in the table
    file: str
    role: Role
    num_samples: int
    temperature: float = 1.0
    of_opponent: bool = False  # another policy, only for comparison with the policy

    @property
    def is_main(self) -> bool:
        """Whether both models score its samples: those at temperature 1, which follow the model's own distribution."""
        return self.temperature == 1.0 and not self.of_opponent


OPPONENT_FILE = "opponent.jsonl"


def sample_sets(num_samples: int, num_reference_samples: int, *, opponent: bool = False) -> list[SampleSet]:
    """Reference and policy at temperature 1, baselines at other temperatures, and an opponent."""
    return [
        SampleSet(name="reference", file="reference.jsonl", role="reference", num_samples=num_reference_samples),
        SampleSet(name="policy", file="policy.jsonl", role="policy", num_samples=num_samples),
        SampleSet(
            name="reference, greedy", file="reference-greedy.jsonl", role="reference", num_samples=1, temperature=0.0
        ),
        *(
            SampleSet(
                name=f"reference, T={t}",
                file=f"reference-t{t}.jsonl",
                role="reference",
                num_samples=num_samples,
                temperature=t,
            )
            for t in (0.3, 0.7)
        ),
        SampleSet(name="policy, greedy", file="policy-greedy.jsonl", role="policy", num_samples=1, temperature=0.0),
        *(
            [SampleSet(name="opponent", file=OPPONENT_FILE, role="policy", num_samples=num_samples, of_opponent=True)]
            if opponent
            else []
        ),
    ]


class Pair:
    """Two models over the same tokens, and optionally another policy, which may have a different tokenizer."""

    def __init__(
        self,
        policy: str,
        reference: str,
        opponent: str | None = None,
        *,
        dtype: str = "auto",
        max_rows: int | None = None,
        cuda_graphs: bool = True,
        init_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        rendering: Rendering = Rendering(),  # noqa: B008  frozen, so safe as a default
        is_start: bool = False,
    ) -> None:
        """Load the models; `rendering` says how prompts are rendered, `init_kwargs` are for `from_pretrained`, by role.

        Answers of the reference end where the policy's do. With `is_start` the policy was trained from the reference,
        and training did the same; another reference must not have end-of-sequence tokens that the policy lacks.

        Raises:
            ConfigError: a model cannot be loaded, or policy and reference do not share tokenizer, vocabulary and kind,
                or another reference ends its answers elsewhere.
        """
        how: dict[str, Any] = {"dtype": dtype, "max_rows": max_rows, "rendering": rendering, "cuda_graphs": cuda_graphs}
        of = init_kwargs or {}
        self.samplers: dict[Role, Sampler] = {"policy": Sampler(policy, init_kwargs=of.get("policy"), **how)}
        ends = self.samplers["policy"].encoder.eos_ids
        self.samplers["reference"] = Sampler(reference, init_kwargs=of.get("reference"), eos_ids=ends, **how)
        self.opponent = None if opponent is None else Sampler(opponent, init_kwargs=of.get("opponent"), **how)
        _refuse_other_tokens(self.samplers["policy"], policy, self.samplers["reference"], reference)
        if not is_start:
            _refuse_other_ends(self.samplers["policy"], policy, self.samplers["reference"], reference)

    def sampler(self, wanted: SampleSet) -> Sampler:
        """The sampler that draws these samples."""
        return self.opponent if wanted.of_opponent and self.opponent is not None else self.samplers[wanted.role]

    def rows(
        self,
        source: Any,
        *,
        max_prompt_length: int | None,
        max_completion_length: int,
        truncate_prompt: str = "never",
        for_opponent: bool = False,
    ) -> list[dict[str, Any]]:
        """Read and encode prompts as training does.

        Raises:
            ConfigError, DataError: prompts that cannot be used.
        """
        sampler = self.opponent if for_opponent and self.opponent is not None else self.samplers["policy"]
        limits: dict[str, Any] = {"max_prompt_length": max_prompt_length, "truncate_prompt": truncate_prompt}
        return sampler.rows(source, held_out=True, max_completion_length=max_completion_length, **limits)

    def log_ratio(self, rows: Sequence[Mapping[str, Any]], samples: Samples) -> Tensor:
        """Log pi(y) - log pi_ref(y) (P, M), both from the same kind of forward pass, so that rounding cancels."""
        pairs = [(row[PROMPT_IDS], c.ids) for row, cs in zip(rows, samples.completions, strict=True) for c in cs]
        scores = [self._score(self.samplers[role], pairs) for role in ("policy", "reference")]
        ratio = (scores[0] - scores[1]).double().view(len(rows), -1)
        if not torch.isfinite(ratio).all():
            raise NonFiniteError("a log-probability of a sample is not finite: try --dtype float32")
        return ratio

    def _score(self, sampler: Sampler, pairs: Any) -> Tensor:
        encoder = sampler.encoder
        how: dict[str, Any] = {"start_id": encoder.start_id, "device": sampler.device}
        return row_logprobs(sampler.model, pairs, encoder.pad_id, **how)


def _refuse_other_tokens(policy: Sampler, policy_name: str, reference: Sampler, reference_name: str) -> None:
    mine, theirs = policy.tokenizer.get_vocab(), reference.tokenizer.get_vocab()
    sizes = [vocabulary_size(sampler.model.config) for sampler in (policy, reference)]
    kinds = [bool(sampler.model.config.is_encoder_decoder) for sampler in (policy, reference)]
    if mine != theirs:
        different = len(mine.items() ^ theirs.items())
        raise ConfigError(
            f"the policy {policy_name!r} ({len(mine)} tokens) and the reference {reference_name!r} ({len(theirs)} "
            f"tokens) have different tokenizers ({different} entries differ): a KL needs the same tokens. Give the "
            "model that the policy was trained from as reference."
        )
    if sizes[0] != sizes[1] or kinds[0] != kinds[1]:
        raise ConfigError(
            f"the policy {policy_name!r} (vocabulary of {sizes[0]}, encoder-decoder: {kinds[0]}) and the reference "
            f"{reference_name!r} ({sizes[1]}, {kinds[1]}) differ in shape: give the model that the "
            "policy was trained from as reference."
        )


def _refuse_other_ends(policy: Sampler, policy_name: str, reference: Sampler, reference_name: str) -> None:
    """Say that a reference ends its answers at more tokens than by itself, and refuse fewer: it would run past its end.

    KL and win rate compare two distributions over the same sequences, which end at the same tokens.
    """
    mine, own = policy.encoder.eos_ids, reference.own_eos_ids
    if lost := [i for i in own if i not in mine]:
        raise ConfigError(
            f"the reference {reference_name!r} ends its answers at {_tokens(reference, lost)}, the policy "
            f"{policy_name!r} only at {_tokens(policy, mine)}: a KL needs answers that end at the same tokens. Give "
            "the model that the policy was trained from as reference (an --opponent may end elsewhere), or, if the "
            f"policy ends its answers there too, add {', '.join(map(str, lost))} to eos_token_id in its "
            "generation_config.json"
        )
    if more := [i for i in mine if i not in own]:
        _log.warning(
            "answers of the reference %r end where the policy's do, also at %s", reference_name, _tokens(policy, more)
        )


def _tokens(sampler: Sampler, ids: Sequence[int]) -> str:
    return ", ".join(f"{sampler.tokenizer.convert_ids_to_tokens(i)!r} (id {i})" for i in ids)


def fill(
    path: Path,
    wanted: SampleSet,
    pair: Pair,
    rows: Sequence[Mapping[str, Any]],
    rewards: Sequence[NamedReward],
    *,
    number: int,
    num_judges: int,
    seed: int,
    max_completion_length: int,
    on_prompts_done: Callable[[int], object],
    aggregation: Aggregation = SUM,
    reference_file: tuple[Path, int] | None = None,
) -> None:
    """Append the samples that are missing in the file, one chunk of prompts at a time.

    Args:
        path: the file.
        wanted: what to draw.
        pair: the models.
        rows: encoded prompts.
        rewards: the optimised rewards, then `num_judges` judges.
        number: the number of the sample set, on which the seeds depend.
        num_judges: how many of the rewards are judges.
        seed: seed of the samples.
        max_completion_length: maximum tokens of a completion.
        on_prompts_done: called with the number of prompts added to the file.
        aggregation: how several rewards become one.
        reference_file: the file of the reference's samples to compare with, and their number per prompt.
    """
    done = finished_prompts(path, [row["prompt"] for row in rows], wanted.num_samples)
    on_prompts_done(done)
    sampler = pair.sampler(wanted)
    references = None if reference_file is None else _References(*reference_file, skip=done)
    for start in range(done, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        params = SamplingParams(
            max_new_tokens=max_completion_length,
            seeds=Seeds.of_comparison(seed, number),
            temperature=wanted.temperature,
        )
        positions = range(start, start + len(chunk))
        drawn = draw(sampler.engine, chunk, {wanted.role: wanted.num_samples}, params, positions)
        reference = None if references is None else references.next(len(chunk))
        samples = sampler.score(rewards, chunk, drawn, aggregation, reference, num_judges)
        ratio = pair.log_ratio(chunk, samples) if wanted.is_main else None
        names = [reward.name for reward in rewards]
        judges = names[len(names) - num_judges :]
        applies_everywhere({name: samples.by_name[name] for name in judges})
        append_jsonl(path, list(_as_rows(chunk, samples, ratio, judges)))
        on_prompts_done(len(chunk))


class _References:
    """The reference's scored samples, some prompts at a time."""

    def __init__(self, path: Path, num_samples: int, *, skip: int) -> None:
        self._num_samples = num_samples
        self._rows = itertools.islice(read_samples(path), skip * num_samples, None)

    def next(self, num_prompts: int) -> Samples:
        rows = itertools.islice(self._rows, num_prompts * self._num_samples)
        return from_rows(rows, self._num_samples, num_texts=None)


def _as_rows(
    chunk: Sequence[Mapping[str, Any]], samples: Samples, ratio: Tensor | None, judges: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for i, row in enumerate(chunk):
        for j, completion in enumerate(samples.completions[i]):
            by_name = {name: float(values[i, j]) for name, values in samples.by_name.items()}
            yield {
                "prompt": row["prompt"],
                "completion": samples.texts[i][j],
                "reward": float(samples.rewards_PM[i, j]),
                "rewards": {name: value for name, value in by_name.items() if name not in judges},
                "judges": {name: by_name[name] for name in judges},
                "finished": completion.finished,
                "tokens": len(completion.ids),
                "logprob": completion.logprob,
                **({} if ratio is None else {"log_ratio": float(ratio[i, j])}),
            }
