"""Rows T of the fault matrix: text, tokens and data; more of each is in tests/test_text.py and tests/test_data.py."""

import inspect
import json
import logging
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.helpers import write_job
from jinja2.filters import do_int
from test_text import INJECTIONS, encode, user
from test_trainer import TOKENIZER, ends_often, logged, low_ids, same, trainer, weights
from tiny import BOS, CHATML, prompt_rows, tiny_causal, tiny_tokenizer

from bondlm.cli import main
from bondlm.data import chat_templates as templates
from bondlm.data.columns import PROMPT_IDS
from bondlm.data.prompts import load_prompts, read_jsonl
from bondlm.data.tokens import check_tokenizer
from bondlm.errors import BondError, ConfigError, DataError
from bondlm.rollout.truncated import REASON
from bondlm.runs.folder import DROPPED_FILE


def write(path: Path, *lines: Any) -> Path:
    """JSON for objects, bytes as they are."""
    parts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(part + b"\n" for part in parts))
    return path


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
    with pytest.raises(ConfigError, match="missing_eos='worst': objective='reinforce' draws one sample"):
        trainer(tmp_path, objective="reinforce", missing_eos="worst")
    with pytest.raises(ConfigError, match="missing_eos='best': choose one of keep, worst, drop"):
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
    assert "step 1 is skipped: for every prompt a completion did not end" in caplog.text


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
    with pytest.raises(ConfigError, match="could never learn to stop") as caught:
        check_tokenizer(tiny_tokenizer(eos=False), None)
    assert caught.value.exit_code == 2


def test_t4_prompts_that_do_not_fit_are_named_and_not_cut(tmp_path: Path) -> None:
    rows = [*prompt_rows(3), {"prompt": "word " * 300}, {"prompt": "x" * 260}]
    with pytest.raises(DataError, match=r"context of 256 tokens leaves 251") as caught:
        trainer(tmp_path, train_dataset=rows)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()[1:]] == ["row 3", "row 4"]
    with pytest.raises(DataError, match="max_prompt_length is 4"):
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
    assert "1 of 4 prompts are longer than 251 tokens (the longest has 1" in caplog.text
    assert "the first is row 3" in caplog.text
    made.train()
    assert rows[3]["prompt"] in prompts
    made = trainer(tmp_path / "length", max_prompt_length=4, eval_dataset=rows[1:2], **settings)
    assert made.train_dataset[PROMPT_IDS][:] == [ids[-4:] for ids in whole]  # type: ignore[index]
    assert made.eval_dataset[PROMPT_IDS][:] == [whole[1][-4:]]  # type: ignore[index,call-overload]
    with pytest.raises(ConfigError, match="no room for a prompt"):
        trainer(tmp_path, max_completion_length=256, **settings)


