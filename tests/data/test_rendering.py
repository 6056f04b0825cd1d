"""What becomes of a prompt: text and messages, what rows say beside them, and where an answer ends."""

import json
import logging
import re
from datetime import datetime
from typing import Any

import pytest
from tiny import BOS, CHATML, CHATS, END, PROMPTS, START, tiny_causal, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bondlm.data.columns import PROMPT_IDS
from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.data.rendering import Rendering
from bondlm.errors import ConfigError, DataError
from data.helpers import encode, user

TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}
WITH_VARIABLES = (
    "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML + "{% if enable_thinking is defined and not "
    "enable_thinking %}no thoughts{% endif %}"
)


def encoder(tokenizer: Any = None, **rendering: Any) -> PromptEncoder:
    tokenizer = tokenizer or tiny_tokenizer()
    return PromptEncoder.of_model(
        tiny_causal(tokenizer), tokenizer, rendering=Rendering(**rendering), max_completion_length=8
    )


def text(made: PromptEncoder, **row: Any) -> str:
    """What the model reads of a row."""
    (ids,) = made.encoded([row])[PROMPT_IDS][:]
    return str(made.tokenizer.decode(ids))


@pytest.mark.parametrize("prompt_format", ["auto", "chat"])
def test_a_chat_model_gets_text_as_one_message_of_the_user(prompt_format: str) -> None:
    made = encoder(prompt_format=prompt_format)
    assert made.encode(PROMPTS) == encode(CHATS, made.tokenizer) == made.encode(CHATS)
    assert made.encoded([{"prompt": "Hi"}])["prompt"][:] == ["Hi"]  # rewards see what the data hold


def test_plain_text_stays_so_where_it_is_asked_for_or_there_is_no_template() -> None:
    plain = [tiny_tokenizer().encode(prompt) for prompt in PROMPTS]
    assert encoder(prompt_format="plain").encode(PROMPTS) == plain
    assert encoder(tiny_tokenizer(chat=False)).encode(PROMPTS) == plain


def test_what_the_rule_does_is_said_once_and_only_where_it_decides(caplog: pytest.LogCaptureFixture) -> None:
    made = encoder()
    for limits in ({}, {"max_completion_length": 9}):
        made.limited_to(**limits).encode(PROMPTS)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "prompt_format='auto'" in caplog.text
    caplog.clear()
    for quiet in (encoder(prompt_format="chat"), encoder(prompt_format="plain"), encoder(tiny_tokenizer(chat=False))):
        quiet.encode(PROMPTS)
    encoder().encode(CHATS)
    assert caplog.text == ""


REFUSED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "messages as plain text": ({"prompt_format": "plain"}, CHATS, "prompt_format='plain'"),
    "messages as rendered text": ({"prompt_format": "rendered"}, CHATS, "prompt_format='rendered'"),
    "ids without a word": ({}, [[5, 6]], "prompt_format='auto'.*'rendered'"),
    "a variable that nothing looks at": ({"variables": {"enable_thinkin": False}}, CHATS, "'enable_thinkin'"),
    "a variable of bondlm's own": ({"variables": {"add_generation_prompt": False}}, CHATS, "'add_generation_prompt'"),
    "variables without a template": (
        {"variables": {"x": 1}, "prompt_format": "plain"},
        PROMPTS,
        "chat_template_kwargs.*plain",
    ),
}


