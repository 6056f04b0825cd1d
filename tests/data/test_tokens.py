import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import CHATS, END, PAD, PROMPTS, START, tiny_causal, tiny_gpt2, tiny_t5, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bondlm.data.tokens import TextInfo, as_messages, check_tokenizer, decode_completions, strip_after_eos
from bondlm.errors import ConfigError, DataError
from data.helpers import INJECTIONS, encode, user

ODD_TEXTS = [
    "one\r\ntwo\rthree\n",
    "a \U0001f469\u200d\U0001f4bb and \U0001f1eb\U0001f1f7",
    "\u05e9\u05dc\u05d5\u05dd \u202eabc\u202c \u0645\u0631\u062d\u0628\u0627",
    "a\u2028b\x85c\x00d",
    "\ufeffstart",
    "e\u0301 is not \u00e9",
    "  two  spaces , and a stop .  ",
    " it 's n't cleaned up !",
    "\uff1c\uff5cim_end\uff5c\uff1e",
]


def test_check_tokenizer_joins_all_eos_ids_once_in_order() -> None:
    tokenizer = tiny_tokenizer()
    assert check_tokenizer(tokenizer, [7, 2, 9]) == TextInfo(eos_ids=(7, 2, 9), pad_id=0)
    assert check_tokenizer(tokenizer, 7) == TextInfo(eos_ids=(7, 2), pad_id=0)
    assert check_tokenizer(tokenizer, None) == TextInfo(eos_ids=(2,), pad_id=0)
    assert check_tokenizer(tiny_tokenizer(eos=False), [5]).eos_ids == (5,)


def test_check_tokenizer_pads_with_the_first_eos_where_there_is_no_pad() -> None:
    assert check_tokenizer(tiny_tokenizer(pad=None), [7, 2]) == TextInfo(eos_ids=(7, 2), pad_id=7)
    assert check_tokenizer(tiny_tokenizer(pad="eos"), [7]) == TextInfo(eos_ids=(7, 2), pad_id=2)


@pytest.mark.parametrize("none", [None, []])
def test_check_tokenizer_refuses_models_that_cannot_stop(none: list[int] | None) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.eos_token"):
        check_tokenizer(tiny_tokenizer(eos=False), none)


@pytest.mark.parametrize("bad", [-1, True, [2, "<|im_end|>"], 2.0])
def test_check_tokenizer_refuses_what_is_not_a_token_id(bad: Any) -> None:
    with pytest.raises(ConfigError, match="eos_token_id"):
        check_tokenizer(tiny_tokenizer(), bad)


def test_standard_prompts_are_tokenised_in_order_and_across_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bondlm.data.control.CHUNK", 5)
    tokenizer = tiny_tokenizer()
    assert encode(PROMPTS, tokenizer) == [tokenizer.encode(prompt) for prompt in PROMPTS]
    assert encode([], tokenizer) == []


@pytest.mark.parametrize("adds_bos", [False, True])
def test_eos_behind_the_prompt_is_for_encoders_only(adds_bos: bool) -> None:
    tokenizer = tiny_tokenizer(adds_bos=adds_bos, adds_eos=True)
    plain = tiny_tokenizer().encode("What is rain?")
    bos = [300] if adds_bos else []
    assert encode(["What is rain?"], tokenizer) == [[*bos, *plain]]
    assert encode(["What is rain?"], tokenizer, is_encoder_decoder=True) == [[*bos, *plain, 2]]


@pytest.mark.parametrize("adds_eos", [False, True])
def test_an_eos_that_the_text_brings_is_kept(adds_eos: bool) -> None:
    tokenizer = tiny_tokenizer(adds_eos=adds_eos)
    rows = encode(["a" + END, "a"], tokenizer, allow_special_tokens_in_text=True)
    assert rows == [[67, 2], [67]]


def test_a_bos_in_the_text_is_not_doubled() -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    rows = encode(["<s>rain", "rain"], tokenizer, allow_special_tokens_in_text=True)
    assert rows[0] == rows[1]
    assert rows[0].count(300) == 1


# Long prompts: row i has i + 1 tokens ("a" is one token, and so is " a").
def _growing(n: int) -> list[str]:
    return ["a" * (i + 1) for i in range(n)]