def test_t4_what_begins_every_text_stays_and_conversations_are_not_cut(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    (whole,) = encode([prompt_rows(1)[0]["prompt"]], tokenizer)
    assert whole[0] == tokenizer.bos_token_id
    cut = encode([prompt_rows(1)[0]["prompt"]], tokenizer, max_prompt_length=5, truncate_prompt="left")
    assert cut == [[tokenizer.bos_token_id, *whole[-4:]]]
    ends = encode(["word " * 9], tiny_tokenizer(adds_eos=True), max_prompt_length=5, truncate_prompt="left")
    assert ends == [TOKENIZER.encode("word " * 9)[-5:]]  # a decoder-only model gets no end behind its prompt
    seq2seq: dict[str, Any] = {"is_encoder_decoder": True, "max_prompt_length": 5, "truncate_prompt": "left"}
    assert encode(["word " * 9], tiny_tokenizer(adds_eos=True), **seq2seq)[0][-1] == 2  # an encoder does
    with pytest.raises(ConfigError, match="the prompts are conversations") as caught:
        trainer(tmp_path, train_dataset=prompt_rows(3, chat=True), truncate_prompt="left")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("hostile", INJECTIONS.values(), ids=INJECTIONS.keys())
def test_t5_control_tokens_in_user_text_are_refused(hostile: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"special token .* in the text of row 1") as caught:
        trainer(tmp_path, train_dataset=[*prompt_rows(1, chat=True), {"prompt": user(hostile)}])
    assert caught.value.exit_code == 3


TEMPLATES = {
    "none": (None, "has no chat template", 2),
    "not Jinja": ("{% for %}", "not valid Jinja", 2),
    "attributes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "row 0: SecurityError", 3),
    "imports": ("{{ cycler.__init__.__globals__.os.system('touch marker') }}", "row 0: SecurityError", 3),
    "a long loop": ("{% for i in range(999999999) %}{{ i }}{% endfor %}", "row 0: OverflowError", 3),
    "raises": ("{{ raise_exception('no system role') }}", "row 0: TemplateError: no system role", 3),
    "a missing key": ("{{ messages[9].content }}", "row 0: UndefinedError", 3),
    "writes nothing": ("", "row 0: no tokens", 3),
}


@pytest.mark.parametrize(("template", "message", "code"), TEMPLATES.values(), ids=TEMPLATES.keys())
def test_t6_bad_and_hostile_templates(
    template: str | None, message: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template  # type: ignore[assignment]
    with pytest.raises(BondError, match=message) as caught:
        encode([user("hello")], tokenizer)
    assert caught.value.exit_code == code
    assert list(tmp_path.iterdir()) == []


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"
BOMBS = {
    "a loop that writes nothing": (LOOP.replace("BODY", ""), "took more than 0.3 s of CPU time, for row 0"),
    "generators in filters": (
        LOOP.replace("BODY", "{{ range(9999)|map('string')|join|length }}"),
        "took more",
    ),
    "much text": (
        "{% for i in range(2000) %}{{ 'x' * 1000 }}{% endfor %}",
        "wrote 2000000 characters around messages of 5",
    ),
    "a text beyond memory": ("{{ 'x' * 10 ** 17 }}", "asked for more memory than there is"),
}


@pytest.mark.parametrize(("template", "message"), BOMBS.values(), ids=BOMBS.keys())
@pytest.mark.parametrize("in_thread", [False, True])
def test_t6_a_template_that_does_not_end_is_stopped(
    template: str, message: str, in_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (templates.MAX_ADDED, templates.MAX_SECONDS) == (2**20, 5.0)
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.3)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    trace = sys.gettrace()

    def bomb() -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            encode([user("hello")], tokenizer)
        assert caught.value.exit_code == 2

    if in_thread:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(bomb).result()
    else:
        bomb()
    assert sys.gettrace() is trace


def test_t6_a_filter_does_not_swallow_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is up inside a `try` of Jinja's own, which catches what numbers raise."""
    lines, first = inspect.getsourcelines(do_int)
    place = first + next(i for i, line in enumerate(lines) if "return int(value, base)" in line)

    def clock() -> float:
        frame = sys._getframe(1).f_locals.get("frame")
        return float("inf") if frame and frame.f_code is do_int.__code__ and frame.f_lineno == place else 0.0

    monkeypatch.setattr(templates, "LINES_A_LOOK", 1)
    monkeypatch.setattr(templates.time, "thread_time", clock)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ '12'|int }}"
    with pytest.raises(ConfigError, match="took more than 5 s"):
        encode([user("hello")], tokenizer)


def test_t6_ends_the_command_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_job(tmp_path)
    (tmp_path / "model" / "chat_template.jinja").write_text("{% for i in range(2000) %}{{ 'x' * 1000 }}{% endfor %}")
    assert main(["train", "--config", str(config)]) == 2
    assert "chat template wrote 2000000 characters" in capsys.readouterr().err


def test_t6_long_messages_are_not_the_templates_fault() -> None:
    """1.2 MB of them pass, and are as long as they were."""
    (ids,) = encode([user("word " * 240_000)], TOKENIZER)
    assert TOKENIZER.decode(ids).count("word ") == 240_000


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


ODD = [
    "a\x00b",
    "e\u0301\u200d\u200f",
    "\u202eabc\u202c",
    "\U0001f469\u200d\U0001f4bb",
    "word " * 200_000,
    "end\r",
    "a\u2028b",
]


