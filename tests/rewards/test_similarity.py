import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_t5, tiny_tokenizer
from transformers import AutoModel

from bondlm.errors import ConfigError, DataError, RewardError
from bondlm.rewards import NamedReward, SimilarityReward, score

from .small_models import ROWS, bert_encoder, bert_tokenizer, saved, unmasked

PROMPTS = [prompt for prompt, _ in ROWS]
COMPLETIONS = [completion for _, completion in ROWS]


def encoder():
    tokenizer = bert_tokenizer()
    return bert_encoder(tokenizer), tokenizer


def plain_embedding(model, tokenizer, text):
    with torch.no_grad():
        return model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)


@pytest.mark.parametrize("bounds", [{}, {"batch_size": 3}, {"batch_tokens": 20}])
def test_micro_batched_cosines_equal_one_by_one(bounds):
    model, tokenizer = encoder()
    expected = []
    for pair in ROWS:
        first, second = (plain_embedding(model, tokenizer, text) for text in pair)
        expected.append((first @ second / first.norm() / second.norm()).item())
    reward = SimilarityReward(model, tokenizer, **bounds)
    assert max(expected) - min(expected) > 0.05
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)
    assert [reward([p], [c])[0] for p, c in ROWS] == pytest.approx(expected, abs=1e-6)


def test_an_encoder_that_does_not_mask_padding_gets_none():
    tokenizer = bert_tokenizer()
    reward = SimilarityReward(unmasked(AutoModel, "convbert", tokenizer), tokenizer)
    alone = [reward([prompt], [prompt + completion])[0] for prompt, completion in ROWS]
    longer = [prompt + completion for prompt, completion in ROWS]
    assert max(alone) - min(alone) > 0.01
    assert reward(PROMPTS, longer) == pytest.approx(alone, abs=1e-6)


def test_a_text_is_like_itself_and_the_scale_does_not_matter():
    model, tokenizer = encoder()
    reward = SimilarityReward(model, tokenizer)
    assert reward(PROMPTS, PROMPTS) == pytest.approx([1.0] * len(PROMPTS))
    assert all(-1.0 <= cosine < 1.0 for cosine in reward(PROMPTS, COMPLETIONS))


def test_each_distinct_text_is_embedded_once():
    model, tokenizer = encoder()
    rows = []
    model.register_forward_pre_hook(lambda _m, _a, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True)
    reward = SimilarityReward(model, tokenizer)
    repeated = reward([PROMPTS[0]] * 4 + [PROMPTS[1]] * 2, [*COMPLETIONS[:4], COMPLETIONS[0], COMPLETIONS[0]])
    assert sum(rows) == 2 + 4
    assert repeated[:4] == pytest.approx([reward([PROMPTS[0]], [text])[0] for text in COMPLETIONS[:4]], abs=1e-6)
    assert repeated[4] == repeated[5] == pytest.approx(reward([PROMPTS[1]], [COMPLETIONS[0]])[0], abs=1e-6)


def test_a_chat_is_compared_by_its_last_user_message():
    reward = SimilarityReward(*encoder())
    chats = [
        [{"role": "user", "content": "first"}, {"role": "user", "content": text}, {"role": "system", "content": "x"}]
        for text in PROMPTS
    ]
    answers = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    assert reward(chats, answers) == reward(PROMPTS, COMPLETIONS)
    with pytest.raises(DataError, match="NoneType"):
        reward(chats, [[{"role": "assistant", "content": None}]] * len(chats))
    with pytest.raises(DataError, match="empty list"):
        reward(chats, [[]] * len(chats))


def test_an_empty_completion_has_a_score():
    assert len(SimilarityReward(*encoder())(["rain"], [""])) == 1


def test_long_texts_are_refused_or_lose_their_end():
    model, tokenizer = encoder()
    length = len(tokenizer(COMPLETIONS[5])["input_ids"])
    short = SimilarityReward(model, tokenizer, max_length=12)
    message = rf"takes 12 tokens and has {length} tokens.*truncate='right'"
    rows = ["rain", COMPLETIONS[5], "rain"], [COMPLETIONS[5], "rain", "blue"]
    with pytest.raises(RewardError, match=rf"'s' {message}.*row 0"):
        score([NamedReward("s", short)], *rows)
    scores = score([NamedReward("s", short)], *rows, allow_bad_rows=True)
    assert set(scores.bad) == {0, 1}
    assert scores.total[2] == pytest.approx(SimilarityReward(model, tokenizer)(["rain"], ["blue"])[0], abs=1e-6)
    cut = SimilarityReward(model, tokenizer, max_length=12, truncate="right")
    head = " ".join(COMPLETIONS[5].split()[:10])  # ten words, [CLS] and [SEP]
    assert cut(["rain"], [COMPLETIONS[5]]) == pytest.approx(SimilarityReward(model, tokenizer)(["rain"], [head]))