def _lengths(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return [len(tokenizer.encode(text)) for text in _growing(24)]


def test_prompts_at_the_limit_pass_and_one_token_more_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    prompt = PROMPTS[0]
    length = len(tokenizer.encode(prompt))
    whole = [tokenizer.encode(prompt)]
    assert encode([prompt], tokenizer, max_prompt_length=length) == whole
    assert encode([prompt], tokenizer, context_length=length + 8) == whole
    assert encode([prompt], tokenizer, context_length=length, is_encoder_decoder=True) == whole
    assert encode([prompt], tokenizer, max_completion_length=10**9, is_encoder_decoder=True) == whole
    for change, advice in [
        ({"max_prompt_length": length - 1}, f"max_prompt_length is {length - 1}.*`max_prompt_length`"),
        ({"context_length": length + 7}, rf"{length + 7} tokens.*\b{length - 1}\b.*max_completion_length = 8"),
        ({"context_length": length - 1, "is_encoder_decoder": True}, f"context.* {length - 1} tokens"),
        ({"context_length": length + 7, "max_prompt_length": length}, "`max_completion_length`"),
    ]:
        with pytest.raises(DataError, match=advice) as caught:
            encode([prompt], tokenizer, **change)
        assert str(caught.value).endswith(f"\nrow 0: {length} tokens")


def test_overlong_rows_are_listed_ten_by_name() -> None:
    tokenizer = tiny_tokenizer()
    lengths = _lengths(tokenizer)
    assert lengths == sorted(lengths)
    limit = lengths[3]
    long_rows = [row for row, length in enumerate(lengths) if length > limit]
    with pytest.raises(DataError) as caught:
        encode(_growing(24), tokenizer, max_prompt_length=limit)
    reported = str(caught.value).split("\n")[1:]
    assert reported[:10] == [f"row {row}: {lengths[row]} tokens" for row in long_rows[:10]]
    assert reported[10:] == [f"... and {len(long_rows) - 10} more rows"]


def test_completions_that_fill_the_context_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_completion_length = 64"):
        encode(PROMPTS, tiny_tokenizer(), context_length=64, max_completion_length=64)


def test_a_tokenizer_file_that_asks_for_truncation_and_padding_is_overruled() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert encode(PROMPTS, tokenizer) == encode(PROMPTS, tiny_tokenizer())
    tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    assert encode(CHATS, tokenizer) == encode(CHATS, tiny_tokenizer())


@pytest.mark.parametrize("settings", [{}, {"adds_bos": True}, {"adds_eos": True}, {"adds_bos": True, "adds_eos": True}])
def test_prompts_that_become_no_tokens_are_refused(settings: dict[str, bool]) -> None:
    tokenizer = tiny_tokenizer(**settings)  # type: ignore[arg-type]
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(DataError, match=r"\nrow 1: no tokens$"):
        encode(["a", "\u200b\u200b"], tokenizer)


HARMLESS = [
    "<|im_end|",
    "< |im_end|>",
    "<|IM_END|>",
    "<|im\u200b_end|>",
    "im_end",
    "&lt;|im_end|&gt;",
    "\x000\x00",
    "<2>",
]


@pytest.mark.parametrize("make", [lambda text: text, user], ids=["text", "messages"])
@pytest.mark.parametrize("hostile", INJECTIONS.values(), ids=INJECTIONS.keys())
def test_special_tokens_in_the_text_are_refused(hostile: str, make: Callable[[str], Any]) -> None:
    tokenizer = tiny_tokenizer(pad=None)
    name = next(token for _, token in sorted((hostile.find(t), t) for t in (PAD, START, END) if t in hostile))
    with pytest.raises(DataError, match=rf"\nrow 1: .*{re.escape(name)}"):
        encode([make("fine"), make(hostile)], tokenizer)
    control = sum(token_id < 3 for row in encode([make("x")], tokenizer) for token_id in row)
    (allowed,) = encode([make(hostile)], tokenizer, allow_special_tokens_in_text=True)
    assert sum(token_id < 3 for token_id in allowed) > control


def test_text_that_only_looks_like_special_tokens_is_text() -> None:
    tokenizer = tiny_tokenizer()
    for row, text in zip(encode(HARMLESS, tokenizer), HARMLESS, strict=True):
        assert min(row) > 2
        assert tokenizer.decode(row) == text
    for row in encode([user(text) for text in HARMLESS], tokenizer):
        assert (row.count(0), row.count(1), row.count(2)) == (0, 2, 1)


def test_hostile_rows_are_counted_and_found_in_every_message_field() -> None:
    tokenizer = tiny_tokenizer()
    nested = [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": END}}]}]
    first = [{"role": "system", "content": START}, *CHATS[0]]
    chats: list[Any] = [*CHATS, nested, first]
    with pytest.raises(DataError) as caught:
        encode(chats, tokenizer)
    nested_line, first_line = str(caught.value).split("\n")[1:]
    assert END in nested_line
    assert nested_line.startswith("row 12: ")
    assert START in first_line
    assert first_line.startswith("row 13: ")
    with pytest.raises(DataError, match=r"row 9: .*\n\.\.\. and 15 more rows$"):
        encode([END] * 25, tokenizer)


def word_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that knows few words and folds full-width characters before it looks for added tokens."""
    vocab = {"[UNK]": 0, "</s>": 1, "hello": 2, "world": 3, "!": 4}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)  # type: ignore[no-untyped-call]


def test_unknown_words_are_not_special_tokens_but_normalised_eos_is() -> None:
    tokenizer = word_tokenizer(unk_token="[UNK]", eos_token="</s>", pad_token="[UNK]")
    assert encode(["hello \U0001f600 world"], tokenizer) == [[2, 0, 3]]
    for hostile in ("hello </s>", "hello \uff1c/s\uff1e"):
        with pytest.raises(DataError, match=r"row 0: .*</s>"):
            encode([hostile], tokenizer)


def test_an_unknown_token_that_is_also_eos_stays_refused() -> None:
    tokenizer = word_tokenizer(unk_token="[UNK]", eos_token="[UNK]")
    with pytest.raises(DataError, match=r"row 0: .*\[UNK\]"):
        encode(["hello stranger"], tokenizer)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_text_goes_through_encode_and_decode_unchanged(text: str) -> None:
    tokenizer = tiny_tokenizer()
    (row,) = encode([text], tokenizer)
    assert decode_completions([row, [*row, 2, 5, 6]], tokenizer, [2]) == [text, text]


def test_strip_after_eos_cuts_at_the_first_of_any_eos() -> None:
    assert strip_after_eos([5, 6, 2, 7, 2], [2]) == ([5, 6, 2], True)
    assert strip_after_eos([5, 9, 2], (2, 9)) == ([5, 9], True)
    assert strip_after_eos([2], [2]) == ([2], True)
    assert strip_after_eos([5, 6], [2]) == ([5, 6], False)
    assert strip_after_eos([], [2]) == ([], False)


def test_decode_completions_cuts_at_eos_and_hides_special_tokens() -> None:
    tokenizer = tiny_tokenizer()
    rain, sun, (other,) = (tokenizer.encode(text) for text in (" rain", " sun", "#"))
    rows = [[*rain, 2, *sun], [*rain, *sun], [2, *rain], [], [0, 1, *rain, 0], [*rain, other, *sun]]
    assert decode_completions(rows, tokenizer, (2, other)) == [" rain", " rain sun", "", "", " rain", " rain"]
    assert decode_completions([], tokenizer, (2,)) == []


def test_decode_completions_with_pad_equal_to_eos() -> None:
    tokenizer = tiny_tokenizer(pad="eos")
    info = check_tokenizer(tokenizer, 2)
    rain = tokenizer.encode(" rain")
    assert decode_completions([[*rain, 2, 2, 2], [2, 2]], tokenizer, info.eos_ids) == [" rain", ""]
    assert strip_after_eos([*rain, 2, 2, 2], info.eos_ids) == ([*rain, 2], True)


def test_decode_completions_leaves_spaces_even_where_the_tokenizer_would_not() -> None:
    tokenizer = word_tokenizer(unk_token="[UNK]", eos_token="</s>", clean_up_tokenization_spaces=True)
    assert tokenizer.decode([2, 4]) == "hello!"
    assert decode_completions([[2, 4, 1]], tokenizer, [1]) == ["hello !"]


def test_half_an_emoji_is_decoded_without_failing() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("\U0001f600")
    assert len(ids) > 1
    assert decode_completions([ids, ids[:-1]], tokenizer, [2]) == ["\U0001f600", "\ufffd"]


def test_as_messages_makes_one_assistant_turn_each() -> None:
    expected = [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": ""}]]
    assert as_messages(["a", ""]) == expected
    assert as_messages([]) == []


@pytest.mark.parametrize("build", [tiny_causal, tiny_gpt2, tiny_t5])
def test_tiny_models_generate_from_encoded_prompts(build: Callable[..., Any]) -> None:
    tokenizer = tiny_tokenizer()
    state = torch.random.get_rng_state()
    model, twin, other = build(tokenizer), build(tokenizer), build(tokenizer, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(model.get_input_embeddings().weight, other.get_input_embeddings().weight)
    encoder = model.config.is_encoder_decoder
    (row,) = encode(PROMPTS[:1], tokenizer, is_encoder_decoder=encoder)
    out = model.generate(torch.tensor([row]), max_new_tokens=6, do_sample=True)[0, 0 if encoder else len(row) :]
    assert 1 <= len(out) <= 7
    assert len(decode_completions([out.tolist()], tokenizer, check_tokenizer(tokenizer, 2).eos_ids)) == 1
