"""How a run's prompts are rendered: what the model reads, what rewards see, and that a second day changes nothing."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from data.helpers import encode, user
from tiny import CHATML, CHATS, prompt_rows, tiny_causal, tiny_tokenizer
from transformers import AutoModelForCausalLM

from bondlm.data.columns import PROMPT_IDS
from bondlm.data.rendering import Rendering
from bondlm.errors import ConfigError, DataError
from bondlm.models.load import load_model
from bondlm.runs.prompting import PROMPTING_FILE, read_prompting
from trainer.helpers import TOKENIZER, lora, low_ids, trainer

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}


def ids(made: Any) -> list[list[int]]:
    return list(made.train_dataset[PROMPT_IDS])


def test_a_chat_model_reads_messages_and_rewards_see_the_text_of_the_data(tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        seen.extend([*prompts, *completions])
        return low_ids(completion_ids)

    made = trainer(tmp_path, reward=reward, max_steps=1, prompt_format="auto")
    assert ids(made) == encode(CHATS[:8], TOKENIZER)
    made.train()
    assert all(isinstance(text, str) for text in seen)
    assert {row["prompt"] for row in prompt_rows(8)} >= set(seen[:4])


class Clock:
    def __init__(self, day: int) -> None:
        self.day = day

    def today(self) -> datetime:
        return datetime(2026, 1, self.day, 12)


def test_a_run_goes_on_the_next_day_with_the_date_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "Today is {{ strftime_now('%d %b %Y') }}. " + CHATML
    clock = Clock(1)
    monkeypatch.setattr("bondlm.training.prompting.datetime", clock)
    how: dict[str, Any] = {"processing_class": tokenizer, "train_dataset": prompt_rows(8, chat=True)}
    first = trainer(tmp_path / "run", tiny_causal(tokenizer), max_steps=1, **how, **SAVING)
    first.train()
    clock.day = 2
    again = trainer(tmp_path / "run", tiny_causal(tokenizer), max_steps=2, **how)
    assert ids(again) == ids(first)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    other = trainer(tmp_path / "other", tiny_causal(tokenizer), **how)
    assert "02 Jan 2026" in tokenizer.decode(ids(other)[0])


def test_the_folder_keeps_the_rendering(tmp_path: Path) -> None:
    trainer(tmp_path, train_dataset=prompt_rows(4))
    noted = read_prompting(tmp_path)
    assert noted is not None
    assert (noted["prompt_format"], noted["chat_template_kwargs"]) == ("plain", {})


def test_a_resume_that_is_refused_leaves_it_as_it_was(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=1, **SAVING).train()
    before = read_prompting(tmp_path)
    with pytest.raises(ConfigError, match="prompt_format"):
        trainer(tmp_path, max_steps=2, prompt_format="chat").train(resume_from_checkpoint=True)
    assert read_prompting(tmp_path) == before


def test_prompts_that_do_not_fit_are_bad_rows(tmp_path: Path) -> None:
    rows = [*prompt_rows(7), {"prompt": "word " * 300}]
    with pytest.raises(DataError, match="row 7"):
        trainer(tmp_path, train_dataset=rows)
    made = trainer(tmp_path, train_dataset=rows, on_bad_row="skip")
    assert len(ids(made)) == 7
    assert "row 7" in made.drops.summary()[0]
    with pytest.raises(DataError, match=r"2 of 9 rows.*max_skipped_frac"):
        trainer(tmp_path, train_dataset=[*rows, {"prompt": ""}], on_bad_row="skip")


def test_a_reward_that_expects_text_is_told_where_the_text_of_a_conversation_is(tmp_path: Path) -> None:
    def shout(completions: list[str]) -> list[float]:
        return [float(text.upper() == text) for text in completions]

    made = trainer(tmp_path, reward=shout, train_dataset=prompt_rows(4, chat=True), max_steps=1, max_skipped_frac=0.0)
    with pytest.raises(Exception, match=r'completion\[0\]\["content"\]'):
        made.train()


@pytest.mark.parametrize("adapter", [True, False])
def test_a_resized_model_is_loaded_again_from_its_run_folder(adapter: bool, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tiny_causal(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<think>", "</think>"])
    model.resize_token_embeddings(len(tokenizer))
    rows = [{"prompt": user("<think> hi")} for _ in range(4)]
    how: dict[str, Any] = {"processing_class": tokenizer, "train_dataset": rows}
    made = trainer(tmp_path / "run", model, max_steps=1, **how, **({"peft_config": lora()} if adapter else {}))
    made.train()
    made.save_model()
    again = load_model(tmp_path / "run", dtype=torch.float32)
    tokens = torch.tensor([[300, 5, 301]])
    with made.roles.use("policy") as policy, torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, policy(tokens).logits)


def test_the_rendering_is_the_same_for_every_set_of_prompts(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML + "{% if brief %}!{% endif %}"
    made = trainer(
        tmp_path,
        tiny_causal(tokenizer),
        processing_class=tokenizer,
        prompt_format="chat",
        chat_template_kwargs={"brief": True},
        eval_dataset=prompt_rows(12)[8:],
    )
    expected = Rendering(variables={"brief": True})
    assert made.eval_dataset[PROMPT_IDS][:] == encode(CHATS[8:12], tokenizer, rendering=expected)  # type: ignore[index,call-overload]
    assert json.loads((tmp_path / PROMPTING_FILE).read_text())["chat_template_kwargs"] == {"brief": True}