def test_a_saved_encoder_needs_all_its_weights_but_the_pooler(tmp_path):
    model, tokenizer = encoder()
    path = saved(tmp_path, model, tokenizer)
    weights = load_file(tmp_path / "model.safetensors")
    unused = {name: weight for name, weight in weights.items() if "pooler" not in name}
    assert len(unused) < len(weights)
    save_file(unused, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = SimilarityReward(model, tokenizer)(PROMPTS, COMPLETIONS)
    assert SimilarityReward.from_pretrained(path)(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)
    missing = next(name for name in unused if "attention" in name)
    del unused[missing]
    save_file(unused, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=re.escape(missing)):
        SimilarityReward.from_pretrained(path)


def test_an_adapter_is_refused(tmp_path):
    """transformers then loads the base and the adapter, and its loading info tells nothing of the base's weights."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = encoder()
    model.name_or_path = saved(tmp_path / "base", model, tokenizer)
    adapter = get_peft_model(model, LoraConfig(target_modules=["query"], r=2))
    path = saved(tmp_path / "adapter", adapter, tokenizer)
    with pytest.raises(ConfigError, match=r"PEFT.*merge_and_unload"):
        SimilarityReward.from_pretrained(path)


KINDS = "sentence_transformers.models."


def sentence_encoder(folder, pooling, kinds=("Transformer", "Pooling", "Normalize"), **settings):
    """A Sentence Transformers folder; its model and tokenizer."""
    model, tokenizer = encoder()
    saved(folder, model, tokenizer)
    modules = [{"type": KINDS + kind, "path": f"{i}_{kind}" if i else ""} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 16, **pooling}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return model, tokenizer


@pytest.mark.parametrize(
    ("pooling", "pool"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda hidden: hidden[0]),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, lambda hidden: hidden.mean(dim=0)),
        ({"pooling_mode": "cls", "include_prompt": True}, lambda hidden: hidden[0]),
        ({"pooling_mode": ["mean"]}, lambda hidden: hidden.mean(dim=0)),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, lambda hidden: hidden.sum(dim=0) / len(hidden) ** 0.5),
    ],
)
@torch.no_grad()
def test_a_text_is_pooled_as_the_folder_states(pooling, pool, tmp_path):
    model, tokenizer = sentence_encoder(
        tmp_path, pooling, prompts={"query": "query: ", "document": ""}, default_prompt_name=None
    )
    model.eval()
    expected = []
    for pair in ROWS:
        one, other = (pool(model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]) for text in pair)
        expected.append(torch.cosine_similarity(one, other, dim=0).item())
    reward = SimilarityReward.from_pretrained(str(tmp_path))
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("pooling", "more", "message"),
    [
        ({"pooling_mode_max_tokens": True}, {}, "pools by max_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, {}, "pools by mean_tokens, cls_token"),
        ({}, {}, "pools by nothing"),
        ({"pooling_mode": "lasttoken"}, {}, "pools by lasttoken"),
        ({"pooling_mode": ["cls", "mean"]}, {}, "pools by cls, mean"),
        ({"pooling_mode": "mean"}, {"kinds": ("Transformer", "Pooling", "Dense")}, "consists of .*Dense"),
        ({"pooling_mode": "mean"}, {"prompts": {"query": "q: "}, "default_prompt_name": "query"}, "the prompt 'query'"),
    ],
)
def test_an_encoder_that_does_more_is_refused(pooling, more, message, tmp_path):
    sentence_encoder(tmp_path, pooling, **more)
    with pytest.raises(ConfigError, match=message):
        SimilarityReward.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("modules", [{"a": 1}, ["Transformer", "Pooling"], [{}, {}]])
def test_a_damaged_list_of_modules_is_refused(modules, tmp_path):
    sentence_encoder(tmp_path, {"pooling_mode": "mean"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match=r"consists of .*\(modules\.json\)"):
        SimilarityReward.from_pretrained(str(tmp_path))
    sentence_encoder(tmp_path / "other", {"pooling_mode": "mean"})
    (tmp_path / "other/1_Pooling/config.json").write_text('["mean"]')
    with pytest.raises(ConfigError, match=r"1_Pooling/config\.json holds a list"):
        SimilarityReward.from_pretrained(str(tmp_path / "other"))


def test_of_an_encoder_decoder_the_encoder_embeds(tmp_path):
    """It was loaded, and failed at the first score."""
    tokenizer = tiny_tokenizer(chat=False)
    model = tiny_t5(tokenizer)
    reward = SimilarityReward.from_pretrained(saved(tmp_path, model, tokenizer))
    embedded = [plain_embedding(model.encoder, tokenizer, text) for text in ("rain", "in the sea")]
    expected = torch.cosine_similarity(*embedded, dim=0).item()
    assert reward(["rain"], ["in the sea"]) == pytest.approx([expected], abs=1e-6)


def test_a_text_is_as_long_as_the_folder_states(tmp_path):
    """Sentence Transformers cuts at `max_seq_length`, often below what the model would take."""
    model, _ = sentence_encoder(tmp_path, {"pooling_mode": "mean"})
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 7, "do_lower_case": False}))
    assert SimilarityReward.from_pretrained(str(tmp_path)).limit == 7
    assert SimilarityReward.from_pretrained(str(tmp_path), max_length=9).limit == 9
    cut = SimilarityReward.from_pretrained(str(tmp_path), truncate="right")
    assert len(cut._encode("the first of many words " * 9)) == 7
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 10_000}))
    assert SimilarityReward.from_pretrained(str(tmp_path)).limit == model.config.max_position_embeddings


def test_texts_are_in_lower_case_if_the_folder_says_so(tmp_path):
    sentence_encoder(tmp_path, {"pooling_mode": "mean"})
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": None}))  # knows cases apart
    prompts, loud = [COMPLETIONS[0].lower()], [COMPLETIONS[0].upper()]
    assert SimilarityReward.from_pretrained(str(tmp_path))(prompts, loud) != [pytest.approx(1)]
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    assert SimilarityReward.from_pretrained(str(tmp_path))(prompts, loud) == [pytest.approx(1)]


def test_an_absent_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no folder .*/absent$"):
        SimilarityReward.from_pretrained(str(tmp_path / "absent"))


def test_a_separator_in_a_text_is_text():
    model, tokenizer = encoder()
    assert SimilarityReward(model, tokenizer)._encode("rain [SEP] sea").count(tokenizer.sep_token_id) == 1
