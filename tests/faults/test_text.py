"""Rows T1 to T5, T7 and T13 of the fault matrix: text and tokens; more of each is in tests/data."""

import json
import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from data.helpers import INJECTIONS, encode, user
from tiny import BOS, CHATML, END, PAD, START, prompt_rows, tiny_causal, tiny_tokenizer
from tokenizers import processors
from trainer.helpers import TOKENIZER, ends_often, logged, low_ids, same, trainer, weights

from bondlm.data.columns import PROMPT_IDS
from bondlm.data.tokens import check_tokenizer
from bondlm.errors import ConfigError, DataError
from bondlm.rollout.truncated import REASON
from bondlm.runs.folder import DROPPED_FILE


def test_t1_an_empty_completion_is_kept_and_learned_from(tmp_path: Path) -> None:
    """Its one token is the end of sequence; its reward is that of "", and it is counted."""
    seen: list[str] = []

    def reward(completions: list[str]) -> list[float]:
        seen.extend(completions)
        return [float(i) for i in range(len(completions))]

    model = tiny_causal(TOKENIZER)
    model.generation_config.eos_token_id = list(range(300))
    made = trainer(tmp_path, model, reward=reward, max_steps=1)
    before = weights(made.roles.model)
    made.train()
    assert set(seen) == {""}
    row = logged(tmp_path)[0]
    assert row["completions/min_length"] == row["completions/max_length"] == row["completions/frac_empty"] == 1
    assert row["num_tokens/learned"] == 2 * 4  # of 4 prompts the policy's sample and the better of the anchor's
    assert not same(weights(made.roles.model), before)
    cut = trainer(tmp_path / "cut", tiny_causal(TOKENIZER), max_steps=1, max_completion_length=1)
    cut.train()
    row = logged(tmp_path / "cut")[0]  # one token, too, but no end
    assert (row["completions/frac_empty"], row["completions/clipped_ratio"]) == (0, 1)


def long_ids(completion_ids: list[list[int]]) -> list[float]:
    """Mostly the length, so that those without end are the best."""
    return [len(ids) + low / 10 for ids, low in zip(completion_ids, low_ids(completion_ids), strict=True)]


def test_t2_a_completion_without_end_is_kept_with_its_reward_and_flagged(tmp_path: Path) -> None:
    seen: list[tuple[int, bool]] = []

    def reward(completion_ids: list[list[int]], truncated: list[bool]) -> list[float]:
        seen.extend((len(ids), cut) for ids, cut in zip(completion_ids, truncated, strict=True))
        return long_ids(completion_ids)

    made, other = (trainer(tmp_path / name, reward=f, max_steps=1) for name, f in (("a", reward), ("b", long_ids)))
    made.train()
    other.train()
    assert same(weights(made.roles.model), weights(other.roles.model))
    assert {length for length, cut in seen if cut} == {5}  # max_completion_length
    assert 0 < logged(tmp_path / "a")[0]["completions/clipped_ratio"] < 1


