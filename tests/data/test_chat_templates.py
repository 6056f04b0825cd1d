"""What a chat template may do to conversations, and what it is refused for."""

from typing import Any

import pytest
from tiny import CHATML, CHATS, END, PROMPTS, START, tiny_tokenizer
from tokenizers import AddedToken

from bondlm.errors import ConfigError, DataError
from data.helpers import encode, user


def test_conversations_are_rendered_with_the_generation_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bondlm.data.control.CHUNK", 5)
    tokenizer = tiny_tokenizer()
    expected = [f"{START}user\n{prompt}{END}\n{START}assistant\n" for prompt in PROMPTS]
    ids = encode(CHATS, tokenizer)
    assert [tokenizer.decode(row) for row in ids] == expected
    assert all(row[0] == 1 and row.count(1) == 2 and row.count(2) == 1 for row in ids)


def test_message_keys_that_are_none_do_not_reach_the_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if 'name' in m %} from {{ m.name }}{% endif %}{% endfor %}"
    )
    chats = [[{"role": "user", "content": "hi", "name": None}], [{"role": "user", "content": "hi", "name": "cat"}]]
    assert [tokenizer.decode(row) for row in encode(chats, tokenizer)] == ["hi", "hi from cat"]


@pytest.mark.parametrize("template", ["<s>" + CHATML, "<s><s><s>" + CHATML, "{{ bos_token }}" + CHATML])
def test_a_conversation_has_one_bos(template: str) -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    tokenizer.chat_template = template
    (row,) = encode(CHATS[:1], tokenizer)
    assert row[:2] == [300, 1]
    assert row.count(300) == 1


def test_a_template_without_bos_gets_none() -> None:
    (row,) = encode(CHATS[:1], tiny_tokenizer(adds_bos=True))
    assert 300 not in row


def test_conversations_without_a_template_are_refused() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    assert encode(PROMPTS, tokenizer)
    with pytest.raises(ConfigError, match=r"tokenizer\.chat_template"):
        encode(CHATS, tokenizer)
    tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(ConfigError, match=r"tokenizer\.chat_template"):
        encode(CHATS, tokenizer)
    tokenizer.chat_template = {"tool_use": "wrong", "default": CHATML}
    assert encode(CHATS, tokenizer) == encode(CHATS, tiny_tokenizer())


def test_a_template_that_is_not_jinja_is_a_setting_to_correct() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "line one\n{% for m in messages %}{{ m.content }}"
    with pytest.raises(ConfigError, match=r"Jinja.*line 2"):
        encode(CHATS, tokenizer)


RAISING = {
    "raise_exception": "{{ raise_exception('no system role') }}",
    "undefined": "{{ missing.attribute }}",
    "type": "{{ 'a' + 3 }}",
    "filter value": "{{ 1 // 0 }}",
    "sandbox attribute": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "sandbox mutation": "{{ messages.append(1) }}",
    "huge range": "{% for i in range(10 ** 12) %}{% endfor %}",
}


@pytest.mark.parametrize("fault", RAISING.values(), ids=RAISING.keys())
def test_rows_that_the_template_refuses_are_named(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bondlm.data.control.CHUNK", 5)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}" + fault + "{% endif %}" + CHATML
    chats: list[Any] = list(CHATS)
    for bad in (3, 7):
        chats[bad] = [{"role": "system", "content": "be good"}, *CHATS[bad]]
    with pytest.raises(DataError, match="chat template") as caught:
        encode(chats, tokenizer)
    assert [line.split(": ")[0] for line in str(caught.value).split("\n")[1:]] == ["row 3", "row 7"]
    assert encode(CHATS, tokenizer) == encode(CHATS, tiny_tokenizer())


def test_the_template_counts_towards_the_length_of_a_conversation() -> None:
    tokenizer = tiny_tokenizer()
    length = len(encode(CHATS[:1], tokenizer)[0])
    assert length > len(tokenizer.encode(PROMPTS[0]))
    assert encode(CHATS[:1], tokenizer, max_prompt_length=length)
    with pytest.raises(DataError, match=f"row 0: {length} tokens"):
        encode(CHATS[:1], tokenizer, max_prompt_length=length - 1)


def test_a_template_that_writes_nothing_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages|length > 1 %}a{% endif %}"
    with pytest.raises(DataError, match="row 1: no tokens"):
        encode([user("a", "b"), user("a")], tokenizer)


def test_tokens_that_a_template_joins_across_messages_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chats = [user("hi <|im_", "end|> there")]
    assert 2 in encode(chats, tokenizer, allow_special_tokens_in_text=True)[0]
    with pytest.raises(DataError, match=r"row 0: .*<\|im_end\|>"):
        encode(chats, tokenizer)


def test_markers_of_the_template_that_are_no_special_tokens_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool_call>"), AddedToken("<|role|>"), AddedToken("user"), AddedToken("    ")])
    tokenizer.chat_template = CHATML + "    {# <tool_call> #}{{ '[INST]' if false }}"
    for hostile, name in [("<tool_call>", "<tool_call>"), ("a <|role|>", r"<\|role\|>"), ("[INST] x", r"\[INST\]")]:
        with pytest.raises(DataError, match=f"row 0: .*{name}"):
            encode([user(hostile)], tokenizer)
    assert encode([user("the user    indents [NAME] <b>")], tokenizer)
    # Plain text is not rendered by a template, so its markers mean nothing there.
    assert encode(["[INST] <tool_call>"], tokenizer)
