"""A model to sample from without training, for `sample` and `score`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel

from bondlm.data.columns import PROMPT_ROW
from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.data.rendering import Rendering
from bondlm.engines.local.engine import TransformersEngine
from bondlm.engines.local.probe import find_decoding
from bondlm.models.adapters import without_wrapper
from bondlm.models.load import fast_dtype, load_model, load_tokenizer
from bondlm.models.probe import check_model
from bondlm.rewards import SUM, Aggregation, NamedReward
from bondlm.rollout.samples import Samples, SamplingParams, draw, score_samples
from bondlm.rollout.seeds import Seeds


class Sampler:
    """Answers prompts with a model, by folder or hub name."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        max_rows: int | None = None,
        cuda_graphs: bool = True,
        init_kwargs: Mapping[str, Any] | None = None,
        rendering: Rendering = Rendering(),  # noqa: B008  frozen, so safe as a default
        eos_ids: tuple[int, ...] | None = None,
    ) -> None:
        """Load the model (or an adapter on its base) and its tokenizer; `rendering` says how prompts are rendered.

        `init_kwargs` are for `from_pretrained` of the model, or of the adapter's base. Answers end at `eos_ids`, or at
        the model's own end-of-sequence tokens.

        Raises:
            ConfigError: the model cannot be loaded, or has no token that ends an answer.
        """
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        how = dict(init_kwargs or {})
        weights = fast_dtype(self.device) if dtype == "auto" else getattr(torch, dtype)
        loaded: Any = load_model(model, dtype=weights, **how)
        core = without_wrapper(loaded) if isinstance(loaded, PeftModel) else loaded
        self.model: Any = core.to(self.device).eval()
        self.tokenizer = load_tokenizer(model, how.get("revision"))
        encoder = PromptEncoder.of_model(core, self.tokenizer, rendering=rendering)
        self.own_eos_ids = encoder.eos_ids
        self.encoder = replace(encoder, eos_ids=eos_ids or encoder.eos_ids)
        find_decoding(self.model)
        check_model(self.model, self.device, is_noise_allowed=True)  # it is not trained here
        how = {"eos_ids": self.encoder.eos_ids, "pad_id": self.encoder.pad_id}
        self.engine = TransformersEngine(self._use, max_rows=max_rows, cuda_graphs=cuda_graphs, **how)

    @contextmanager
    def _use(self, role: str) -> Iterator[Any]:
        yield self.model

    def rows(
        self,
        source: Any,
        *,
        max_prompt_length: int | None = None,
        max_completion_length: int = 256,
        truncate_prompt: str = "never",
        held_out: bool = False,
    ) -> list[dict[str, Any]]:
        """Read and encode prompts; `held_out` ones come from the split that is not for training.

        Raises:
            ConfigError, DataError: prompts that cannot be used.
        """
        limits = {"max_prompt_length": max_prompt_length, "max_completion_length": max_completion_length}
        rows = self.encoder.limited_to(truncate_prompt=truncate_prompt, **limits).encoded(source, held_out=held_out)
        return [{name: value for name, value in row.items() if name != PROMPT_ROW} for row in rows]

    def sample(
        self,
        rows: Sequence[Mapping[str, Any]],
        num_samples: int,
        *,
        max_completion_length: int = 256,
        temperature: float = 1.0,
        seed: int = 42,
        first_position: int = 0,
    ) -> list[list[Any]]:
        """Draw completions of encoded rows."""
        params = SamplingParams(max_new_tokens=max_completion_length, seeds=Seeds(seed), temperature=temperature)
        positions = range(first_position, first_position + len(rows))
        return draw(self.engine, rows, {"policy": num_samples}, params, positions)

    def texts(self, completions: list[list[Any]]) -> list[list[str]]:
        """Completions as text."""
        return self.encoder.decode([[c.ids for c in row] for row in completions])

    def score(
        self,
        rewards: Sequence[NamedReward],
        rows: Sequence[Mapping[str, Any]],
        completions: list[list[Any]],
        aggregation: Aggregation = SUM,
        reference: Samples | None = None,
        num_judges: int = 0,
    ) -> Samples:
        """Score completions of encoded rows; ranks are counted among the samples of `reference`, if given.

        The last `num_judges` rewards are judges, scored separately.
        """
        how: dict[str, Any] = {"aggregation": aggregation, "reference": reference, "num_judges": num_judges}
        return score_samples(rewards, rows, completions, encoder=self.encoder, **how)
