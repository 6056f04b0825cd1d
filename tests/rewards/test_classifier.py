import json
import logging
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CHATML, tiny_causal, tiny_t5, tiny_tokenizer
from torch import nn
from transformers import AutoModelForSequenceClassification, LlamaConfig, T5ForSequenceClassification

from bondlm.data.columns import PROMPT_IDS
from bondlm.errors import ConfigError, DataError, RewardError
from bondlm.rewards import NamedReward, NLIReward, SequenceClassifierReward, check_room, load_rewards, score
from bondlm.rewards.classifier import FACTS_FILE, FALLBACK_TEMPLATES

from .small_models import ROWS, bert_classifier, bert_tokenizer, llama_classifier, saved, unmasked

PROMPTS = [prompt for prompt, _ in ROWS]
COMPLETIONS = [completion for _, completion in ROWS]
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
ANSWERS = [[{"role": "assistant", "content": completion}] for completion in COMPLETIONS]


def chat_text(prompt, completion):
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{completion}<|im_end|>\n"


def plain_score(model, ids):
    """One row, no padding: what the checkpoint itself says."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


def bert():
    tokenizer = bert_tokenizer()
    return bert_classifier(tokenizer), tokenizer


def llama(pad="own", config_pad="same", **options):
    tokenizer = tiny_tokenizer(pad=pad, **options)
    return llama_classifier(tokenizer, pad_token_id=tokenizer.pad_token_id if config_pad == "same" else None), tokenizer


@pytest.mark.parametrize("max_batch", [(16, 16_384), (3, 16_384), (16, 60), (1, 1)])
def test_bert_micro_batches_equal_one_by_one(max_batch):
    model, tokenizer = bert()
    rows, tokens = max_batch
    reward = SequenceClassifierReward(model, tokenizer, batch_size=rows, batch_tokens=tokens)
    expected = [plain_score(model, tokenizer(prompt + completion)["input_ids"]) for prompt, completion in ROWS]
    assert max(expected) - min(expected) > 0.1
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("family", ["convbert", "xlnet"])
def test_a_model_that_does_not_mask_padding_gets_none(family):
    tokenizer = bert_tokenizer()
    model = unmasked(AutoModelForSequenceClassification, family, tokenizer, num_labels=1)
    reward = SequenceClassifierReward(model, tokenizer)
    expected = [plain_score(model, tokenizer(prompt + completion)["input_ids"]) for prompt, completion in ROWS]
    assert max(expected) - min(expected) > 0.1
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)


def test_a_pair_is_what_the_tokenizer_makes_of_two_texts(caplog):
    """Of a chat, the last user message and the answer. Without the option both are one text, and a warning says so."""
    model, tokenizer = bert()
    reward = SequenceClassifierReward(model, tokenizer, prompt_format="pair")
    assert caplog.text == ""
    with torch.no_grad():
        expected = [model(**tokenizer(*row, return_tensors="pt")).logits[0, 0].item() for row in ROWS]
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)
    assert reward([[{"role": "system", "content": "s"}, *chat] for chat in CHATS], ANSWERS) == reward(
        PROMPTS, COMPLETIONS
    )
    joined = SequenceClassifierReward(model, tokenizer)
    assert "prompt_format=pair" in caplog.text
    assert joined(PROMPTS, COMPLETIONS) != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("batch_tokens", [16_384, 300])
@pytest.mark.parametrize(
    ("pad", "config_pad"), [("own", "same"), ("own", None), ("eos", "same"), ("eos", None), (None, None)]
)
def test_decoder_type_micro_batches_equal_one_by_one(pad, config_pad, batch_tokens):
    """Whatever the pad token is: the same as another, and even absent."""
    model, tokenizer = llama(pad, config_pad)
    expected = [plain_score(model, tokenizer(chat_text(*row))["input_ids"]) for row in ROWS]
    reward = SequenceClassifierReward(model, tokenizer, batch_tokens=batch_tokens)
    assert max(expected) - min(expected) > 0.1
    assert reward(CHATS, ANSWERS) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("pad", "config_pad"), [("own", None), ("eos", None), (None, None)])
def test_a_final_eos_is_read_although_pad_may_equal_it(pad, config_pad):
    model, tokenizer = llama(pad, config_pad, chat=False)
    expected = [plain_score(model, [*tokenizer(p + c)["input_ids"], tokenizer.eos_token_id]) for p, c in ROWS]
    assert SequenceClassifierReward(model, tokenizer)(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("build", [bert, llama])
def test_a_row_alone_equals_the_row_in_a_batch_and_order_is_kept(build):
    reward = SequenceClassifierReward(*build(), batch_size=3)
    together = reward(PROMPTS, COMPLETIONS)
    assert [reward([prompt], [completion])[0] for prompt, completion in ROWS] == pytest.approx(together, abs=1e-6)
    assert reward(PROMPTS[::-1], COMPLETIONS[::-1])[::-1] == pytest.approx(together, abs=1e-6)


def test_the_forward_pass_is_sorted_bounded_and_padded_on_the_right():
    model, tokenizer = bert()
    masks = []
    model.register_forward_pre_hook(lambda _m, _a, inputs: masks.append(inputs["attention_mask"]), with_kwargs=True)
    SequenceClassifierReward(model, tokenizer, batch_size=3)(PROMPTS, COMPLETIONS)
    assert [len(mask) for mask in masks] == [3, 3, 2]
    lengths = [length for mask in masks for length in mask.sum(dim=1).tolist()]
    assert lengths == sorted(lengths, reverse=True)
    for mask in masks:
        assert mask.shape[1] == mask.sum(dim=1).max()
        assert (mask.diff(dim=1) <= 0).all()


def test_the_reward_models_own_template_decides_the_text():
    model, tokenizer = llama()
    before = SequenceClassifierReward(model, tokenizer)
    other = tiny_tokenizer()
    other.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ';' }}{% endfor %}"
    after = SequenceClassifierReward(model, other)
    assert before.render(CHATS[0], ANSWERS[0])[0] == chat_text(*ROWS[0])
    assert after.render(CHATS[0], ANSWERS[0])[0] == f"user: {PROMPTS[0]};assistant: {COMPLETIONS[0]};"
    expected = [plain_score(model, other(f"user: {p};assistant: {c};")["input_ids"]) for p, c in ROWS]
    assert after(CHATS, ANSWERS) == pytest.approx(expected, abs=1e-6)
    assert (torch.tensor(after(CHATS, ANSWERS)) - torch.tensor(before(CHATS, ANSWERS))).abs().min() > 1e-4


def test_a_rendered_chat_gets_no_second_bos():
    tokenizer = tiny_tokenizer(adds_bos=True)
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    reward = SequenceClassifierReward(llama_classifier(tokenizer, pad_token_id=0), tokenizer)
    ids = reward.encode(CHATS[0], ANSWERS[0])
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert reward.encode(PROMPTS[0], COMPLETIONS[0])[0] == tokenizer.bos_token_id  # plain text gets the tokenizer's


def test_chats_without_a_template_are_refused():
    reward = SequenceClassifierReward(*bert())
    with pytest.raises(ConfigError, match="chat_template"):
        reward(CHATS, ANSWERS)


@pytest.mark.parametrize(
    ("append_eos", "options", "chat", "ends"),
    [
        ("auto", {"chat": False}, False, "x$"),
        ("auto", {"chat": False, "adds_eos": True}, False, "x$"),
        ("auto", {"chat": True}, False, "xx"),
        ("auto", {"chat": True}, True, "$x"),  # the template's own, and its line feed
        ("auto", {"chat": False, "eos": False}, False, "xx"),
        (True, {"chat": True}, False, "x$"),
        (True, {"chat": True}, True, "x$"),
        (True, {"chat": False, "adds_eos": True}, False, "x$"),
        (False, {"chat": False}, False, "xx"),
    ],
)
def test_append_eos(append_eos, options, chat, ends):
    tokenizer = tiny_tokenizer(**options)
    how = {"append_eos": append_eos, "prompt_format": "plain"}
    reward = SequenceClassifierReward(llama_classifier(tokenizer, pad_token_id=0), tokenizer, **how)
    ids = reward.encode(CHATS[0], ANSWERS[0]) if chat else reward.encode(PROMPTS[0], COMPLETIONS[0])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert "".join("$" if token == end else "x" for token in ids[-2:]) == ends


def test_the_last_tokens_are_logged_once(caplog):
    reward = SequenceClassifierReward(*llama(chat=False))
    with caplog.at_level(logging.INFO, logger="bondlm.rewards"):
        reward(PROMPTS, COMPLETIONS)
        reward(PROMPTS, COMPLETIONS)
    assert [record.getMessage().count("<|im_end|>") for record in caplog.records] == [1]


def test_rows_that_are_too_long_fail_alone_and_with_their_length():
    reward = SequenceClassifierReward(*bert(), max_length=10)
    lengths = [len(row) for row in map(reward.encode, PROMPTS, COMPLETIONS)]
    row = next(row for row, length in enumerate(lengths) if length > 10)
    message = rf"reward 'rm' takes 10 tokens and has {lengths[row]} tokens.*truncate='left'.* for row {row} of 8"
    named = [NamedReward("rm", reward)]
    with pytest.raises(RewardError, match=message):
        score(named, PROMPTS, COMPLETIONS)
    scores = score(named, PROMPTS, COMPLETIONS, allow_bad_rows=True)
    assert set(scores.bad) == {row for row, length in enumerate(lengths) if length > 10} != set(range(8))
    whole = score([NamedReward("rm", SequenceClassifierReward(*bert()))], PROMPTS, COMPLETIONS).total
    good = [row for row in range(8) if row not in scores.bad]
    assert torch.allclose(scores.total[good], whole[good])
    assert score(named, PROMPTS[row : row + 1], COMPLETIONS[row : row + 1], allow_bad_rows=True).bad  # no other row


@pytest.mark.parametrize(("stated", "limit"), [(64, 64), (32, 32), (int(1e30), 64)])
def test_the_limit_is_the_smaller_of_tokenizer_and_config(stated, limit):
    tokenizer = bert_tokenizer(max_length=stated)
    assert SequenceClassifierReward(bert_classifier(tokenizer), tokenizer)._limit == limit


def test_truncate_left_keeps_the_end_and_the_leading_special_token():
    model, tokenizer = bert()
    reward = SequenceClassifierReward(model, tokenizer, max_length=10, truncate="left")
    full = [tokenizer(prompt + completion)["input_ids"] for prompt, completion in ROWS]
    kept = [ids if len(ids) <= 10 else [ids[0], *ids[-9:]] for ids in full]
    assert {len(ids) <= 10 for ids in full} == {True, False}
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx([plain_score(model, ids) for ids in kept], abs=1e-6)


def test_the_model_is_frozen_in_eval_mode_and_keeps_its_dtype():
    tokenizer = bert_tokenizer()
    model = bert_classifier(tokenizer, hidden_dropout_prob=0.5).to(torch.bfloat16).train()
    reward = SequenceClassifierReward(model, tokenizer)
    assert reward(PROMPTS, COMPLETIONS) == reward(PROMPTS, COMPLETIONS)  # no dropout
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype is torch.bfloat16


def test_no_rows():
    assert SequenceClassifierReward(*bert())([], []) == []


def test_an_empty_text_is_an_error_and_not_a_crash():
    named = [NamedReward("rm", SequenceClassifierReward(*llama(), prompt_format="plain"))]
    with pytest.raises(RewardError, match=r"'rm' has no token.*row 0"):
        score(named, [""], [""])


def test_a_conversation_that_the_template_refuses_fails_alone():
    tokenizer = bert_tokenizer()
    refusal = "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + refusal + "{{ m['content'] }} {% endfor %}"
    reward = NamedReward("rm", SequenceClassifierReward(bert_classifier(tokenizer), tokenizer))
    asked = [{"role": "user", "content": "why do cats sleep"}]
    prompts, answers = [asked, [{"role": "system", "content": "be brief"}, *asked]], ["rain", "blue"]
    with pytest.raises(RewardError, match=r"'rm' cannot score.*TemplateError: System role not supported.*row 1 of 2"):
        score([reward], prompts, answers)
    assert set(score([reward], prompts, answers, allow_bad_rows=True).bad) == {1}
    with pytest.raises(DataError, match=r"'rm' cannot score the prompt 'why do cats sleep': .*System role"):
        check_room([reward], [{"prompt": prompt, PROMPT_IDS: [1]} for prompt in prompts], 4)


def test_plain_text_is_what_its_own_template_or_training_makes_of_it(tmp_path):
    """A chat model reads messages, also of plain text; one that bondlm trained reads what it was trained on."""
    model, tokenizer = llama()
    chat = SequenceClassifierReward(model, tokenizer)
    assert chat.render(PROMPTS[0], COMPLETIONS[0]) == (chat_text(PROMPTS[0], COMPLETIONS[0]), True)
    prefilled = [*CHATS[0], {"role": "assistant", "content": "Well, "}]
    assert chat.render(prefilled, ANSWERS[0]) == (chat_text(PROMPTS[0], "Well, " + COMPLETIONS[0]), True)
    plain = SequenceClassifierReward(model, tokenizer, prompt_format="plain")
    assert plain.render(PROMPTS[0], COMPLETIONS[0]) == (PROMPTS[0] + COMPLETIONS[0], False)
    for kind, template in FALLBACK_TEMPLATES.items():  # it came with the training, and no plain text was in it
        tokenizer.chat_template = template
        assert SequenceClassifierReward(model, tokenizer).prompt_format == "plain", kind
    folder = tmp_path / "reward"
    model.save_pretrained(folder)
    llama()[1].save_pretrained(folder)
    for facts, expected in ((None, "chat"), ({"prompt_format": "plain"}, "plain"), ({"prompt_format": "chat"}, "chat")):
        if facts is not None:
            (folder / FACTS_FILE).write_text(json.dumps(facts))
        assert SequenceClassifierReward.from_pretrained(str(folder)).prompt_format == expected
    assert load_rewards(f"classifier:{folder}?prompt_format=plain")[0].function.prompt_format == "plain"
    for damaged in ('["chat"]', '{"prompt_format"', "{}"):
        (folder / FACTS_FILE).write_text(damaged)
        with pytest.raises(ConfigError, match=r"reward\.json .*cannot be read"):
            SequenceClassifierReward.from_pretrained(str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"append_eos": "yes"}, "append_eos.*'yes'.*'auto', True, False"),
        ({"append_eos": 1}, r"append_eos.*\b1\b"),
        ({"append_eos": True}, "append_eos.*eos_token"),
        ({"truncate": "right"}, "truncate.*'right'.*None, 'left'"),
        ({"batch_size": 0}, r"batch_size.*\b0\b"),
        ({"max_length": 0}, r"max_length.*\b0\b"),
        ({"max_length": 65}, "max_length is 65, but the model has 64 positions"),
        ({"prompt_format": "pair", "truncate": "left"}, "'pair' takes no truncate"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        SequenceClassifierReward(*bert(), **options)


def test_several_labels_are_refused_with_advice():
    tokenizer = bert_tokenizer()
    with pytest.raises(ConfigError, match=r"3 labels.*nli:"):
        SequenceClassifierReward(bert_classifier(tokenizer, num_labels=3), tokenizer)


def test_a_module_that_is_no_transformers_model():
    with pytest.raises(ConfigError, match=r"Linear.*config"):
        SequenceClassifierReward(nn.Linear(2, 1), bert_tokenizer())


def test_a_saved_model_scores_the_same(tmp_path):
    model, tokenizer = llama()
    loaded = SequenceClassifierReward.from_pretrained(saved(tmp_path, model, tokenizer), batch_size=4)
    assert loaded.batch_size == 4
    expected = SequenceClassifierReward(model, tokenizer)(CHATS, ANSWERS)
    assert loaded(CHATS, ANSWERS) == pytest.approx(expected, abs=1e-6)
    half = SequenceClassifierReward.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert half.model.dtype is torch.bfloat16


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_a_bf16_model_scores_with_a_head_in_fp32(kind, tmp_path):
    """Between 4 and 8 bf16 knows 32 values: rewards, which are compared, would tie."""
    if kind == "t5":
        tokenizer = tiny_tokenizer(chat=False)
        path = saved(tmp_path, tiny_t5(tokenizer), tokenizer)  # its head is tied to its embedding
        load = partial(NLIReward.from_pretrained, path)
    else:
        model, tokenizer = llama() if kind == "llama" else (bert_classifier(bert_tokenizer()), bert_tokenizer())
        load = partial(SequenceClassifierReward.from_pretrained, saved(tmp_path, model, tokenizer))
    prompts, completions = [p for p, _ in ROWS], [c for _, c in ROWS]
    exact, half = load(dtype=torch.float32), load(dtype=torch.bfloat16)
    scores = torch.tensor(half(prompts, completions), dtype=torch.float64)
    assert (scores != scores.bfloat16().double()).all()
    assert scores.tolist() == pytest.approx(exact(prompts, completions), rel=0.1, abs=0.1)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16, torch.float32}
    assert half.model.get_input_embeddings().weight.dtype == torch.bfloat16
    if kind != "t5":  # a module scores as a folder does; its head computed in bf16
        (module,) = load_rewards(model.to(torch.bfloat16), processing_classes=tokenizer)
        scores = torch.tensor(module.function(prompts, completions), dtype=torch.float64)
        assert (scores != scores.bfloat16().double()).all()


def test_a_head_that_is_not_in_the_checkpoint_is_refused(tmp_path):
    """A fresh head gives plausible random numbers; transformers only warns."""
    model, tokenizer = llama()
    path = saved(tmp_path, model, tokenizer)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert AutoModelForSequenceClassification.from_pretrained(path).score.weight.abs().sum() > 0
    with pytest.raises(ConfigError, match=r"score\.weight.*LlamaForSequenceClassification") as caught:
        SequenceClassifierReward.from_pretrained(path)
    assert caught.value.exit_code == 2


def test_a_damaged_reward_model_is_refused(tmp_path):
    """Not with a traceback."""
    for name, change in (("shapes", {"intermediate_size": 8}), ("activation", {"hidden_act": "sil"})):
        path = saved(tmp_path / name, *llama())
        config = tmp_path / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
        with pytest.raises(ConfigError, match=r"reward model.*(shape \(|sil)"):
            SequenceClassifierReward.from_pretrained(path)
    path = saved(tmp_path / "cut", *llama())
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"reward model.*SafetensorError"):
        SequenceClassifierReward.from_pretrained(path)


def test_a_language_model_is_no_reward_model(tmp_path):
    tokenizer = tiny_tokenizer()
    path = saved(tmp_path, tiny_causal(tokenizer), tokenizer)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM.*2 labels"):
        SequenceClassifierReward.from_pretrained(path)
    config = LlamaConfig.from_pretrained(path)
    config.num_labels = 1
    config.save_pretrained(path)
    with pytest.raises(ConfigError, match=r"score\.weight"):
        SequenceClassifierReward.from_pretrained(path)


def test_an_adapter_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = llama()
    base = saved(tmp_path / "base", model, tokenizer)
    model.config._name_or_path = base
    adapter = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], r=2))
    for folder in ("bare", "with_config"):
        path = saved(tmp_path / folder, adapter, tokenizer)
        if folder == "with_config":
            model.config.save_pretrained(path)
        with pytest.raises(ConfigError, match=r"PEFT.*merge_and_unload"):
            SequenceClassifierReward.from_pretrained(path)


def test_pickled_weights_and_absent_folders_are_refused(tmp_path):
    model, tokenizer = bert()
    path = saved(tmp_path, model, tokenizer)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        SequenceClassifierReward.from_pretrained(path)
    with pytest.raises(ConfigError, match="/absent"):
        SequenceClassifierReward.from_pretrained(str(tmp_path / "absent"))


def test_an_end_of_sequence_token_in_a_text_is_scored_in_any_batch():
    """Heads like T5's want as many of them in each row of a batch; such a text ended the run."""
    tokenizer = tiny_tokenizer(chat=False)
    config = tiny_t5(tokenizer).config
    config.num_labels = 1
    model = T5ForSequenceClassification(config).double()
    reward = SequenceClassifierReward(model, tokenizer)
    prompts, completions = ["p"] * 4, ["one", f"two {tokenizer.eos_token} three", "four", tokenizer.eos_token]
    alone = [reward([p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
    assert reward(prompts, completions) == pytest.approx(alone, abs=1e-9)


def test_a_separator_in_a_text_of_a_pair_is_text():
    tokenizer = bert_tokenizer()
    reward = SequenceClassifierReward(bert_classifier(tokenizer), tokenizer, prompt_format="pair")
    assert reward.encode("rain [SEP]", "sea [SEP] blue").count(tokenizer.sep_token_id) == 2


def test_a_head_of_more_layers_than_the_loaded_class_is_refused(tmp_path):
    """What the class of the model's own code has beside `score` was dropped without a word."""
    model, tokenizer = llama()
    path = saved(tmp_path, model, tokenizer)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["LlamaForReward"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "model.safetensors")
    for extra, refused in ((), False), (("lm_head.weight",), False), (("lm_head.weight", "head_dense.weight"), True):
        save_file(
            weights | {name: torch.ones(2, 2) for name in extra}, tmp_path / "model.safetensors", {"format": "pt"}
        )
        if not refused:
            SequenceClassifierReward.from_pretrained(path)
            continue
        with pytest.raises(ConfigError, match=r"LlamaForReward.*head_dense\.weight.*LlamaForSequenceClassification"):
            SequenceClassifierReward.from_pretrained(path)