OBJECTIVES: dict[str, dict[str, Any]] = {
    "jbond": {},
    "bond": {"objective": "bond", "n": 4, "num_anchor_samples": 3},
    "sft": {"objective": "best_of_n_sft", "n": 4},
    "rloo": {"objective": "rloo", "num_samples": 3},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_t2_worst_ranks_it_below_all_that_end(name: str, tmp_path: Path) -> None:
    """The same steps as with a reward that does it by itself; what is logged stays raw. Rloo looks at values."""

    def ends(completion_ids: list[list[int]], truncated: list[bool]) -> list[float]:
        return [r - 1e6 * cut for r, cut in zip(long_ids(completion_ids), truncated, strict=True)]

    results = {}
    for case, reward, missing in (("keep", long_ids, "keep"), ("worst", long_ids, "worst"), ("by hand", ends, "keep")):
        made = trainer(tmp_path / case, reward=reward, missing_eos=missing, **OBJECTIVES[name])
        made.train()
        results[case] = weights(made.roles.model)
    assert not same(results["worst"], results["keep"])
    assert same(results["worst"], results["by hand"]) == (name != "rloo")
    first = {case: logged(tmp_path / case)[0] for case in ("keep", "worst", "by hand")}
    for metric in first["keep"].keys() & {"reward", "reward_std", "anchor/reward", "completions/clipped_ratio"}:
        assert first["worst"][metric] == first["keep"][metric]
        assert (first["by hand"][metric] == first["keep"][metric]) == (metric == "completions/clipped_ratio")


def test_t2_worst_needs_others_to_rank_it_below(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing_eos='worst': objective='reinforce'"):
        trainer(tmp_path, objective="reinforce", missing_eos="worst")
    with pytest.raises(ConfigError, match=r"missing_eos='best': .*keep, worst, drop"):
        trainer(tmp_path, missing_eos="best")


def test_t2_drop_leaves_the_prompt_out_whole_and_counts_it(tmp_path: Path) -> None:
    """The same steps as with a reward that fails for it; but nothing failed, so no budget ends the run."""

    def fails(completion_ids: list[list[int]], truncated: list[bool]) -> list[float | None]:
        return [None if cut else r for r, cut in zip(long_ids(completion_ids), truncated, strict=True)]

    model = tiny_causal(TOKENIZER)
    model.generation_config.eos_token_id = list(range(2, 300, 2))  # half of the tokens: most completions end
    results = []
    for case, reward, settings in (
        ("drop", long_ids, {"missing_eos": "drop"}),
        ("by hand", fails, {"max_skipped_frac": 1.0}),
    ):
        made = trainer(tmp_path / case, deepcopy(model), reward=reward, optim="sgd", **settings)
        made.train()
        results.append((weights(made.roles.model), logged(tmp_path / case)[:2]))
    (one, rows), (other, others) = results
    assert not same(one, weights(model))
    for name, tensor in one.items():  # rounding: what is learned with weight 0 is padded otherwise
        torch.testing.assert_close(tensor, other[name], atol=1e-6, rtol=0)
    assert [row["bond/frac_dropped"] for row in rows] == [row["bond/frac_dropped"] for row in others]
    num_dropped = round(4 * sum(row["bond/frac_dropped"] for row in rows))
    assert 0 < num_dropped < 8
    listed = [json.loads(line) for line in (tmp_path / "drop" / DROPPED_FILE).read_bytes().splitlines()]
    assert {row["reason"] for row in listed} == {REASON}
    assert len(listed) == num_dropped


def test_t2_what_is_dropped_is_counted_over_the_whole_run(tmp_path: Path) -> None:
    """Resumed after step 1: the file says how many there were; no number of them is too many."""
    made = trainer(tmp_path, max_steps=3, missing_eos="drop", max_skipped_frac=0.0, save_strategy="steps", save_steps=1)
    made.train()
    assert 4 < made.drops.left_out < 12
    assert made.drops.summary() == [
        f"dropped: {made.drops.left_out} of 12 prompts, because {REASON} ({tmp_path / DROPPED_FILE})"
    ]
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    again = trainer(tmp_path, max_steps=3, missing_eos="drop", max_skipped_frac=0.0)
    again.train(resume_from_checkpoint=True)
    assert again.drops.left_out == made.drops.left_out


def test_t2_a_step_of_which_nothing_is_left_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(tmp_path, tiny_causal(TOKENIZER), max_steps=1, max_completion_length=1, missing_eos="drop")
    before = weights(made.roles.model)
    made.train()
    assert same(weights(made.roles.model), before)
    assert "step 1 is skipped" in caplog.text


def test_t2_an_evaluation_reports_the_rewards_as_they_are(tmp_path: Path) -> None:
    reports = [
        trainer(tmp_path / missing, reward=long_ids, missing_eos=missing, eval_dataset=prompt_rows(12)[8:]).evaluate()
        for missing in ("keep", "worst", "drop")
    ]
    without = [{k: v for k, v in report.items() if k != "eval_runtime"} for report in reports]
    assert without[0] == without[1] == without[2]


@pytest.mark.parametrize("pad", [None, "eos"])
def test_t3_padding_is_never_known_by_its_id(pad: Any, tmp_path: Path) -> None:
    results = []
    for tokenizer in (TOKENIZER, tiny_tokenizer(pad=pad)):
        folder = tmp_path / str(len(results))
        made = trainer(folder, ends_often(tiny_causal(tokenizer)), processing_class=tokenizer, max_steps=1)
        made.train()
        results.append(weights(made.roles.model))
    assert same(*results)


def test_t3_a_model_that_cannot_stop_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.eos_token") as caught:
        check_tokenizer(tiny_tokenizer(eos=False), None)
    assert caught.value.exit_code == 2


def test_t4_prompts_that_do_not_fit_are_named_and_not_cut(tmp_path: Path) -> None:
    rows = [*prompt_rows(3), {"prompt": "word " * 300}, {"prompt": "x" * 260}]
    with pytest.raises(DataError, match=r"256 tokens.*\b251\b") as caught:
        trainer(tmp_path, train_dataset=rows)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()[1:]] == ["row 3", "row 4"]
    with pytest.raises(DataError, match=r"max_prompt_length\D+4\b"):
        trainer(tmp_path, train_dataset=prompt_rows(3), max_prompt_length=4)


def test_t4_truncation_is_opt_in_from_the_left_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is left is the end of the same ids, and it trains; the reward sees the whole text."""
    rows = [*prompt_rows(3), {"prompt": "word " * 300}]
    whole = [TOKENIZER.encode(row["prompt"]) for row in rows]
    prompts: set[str] = set()

    def reward(prompts_seen: set[str] = prompts, **columns: Any) -> list[float]:
        prompts_seen.update(columns["prompts"])
        return low_ids(columns["completion_ids"])

    settings: dict[str, Any] = {"train_dataset": rows, "max_steps": 1, "truncate_prompt": "left"}
    made = trainer(tmp_path / "context", reward=reward, **settings)
    assert made.train_dataset[PROMPT_IDS][:] == [*whole[:3], whole[3][-251:]]  # type: ignore[index]
    assert re.search(r"1 of 4 prompts.*\b251 tokens.*row 3", caplog.text)
    made.train()
    assert rows[3]["prompt"] in prompts
    made = trainer(tmp_path / "length", max_prompt_length=4, eval_dataset=rows[1:2], **settings)
    assert made.train_dataset[PROMPT_IDS][:] == [ids[-4:] for ids in whole]  # type: ignore[index]
    assert made.eval_dataset[PROMPT_IDS][:] == [whole[1][-4:]]  # type: ignore[index,call-overload]
    with pytest.raises(ConfigError, match="max_completion_length = 256"):
        trainer(tmp_path, max_completion_length=256, **settings)


def test_t4_what_begins_every_text_stays_and_conversations_are_not_cut(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    (whole,) = encode([prompt_rows(1)[0]["prompt"]], tokenizer)
    assert whole[0] == tokenizer.bos_token_id
    cut = encode([prompt_rows(1)[0]["prompt"]], tokenizer, max_prompt_length=5, truncate_prompt="left")
    assert cut == [[tokenizer.bos_token_id, *whole[-4:]]]
    language = tiny_tokenizer()  # as NLLB writes the language to translate from, and GLM `[gMASK]<sop>`
    language.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{PAD} {START} $A {END}", pair=None, special_tokens=[(PAD, 0), (START, 1), (END, 2)]
    )
    (cut, short) = encode(["word " * 9, "Hi"], language, max_prompt_length=6, truncate_prompt="left")
    assert cut == [0, 1, *TOKENIZER.encode("word " * 9)[-4:]]
    assert short == [0, 1, *TOKENIZER.encode("Hi")]
    ends = encode(["word " * 9], tiny_tokenizer(adds_eos=True), max_prompt_length=5, truncate_prompt="left")
    assert ends == [TOKENIZER.encode("word " * 9)[-5:]]  # a decoder-only model gets no end behind its prompt
    seq2seq: dict[str, Any] = {"is_encoder_decoder": True, "max_prompt_length": 5, "truncate_prompt": "left"}
    assert encode(["word " * 9], tiny_tokenizer(adds_eos=True), **seq2seq)[0][-1] == 2  # an encoder does
    with pytest.raises(ConfigError, match="truncate_prompt='left'") as caught:
        trainer(tmp_path, train_dataset=prompt_rows(3, chat=True), truncate_prompt="left")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("hostile", INJECTIONS.values(), ids=INJECTIONS.keys())
def test_t5_control_tokens_in_user_text_are_refused(hostile: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1: special token ") as caught:
        trainer(tmp_path, train_dataset=[*prompt_rows(1, chat=True), {"prompt": user(hostile)}])
    assert caught.value.exit_code == 3


def test_t7_two_begin_of_sequence_tokens_become_one(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    tokenizer.chat_template = BOS + CHATML
    bos = tokenizer.bos_token_id
    made = trainer(
        tmp_path, tiny_causal(tokenizer), processing_class=tokenizer, train_dataset=prompt_rows(4, chat=True)
    )
    for ids in made.train_dataset[PROMPT_IDS]:  # type: ignore[index]
        assert ids[0] == bos
        assert ids.count(bos) == 1


def test_t13_the_reward_sees_text_and_the_trainer_the_sampled_ids(tmp_path: Path) -> None:
    """Sampled ids are no tokenizer's: what they decode to has other ids. They are learned as they were drawn."""
    texts: list[str] = []

    def reward(completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        texts.extend(completions)
        return low_ids(completion_ids)

    made = trainer(tmp_path, reward=reward, max_steps=1)
    drawn: set[tuple[int, ...]] = set()
    learned: list[tuple[int, ...]] = []
    generate, compute_loss = made.engine.generate, made.compute_loss

    def noting(*args: Any, **kwargs: Any) -> Any:
        completions = generate(*args, **kwargs)
        drawn.update(tuple(c.ids) for row in completions for c in row)
        return completions

    def watching(model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        ids, mask = inputs["completion_ids"].flatten(0, -2), inputs["completion_mask"].flatten(0, -2).bool()
        learned.extend(tuple(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True))
        return compute_loss(model, inputs, *args, **kwargs)

    made.engine.generate = noting  # type: ignore[method-assign,assignment]
    made.compute_loss = watching  # type: ignore[method-assign]
    made.train()
    assert len(learned) == 2 * 4
    assert set(learned) <= drawn
    again = [tuple(TOKENIZER.encode(TOKENIZER.decode(ids))) for ids in learned]
    assert any(one != other for one, other in zip(learned, again, strict=True))
    assert set(texts) == {TOKENIZER.decode([i for i in ids if i % 7 != 2 or i < 2]) for ids in drawn}
