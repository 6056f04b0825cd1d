"""A model to sample from, without training: what `sample` and `score` use."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from bondlm.data.columns import PROMPT_IDS
from bondlm.data.prompts import load_prompts
from bondlm.data.tokens import check_tokenizer, decode_completions, encode_prompts, length_limits
from bondlm.engines.local.engine import TransformersEngine
from bondlm.models.load import fast_dtype, load_model
from bondlm.rewards import NamedReward
from bondlm.rollout.samples import Samples, draw, score_samples


class Sampler:
    """Answers prompts with a model, by folder or hub name."""

    def __init__(self, model: str, *, dtype: str = "auto", max_rows: int | None = None) -> None:
        """Load the model (an adapter on its base, too) and its tokenizer.

        Raises:
            ConfigError: the model cannot be loaded, or never ends an answer.
        """
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded: Any = load_model(model, dtype=fast_dtype(self.device) if dtype == "auto" else getattr(torch, dtype))
        # An adapter is merged: nobody trains it here, and the merged model decodes faster.
        core = loaded.merge_and_unload() if isinstance(loaded, PeftModel) else loaded
        self.model: Any = core.to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        self.text = check_tokenizer(self.tokenizer, core.generation_config.eos_token_id)
        self.engine = TransformersEngine(
            self._use, eos_ids=self.text.eos_ids, pad_id=self.text.pad_id, max_rows=max_rows
        )

    @contextmanager
    def _use(self, role: str) -> Iterator[Any]:
        yield self.model

    def rows(
        self, source: Any, *, max_prompt_length: int | None = None, max_completion_length: int = 256
    ) -> list[dict[str, Any]]:
        """Read and encode prompts; plain text for a chat model becomes a user message."""
        prompts = load_prompts(source).to_list()
        if self.tokenizer.chat_template is not None:
            for row in prompts:
                if isinstance(row["prompt"], str):
                    row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        limits = length_limits(self.model.config, max_prompt_length, max_completion_length)
        ids = encode_prompts([row["prompt"] for row in prompts], self.tokenizer, **limits)
        return [row | {PROMPT_IDS: prompt_ids} for row, prompt_ids in zip(prompts, ids, strict=True)]

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
        return draw(
            self.engine,
            rows,
            {"policy": num_samples},
            max_new_tokens=max_completion_length,
            seed=seed,
            step=0,
            positions=range(first_position, first_position + len(rows)),
            temperature=temperature,
        )

    def texts(self, completions: list[list[Any]]) -> list[list[str]]:
        """Completions as text."""
        return [decode_completions([c.ids for c in row], self.tokenizer, self.text.eos_ids) for row in completions]

    def score(
        self, rewards: Sequence[NamedReward], rows: Sequence[Mapping[str, Any]], completions: list[list[Any]]
    ) -> Samples:
        """Score completions of encoded rows."""
        return score_samples(rewards, rows, completions, tokenizer=self.tokenizer, eos_ids=self.text.eos_ids)
