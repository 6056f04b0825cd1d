"""One rule for plain prompts in all commands: the model reads the same tokens, whoever asks."""

import json

import pytest
from data.helpers import encode
from tiny import CHATS, PROMPTS, prompt_rows, tiny_tokenizer

from bondlm.cli import main
from bondlm.cli.prompting import rendering_of
from bondlm.data import prompt_encoder
from bondlm.errors import ConfigError
from bondlm.runs.prompting import PROMPTING_FILE, read_prompting
from cli.helpers import write_job

N = 4


@pytest.fixture
def read(monkeypatch):
    """What every command makes of its prompts."""
    seen = []

    def noting(*args, **kwargs):
        ids = encode_prompts(*args, **kwargs)
        seen.append(ids)
        return ids

    encode_prompts = prompt_encoder.encode_prompts
    monkeypatch.setattr(prompt_encoder, "encode_prompts", noting)
    return seen


def commands(folder):
    """`train`, then `eval`, `sample` and `score` of what it made, on the same plain prompts."""
    data, run = str(folder / "plain.jsonl"), str(folder / "run")
    reward, short = f"{folder / 'reward.py'}:letters", ["--max_completion_length", "4"]
    config = write_job(folder, max_steps=1, save_strategy="no", train_dataset=data, eval_dataset=None)
    (folder / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompt_rows(N)))
    asked = ["--model", run, "--dataset", data, *short]
    samples = ["--num_samples", "1", "--num_reference_samples", "2", "--reward_funcs", reward]
    return [
        ["train", "--config", str(config), *short],
        ["eval", *asked, *samples],
        ["sample", *asked, "--output", str(folder / "answers.jsonl")],
        ["score", *asked, "--reward_funcs", reward, "--num_samples", "1", "--output", str(folder / "scored.jsonl")],
    ]


@pytest.mark.parametrize("prompt_format", [None, "plain"])
def test_all_commands_read_a_plain_prompt_alike(tmp_path, read, capsys, prompt_format):
    train, *others = commands(tmp_path)
    assert main([*train, *([] if prompt_format is None else ["--prompt_format", prompt_format])]) == 0
    for command in others:  # the run folder says how
        assert main(command) == 0, capsys.readouterr().err
    expected = encode(CHATS[:N] if prompt_format is None else PROMPTS[:N], tiny_tokenizer())
    assert len(read) == 4
    assert all(ids == expected for ids in read)
    for name in ("answers", "scored"):
        first = json.loads((tmp_path / f"{name}.jsonl").read_text().splitlines()[0])
        assert first["prompt"] == PROMPTS[0]


def test_a_run_folder_says_how_prompts_are_rendered_unless_an_option_does(tmp_path):
    (tmp_path / PROMPTING_FILE).write_text(
        '{"prompt_format": "rendered", "chat_template_kwargs": {"a": 1}, "now": "2026-01-02T03:04:05"}'
    )
    taken = rendering_of({}, run=tmp_path)
    assert (taken.prompt_format, taken.variables, taken.now.day) == ("rendered", {"a": 1}, 2)
    assert rendering_of({}, run=tmp_path, takes_rendered=False).prompt_format == "auto"
    asked = rendering_of({"prompt_format": "plain", "chat_template_kwargs": {}}, run=tmp_path)
    assert (asked.prompt_format, asked.variables) == ("plain", {})


@pytest.mark.parametrize("options", [{"prompt_format": "chatty"}, {"chat_template_kwargs": [1]}])
def test_options_of_another_kind_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        rendering_of(options)


def test_an_evaluation_of_a_model_goes_on_with_the_date_that_it_began_with(tmp_path):
    write_job(tmp_path)
    command = ["eval", "--model", str(tmp_path / "model"), "--reference", str(tmp_path / "model")]
    command += ["--dataset", str(tmp_path / "heldout.jsonl"), "--reward_funcs", f"{tmp_path / 'reward.py'}:letters"]
    command += ["--num_samples", "1", "--num_reference_samples", "2", "--max_completion_length", "4"]
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("{{ strftime_now('%f') }}" + template.read_text())  # microseconds: another one at every call
    for _ in range(2):
        assert main([*command, "--output", str(tmp_path / "out")]) == 0
        noted = read_prompting(tmp_path / "out")
    assert noted["now"].microsecond