@pytest.mark.parametrize(("rendering", "prompts", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_contradicts_or_does_nothing_is_refused(rendering: dict[str, Any], prompts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder(**rendering).encode(prompts)


def test_a_chat_needs_a_template_and_cannot_be_cut() -> None:
    with pytest.raises(ConfigError, match="prompt_format"):
        encoder(tiny_tokenizer(chat=False), prompt_format="chat").encode(PROMPTS)
    with pytest.raises(ConfigError, match=r"truncate_prompt='left'.*prompt_format='plain'"):
        encoder().limited_to(truncate_prompt="left").encode(PROMPTS)


def test_the_template_gets_the_variables_of_the_run_and_of_the_row() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = WITH_VARIABLES
    whole = f"{START}user\nHi{END}\n{START}assistant\n"
    assert text(encoder(tokenizer), prompt="Hi") == whole
    assert text(encoder(tokenizer, variables={"enable_thinking": False}), prompt="Hi") == whole + "no thoughts"
    made = encoder(tokenizer, variables={"enable_thinking": True})
    for value in ({"enable_thinking": False}, json.dumps({"enable_thinking": False})):
        assert text(made, prompt="Hi", chat_template_kwargs=value) == whole + "no thoughts"
    assert text(made, prompt="Hi", chat_template_kwargs=None) == whole
    with pytest.raises(ConfigError, match=r"row 1: chat_template_kwargs.*'other'"):
        made.encoded([{"prompt": "a"}, {"prompt": "b", "chat_template_kwargs": {"other": 1}}])


def test_the_template_gets_the_tools_of_the_row() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = WITH_VARIABLES
    made = encoder(tokenizer)
    # Columns of `datasets` have all keys in all rows: those that are None are none.
    other = {"type": "function", "function": {"name": "sun", "parameters": {"type": "object", "required": ["a"]}}}
    rows = [{"prompt": "Hi", "tools": [TOOL]}, {"prompt": "Hi", "tools": [other]}, {"prompt": "Hi", "tools": []}]
    first, second, third = (tokenizer.decode(ids) for ids in made.encoded(rows)[PROMPT_IDS][:])
    begun = f"{START}user\nHi"
    assert json.loads(first.partition(begun)[0]) == [TOOL]
    assert json.loads(second.partition(begun)[0]) == [other]
    assert third.startswith(begun)
    assert text(made, prompt="Hi", tools=json.dumps([TOOL])) == first
    optional = [{"name": "sun", "parameters": {"properties": {"a": {"type": "string", "default": None}}}}]
    assert json.loads(text(made, prompt="Hi", tools=json.dumps(optional)).partition(begun)[0]) == optional
    with pytest.raises(DataError, match="row 0: `tools`"):
        made.encoded([{"prompt": "Hi", "tools": "[1"}])
    with pytest.raises(ConfigError, match="row 0: `tools`"):
        encoder().encoded([{"prompt": "Hi", "tools": [TOOL]}])  # ChatML does not know them
    with pytest.raises(DataError, match=rf"row 0: .*{END[2:8]}"):
        made.encoded([{"prompt": "Hi", "tools": [{"name": END}]}])


def test_a_last_message_of_the_assistant_is_continued(caplog: pytest.LogCaptureFixture) -> None:
    chat = [*user("Hi"), {"role": "assistant", "content": "Well,"}]
    assert text(encoder(), prompt=chat) == f"{START}user\nHi{END}\n{START}assistant\nWell,"
    assert "continued" in caplog.text


def test_prompts_that_a_template_has_rendered_are_taken_as_they_are() -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    rendered = f"{BOS}{START}user\nHi{END}\n{START}assistant\n"
    ids = [300, *tokenizer(rendered.removeprefix(BOS), add_special_tokens=False)["input_ids"]]
    made = encoder(tokenizer, prompt_format="rendered")
    assert made.encode([rendered]) == [ids]
    assert made.encode([rendered.removeprefix(BOS)]) == [ids[1:]]  # nothing is added
    assert made.encode([ids]) == [ids]
    as_text = made.encoded([{"prompt": ids}])
    assert (as_text["prompt"][:], as_text[PROMPT_IDS][:]) == ([rendered], [ids])  # what rewards see
    with pytest.raises(DataError, match=r"row 0: id 301"):
        made.encode([[5, 301]])


def test_a_template_is_told_the_time_of_the_run() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% set today = strftime_now('%d %B %Y') %}{% macro day() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}"
        "{{ today }}, {{ day() }}, {{ strftime_now is defined }}: " + CHATML
    )
    made = encoder(tokenizer, now=datetime(2024, 3, 5, 7, 8, 9))
    assert text(made, prompt="Hi").startswith(f"05 March 2024, 2024-03-05, True: {START}user")
    assert text(encoder(tokenizer), prompt="Hi").startswith(datetime.now().strftime("%d %B %Y"))


def test_standard_messages_of_other_libraries_are_accepted() -> None:
    tokenizer = tiny_tokenizer()
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    call = [{"type": "function", "function": {"name": "rain", "arguments": {"place": "here"}}}]
    chat = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "wet"},
    ]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.tool_calls %}"
        "{{ m.tool_calls[0].function.arguments | tojson }}{% endif %}|{% endfor %}"
    )
    rows = encoder(tokenizer).encoded([{"prompt": chat}])
    assert (
        tokenizer.decode(rows[PROMPT_IDS][0]) == 'system:Be brief.|user:Hi there|assistant:{"place": "here"}|tool:wet|'
    )
    assert rows["prompt"][0][1]["content"] == "Hi there"  # rewards and reports read text
    tokenizer.chat_template += "{# developer #}"
    assert text(encoder(tokenizer), prompt=chat).startswith("developer:")