def test_t8_odd_text_survives_and_half_a_character_does_not(tmp_path: Path) -> None:
    rows = [{"prompt": text} for text in ODD]
    path = write(tmp_path / "odd.jsonl", *rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_jsonl(path, prompts=True) == rows
    short = [text[:10_000] for text in ODD]
    for text, ids in zip(short, encode(short, TOKENIZER), strict=True):
        assert TOKENIZER.decode(ids) == text
    bad = write(tmp_path / "bad.jsonl", {"prompt": "fine"}, b'{"prompt": "\\ud800"}', b'\xef\xbb\xbf{"prompt": "late"}')
    with pytest.raises(DataError) as caught:
        read_jsonl(bad, prompts=True)
    first, second = str(caught.value).splitlines()
    assert first == f"{bad}:2: lone surrogate: half of a character, which UTF-8 cannot hold"
    assert second.startswith(f"{bad}:3: invalid JSON")


BAD_LINES = {
    "cut": b'{"prompt": "ab',
    "not an object": b'["prompt"]',
    "no prompt": b'{"text": "a"}',
    "a number": b'{"prompt": 3}',
    "empty": b'{"prompt": " "}',
    "twice": b'{"prompt": "x", "id": 1}',
    "NaN": b'{"prompt": "x", "score": NaN}',
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_t9_a_bad_row_is_refused_with_its_place_or_skipped(line: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {"prompt": "one", "id": 1}, line, {"prompt": "three", "id": 3})
    with pytest.raises(DataError, match=r"data\.jsonl:2: ") as caught:
        load_prompts(path)
    assert caught.value.exit_code == 3
    skipped: list[str] = []
    assert load_prompts(path, skipped=skipped)["prompt"][:] == ["one", "three"]
    assert skipped == [str(caught.value)]


def test_t9_skipped_rows_are_counted_and_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_job(tmp_path, max_steps=1, save_steps=1, eval_dataset=None, max_completion_length=4)
    data = tmp_path / "train.jsonl"
    data.write_text(data.read_text() + '{"prompt": 5}\n{"prompt": ""}\n')
    assert main(["train", "--config", str(config)]) == 3
    assert main(["train", "--config", str(config), "--on_bad_row", "skip"]) == 3
    said = capsys.readouterr().err
    assert "2 of 18 rows are bad, more than max_skipped_frac=0.01 allows" in said
    assert "train.jsonl:18: empty prompt" in said
    assert main(["train", "--config", str(config), "--on_bad_row", "skip", "--max_skipped_frac", "0.2"]) == 0
    assert "left out: 2 bad rows of train_dataset, first " in " ".join(capsys.readouterr().out.split())


def test_t9_bad_rows_of_a_list_are_skipped_too(tmp_path: Path) -> None:
    rows = [*prompt_rows(4), {"prompt": user("a chat among texts")}]
    with pytest.raises(DataError, match="row 4"):
        trainer(tmp_path, train_dataset=rows)
    made = trainer(tmp_path, train_dataset=rows, on_bad_row="skip")
    assert len(made.train_dataset) == 4  # type: ignore[arg-type]
    with pytest.raises(DataError, match="1 of 5 rows are bad"):
        trainer(tmp_path, train_dataset=rows, on_bad_row="skip", max_skipped_frac=0.0)
    with pytest.raises(DataError, match="has no rows"):
        load_prompts([{"prompt": ""}], skipped=[])


def test_t10_an_empty_file_fewer_prompts_than_a_batch_and_no_steps(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows") as caught:
        trainer(tmp_path, train_dataset=str(write(tmp_path / "empty.jsonl")))
    assert caught.value.exit_code == 3
    made = trainer(tmp_path / "few", rows=3, per_device_train_batch_size=8, max_steps=2)
    made.train()  # an epoch is one step of 3 prompts
    assert made.state.global_step == 2
    none = trainer(tmp_path / "none", max_steps=-1, num_train_epochs=0)
    before = weights(none.roles.model)
    none.train()
    assert none.state.global_step == 0
    assert same(weights(none.roles.model), before)


def test_t11_data_that_changed_are_refused_on_resume(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    for rows in (prompt_rows(9), [*prompt_rows(7), {"prompt": "another"}]):
        again = trainer(tmp_path, train_dataset=rows, max_steps=2)
        with pytest.raises(DataError, match="train_dataset has changed since checkpoint-1") as caught:
            again.train(resume_from_checkpoint=True)
        assert caught.value.exit_code == 3
    trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)


def test_t12_held_out_prompts_that_are_trained_on_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="bondlm.data.prompts"):
        trainer(tmp_path, eval_dataset=prompt_rows(12)[8:])
        assert caplog.text == ""
        trainer(tmp_path, eval_dataset=prompt_rows(12)[6:])
    assert "2 of 6 evaluation prompts are training prompts too" in caplog.text


@pytest.mark.parametrize("command", ["train", "check"])
def test_t12_strict_makes_them_an_error(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_job(tmp_path, max_steps=1, save_steps=1, max_completion_length=4)  # its held-out prompts are trained
    assert main([command, "--config", str(config), "--strict", "true"]) == 3
    first, *rows = capsys.readouterr().err.rsplit("bondlm: error:", 1)[1].splitlines()
    assert "6 of 6 evaluation prompts are training prompts too, and strict=True forbids it" in first
    assert rows[1].startswith("row 1 of eval_dataset: ")
    assert prompt_rows(2)[1]["prompt"] in rows[1]
    held_out = tmp_path / "heldout.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in prompt_rows(20, chat=True)[16:]))
    assert main(["check", "--config", str(config), "--strict", "true"]) == 0


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