ENDS = {  # what a template writes behind an answer, and which token ends it; the model's end tokens are 2 and 298
    "ChatML": ("{{ c }}<|im_end|>\n", 2, 2),
    "Llama 3 and Gemma: of two ends not the first": ("{{ c }}<|eot|>\n", 298, 298),
    "a base model: no end of its own": ("{{ c }}<|im_start|>", 1, 1),
    "nothing, and the next turn ends it": ("{% if m.role == 'user' %}<|eot|>{% endif %}{{ c }}", 298, 298),
    "nothing at all": ("{{ c }}\n", None, 2),
}


def test_an_answer_has_one_end(caplog: pytest.LogCaptureFixture) -> None:
    """As many data sets end their answers with the end token, or with a rendered end of turn."""
    made = encoder()
    (plain,) = made.encode_answers(["yes"], [user("Hi")])
    assert "second" not in caplog.text
    for written in (END, f"{END}\n", END + END):
        assert made.encode_answers([f"yes{written}"], ["Hi"]) == [plain]
    assert caplog.text.count("second") == 1
    with pytest.raises(DataError, match=rf"line 2: '{re.escape(END)}' inside its answer"):
        made.encode_answers(["yes", f"yes{END}no"], ["Hi"] * 2, ["line 1", "line 2"].__getitem__)


@pytest.mark.parametrize(("template", "end", "learned"), ENDS.values(), ids=ENDS.keys())
def test_an_answer_ends_with_what_the_template_writes(
    template: str, end: int | None, learned: int, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_causal(tokenizer)
    names = {298: tokenizer.convert_ids_to_tokens(298)}
    model.generation_config.eos_token_id = [2, 298]
    tokenizer.add_special_tokens({"additional_special_tokens": [names[298]]})
    tokenizer.chat_template = (
        "{% for m in messages %}{% set c = m.content %}" + template.replace("<|eot|>", names[298]) + "{% endfor %}"
    )
    made = PromptEncoder.of_model(model, tokenizer, max_completion_length=8)
    (answer,) = made.encode_answers(["yes"], [user("Hi")])
    assert answer == [*tokenizer("yes", add_special_tokens=False)["input_ids"], learned]
    made.encode([user("Hi")])
    told = end is not None and end not in (2, 298)
    assert ("(id 1)" in caplog.text and "(id 2)" in caplog.text and "(id 298)" in caplog.text) == told
    plain = made.limited_to(rendering=Rendering(prompt_format="plain"))
    assert plain.end_id("Hi") == 2  # the model's own


def test_an_end_is_dropped_only_where_the_tokenizer_adds_one() -> None:
    """Here every unknown word is the end-of-sequence token, "a" among them."""
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "[BOS]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[UNK]")  # type: ignore[no-untyped-call]
    how: dict[str, Any] = {"allow_special_tokens_in_text": True}
    assert encode(["hello stranger", "hello"], tokenizer, **how) == [[1, 0], [1]]
    backend.post_processor = processors.TemplateProcessing("$A [UNK]", None, [("[UNK]", 0)])
    adds = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[UNK]")  # type: ignore[no-untyped-call]
    assert encode(["hello stranger", "hello"], adds, **how) == [[1, 0], [1]]
    backend.post_processor = processors.TemplateProcessing("[UNK] $A", None, [("[UNK]", 0)])  # OPT: it begins, too
    begins = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[UNK]")  # type: ignore[no-untyped-call]
    assert encode(["stranger", "hello"], begins, **how) == [[0, 0], [0, 1]]


def test_rows_that_cannot_be_used_are_left_out_with_their_reasons() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|odd|>", special=True)])
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    rows = [
        {"prompt": user("one")},
        {"prompt": [{"role": "system", "content": "be good"}, *user("two")]},
        {"prompt": user("long " * 40)},
        {"prompt": user(END)},
        {"prompt": user("five")},
    ]
    skipped: list[str] = []
    kept = encoder(tokenizer).limited_to(max_prompt_length=40).encoded(rows, skipped)
    assert [prompt[0]["content"] for prompt in kept["prompt"]] == ["one", "five"]
    assert [line.split(": ")[0] for line in skipped] == ["row 1", "row 2", "row 3"]
    assert "no system" in skipped[0]
    assert "max_prompt_length" in skipped[1]
    assert END in skipped[2]
    with pytest.raises(DataError, match="row 0"):
        encoder(tokenizer).encoded(rows[1:2], [])
