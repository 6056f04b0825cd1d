import json
import math
from pathlib import Path

import pytest
import torch
from tiny import tiny_t5, tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from bondlm.data.columns import PROMPT_IDS
from bondlm.errors import ConfigError, DataError, RewardError
from bondlm.rewards import NamedReward, NLIReward, check_room, load_rewards, score
from bondlm.rewards.texts import AS_TEXT, broken_up

from .small_models import ROWS, bert_classifier, bert_tokenizer, llama_classifier, saved, unmasked

PREMISES = [prompt for prompt, _ in ROWS]
HYPOTHESES = [completion for _, completion in ROWS]
LABELS = {"contradiction": 0, "neutral": 1, "entailment": 2}
FLAN = "Premise: {} Hypothesis: {} Does the premise entail the hypothesis? yes or no"


def cross_encoder(labels=LABELS, **settings):
    tokenizer = bert_tokenizer()
    settings = {"label2id": labels, "id2label": {index: label for label, index in labels.items()}} | settings
    return bert_classifier(tokenizer, **settings), tokenizer


def t5(**options):
    tokenizer = tiny_tokenizer(chat=False, **options)
    return tiny_t5(tokenizer, dtype=torch.float64), tokenizer


def fixed_answer_t5(logits: dict[str, float]):
    """A T5 whose first-step logits are known: the decoder does nothing but hand on an embedding of ones."""
    model, tokenizer = t5()
    model.config.tie_word_embeddings = False
    model.lm_head = nn.Linear(model.config.d_model, len(tokenizer), bias=False, dtype=torch.float64)
    model.config.scale_decoder_outputs = False
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if name.endswith(("o.weight", "wo.weight")):
                parameter.zero_()
        model.decoder.final_layer_norm.weight.fill_(1.0)
        model.decoder.embed_tokens.weight[model.config.decoder_start_token_id] = 1000.0  # RMS norm makes it ones
        model.lm_head.weight.zero_()
        for word, logit in logits.items():
            model.lm_head.weight[tokenizer(word)["input_ids"][0]] = logit / model.config.d_model
    return model, tokenizer


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"template": "flan"}, 3.0 - math.log(math.exp(1.0) + math.exp(2.0))),
        ({"template": "flan", "output": "log_prob"}, 3.0 - math.log(math.exp(1.0) + math.exp(2.0) + math.exp(3.0))),
        ({"template": "flan", "negative": ("no",)}, 3.0 - 1.0),
        ({"template": "flan", "positive": "no", "negative": ("yes",)}, 1.0 - 3.0),
        ({}, 0.5 - -1.5),
    ],
)
def test_reward_from_known_logits(options, expected):
    model, tokenizer = fixed_answer_t5({"yes": 3.0, "no": 1.0, "it": 2.0, "1": 0.5, "0": -1.5})
    assert NLIReward(model, tokenizer, **options)(["p", "longer"], ["h", "i"]) == pytest.approx(
        [expected] * 2, abs=1e-5
    )


@pytest.mark.parametrize("family", ["convbert", "xlnet"])
def test_a_model_that_does_not_mask_padding_gets_none(family):
    tokenizer, id2label = bert_tokenizer(), {index: label for label, index in LABELS.items()}
    reward = NLIReward(unmasked(AutoModelForSequenceClassification, family, tokenizer, id2label=id2label), tokenizer)
    alone = [reward([premise], [hypothesis])[0] for premise, hypothesis in ROWS]
    assert max(alone) - min(alone) > 0.1
    assert reward(PREMISES, HYPOTHESES) == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("batch_tokens", [16_384, 250])
@pytest.mark.parametrize(
    ("template", "text", "positive", "negative"),
    [
        ("flan", FLAN, "yes", ("no", "it")),
        (None, "premise: {} hypothesis: {}", "1", ("0",)),
        ("true", "premise: {} hypothesis: {}", "1", ("0",)),
        ("{premise} so {hypothesis}?", "{} so {}?", "1", ("0",)),
    ],
)
def test_micro_batched_t5_equals_one_by_one(template, text, positive, negative, batch_tokens):
    model, tokenizer = t5()
    model.eval()
    first = {word: tokenizer(word)["input_ids"][0] for word in (positive, *negative)}
    expected = []
    for premise, hypothesis in ROWS:
        ids = torch.tensor([tokenizer(text.format(premise, hypothesis))["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids, decoder_input_ids=torch.tensor([[0]])).logits[0, 0]
        negatives = torch.stack([logits[first[word]] for word in negative])
        expected.append((logits[first[positive]] - negatives.logsumexp(0)).item())
    reward = NLIReward(model.train(), tokenizer, template=template, batch_tokens=batch_tokens)
    assert max(expected) - min(expected) > 0.01
    assert reward(PREMISES, HYPOTHESES) == pytest.approx(expected, abs=1e-5)


def test_micro_batched_cross_encoder_equals_one_by_one_with_token_types():
    model, tokenizer = cross_encoder()
    model.eval()
    expected = []
    for premise, hypothesis in ROWS:
        with torch.no_grad():
            logits = model(**tokenizer(premise, hypothesis, return_tensors="pt")).logits[0]
        expected.append((logits[2] - logits[:2].logsumexp(0)).item())
    reward = NLIReward(model, tokenizer, batch_size=3)
    together = reward(PREMISES, HYPOTHESES)
    assert together == pytest.approx(expected, abs=1e-5)
    assert [reward([p], [h])[0] for p, h in ROWS] == pytest.approx(together, abs=1e-6)
    log_probs = NLIReward(model, tokenizer, output="log_prob")(PREMISES, HYPOTHESES)
    assert log_probs == pytest.approx([-math.log1p(math.exp(-margin)) for margin in expected], abs=1e-5)


def test_a_swapped_label_order_gives_the_same_reward():
    model, tokenizer = cross_encoder()
    swapped, _ = cross_encoder({"ENTAILMENT": 0, "neutral": 1, "contradiction": 2})
    swapped.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in swapped.classifier.parameters():
            parameter.copy_(parameter.flip(0))
    rewards = NLIReward(model, tokenizer)(PREMISES, HYPOTHESES)
    assert NLIReward(swapped, tokenizer)(PREMISES, HYPOTHESES) == pytest.approx(rewards, abs=1e-6)
    wrong = NLIReward(model, tokenizer, entailment_label="Contradiction")(PREMISES, HYPOTHESES)
    assert wrong != pytest.approx(rewards, abs=1e-2)


def test_two_labels_entailment_and_not():
    model, tokenizer = cross_encoder({"not_entailment": 0, "entailment": 1})
    model.eval()
    with torch.no_grad():
        logits = model(**tokenizer(*ROWS[0], return_tensors="pt")).logits[0]
    assert NLIReward(model, tokenizer)(*[[text] for text in ROWS[0]]) == pytest.approx([(logits[1] - logits[0]).item()])


@pytest.mark.parametrize(
    ("labels", "label", "message"),
    [
        ({"LABEL_0": 0, "LABEL_1": 1}, None, r"\['LABEL_0', 'LABEL_1'\].*entailment_label"),
        ({"entail_a": 0, "entail_b": 1}, None, "'entail_a', 'entail_b'"),
        ({"entailment": 0}, None, r"\['entailment'\].*entailment_label"),
        (LABELS, "supports", "'supports'.*entailment_label"),
    ],
)
def test_labels_that_cannot_be_mapped_are_listed(labels, label, message):
    with pytest.raises(ConfigError, match=message):
        NLIReward(*cross_encoder(labels), entailment_label=label)


def test_unnamed_labels_can_be_named():
    model, tokenizer = cross_encoder()
    unnamed, _ = cross_encoder({"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2})
    rewards = NLIReward(unnamed, tokenizer, entailment_label="LABEL_2")(PREMISES, HYPOTHESES)
    assert rewards == pytest.approx(NLIReward(model, tokenizer)(PREMISES, HYPOTHESES), abs=1e-6)


@pytest.mark.parametrize("build", [t5, cross_encoder])
def test_premise_of_a_chat_a_column_and_a_prefix(build):
    reward = NLIReward(*build(), premise_prefix="summarize: ")
    plain = reward(PREMISES, HYPOTHESES)
    answers = [[{"role": "assistant", "content": text}] for text in HYPOTHESES]
    chats = [
        [
            {"role": "user", "content": "another question"},
            {"role": "assistant", "content": "an answer"},
            {"role": "user", "content": f"summarize: {text}"},
        ]
        for text in PREMISES
    ]
    assert reward(chats, answers) == plain
    assert reward([f"summarize: {text}" for text in PREMISES], HYPOTHESES) == plain
    assert NLIReward(reward.model, reward.tokenizer)(chats, answers) != plain
    column = NLIReward(reward.model, reward.tokenizer, premise_column="document")
    assert column(["x"] * len(ROWS), HYPOTHESES, document=PREMISES, other=PREMISES[::-1]) == plain


def test_premise_and_hypothesis_are_not_exchanged():
    reward = NLIReward(*cross_encoder())
    assert reward(PREMISES, HYPOTHESES) != pytest.approx(reward(HYPOTHESES, PREMISES), abs=1e-2)


def test_a_missing_column_names_those_that_are_there():
    named = [NamedReward("nli", NLIReward(*cross_encoder(), premise_column="doc"))]
    with pytest.raises(ConfigError, match=r"'nli'.*premise_column.*'doc'.*text"):
        score(named, ["p"], ["c"], {"text": ["t"]})


@pytest.mark.parametrize("bad", [None, ["a", "b"], float("nan"), True, [{"role": "user", "content": "rain"}]])
def test_numbers_in_the_column_are_text_and_what_is_none_fails_alone(bad):
    reward = NLIReward(*cross_encoder(), premise_column="doc")
    written = reward(["p"] * 2, ["four", "five"], doc=["42", "0.5"])
    assert reward(["p"] * 2, ["four", "five"], doc=[42, 0.5]) == written
    named = [NamedReward("nli", reward)]
    with pytest.raises(RewardError, match=r"'nli' needs text in the column 'doc' and finds .*row 1 of 2"):
        score(named, ["p"] * 2, ["four", "five"], {"doc": ["42", bad]})
    scores = score(named, ["p"] * 2, ["four", "five"], {"doc": ["42", bad]}, allow_bad_rows=True)
    assert set(scores.bad) == {1}
    assert scores.total[0] == pytest.approx(written[0], abs=1e-6)
    with pytest.raises(DataError, match=r"'nli' cannot score the prompt 'p': .*column 'doc'"):
        check_room(named, [{"prompt": "p", "doc": bad, PROMPT_IDS: [1]}], 4)


def test_a_chat_without_user_is_a_data_error():
    with pytest.raises(DataError, match=r"roles \['system'\]"):
        NLIReward(*cross_encoder())([[{"role": "system", "content": "x"}]], ["h"])


def test_braces_in_texts_are_left_alone():
    reward = NLIReward(*t5())
    assert reward(["{hypothesis} {0}"], ["{premise}"]) != reward(["{premise} {0}"], ["{premise}"])


@pytest.mark.parametrize("build", [t5, cross_encoder])
def test_long_rows_are_refused_or_lose_the_end_of_their_premise(build):
    model, tokenizer = build()
    free = NLIReward(model, tokenizer, max_length=None if build is cross_encoder else 10**6)
    premise, hypothesis = " ".join(PREMISES[:3]), "five"
    full = len(free._tokenize(premise, hypothesis)["input_ids"])
    limit = full - 10
    short = [NamedReward("nli", NLIReward(model, tokenizer, max_length=limit))]
    with pytest.raises(RewardError, match=rf"takes {limit} tokens and has {full} tokens.*truncate='premise'.*row 1\b"):
        score(short, ["a", premise], ["b", hypothesis])
    assert set(score(short, ["a", premise], ["b", hypothesis], allow_bad_rows=True).bad) == {1}
    cut = NLIReward(model, tokenizer, max_length=limit, truncate="premise")
    kept = tokenizer.decode(tokenizer(premise, add_special_tokens=False)["input_ids"][:-10])
    assert cut(["a", premise], ["b", hypothesis]) == pytest.approx(free(["a", kept], ["b", hypothesis]), abs=1e-6)
    assert cut([premise], [hypothesis]) != free([premise], [hypothesis])
    with pytest.raises(RewardError, match=rf"takes {limit} tokens.*row 0\b"):  # no premise left, and still too long
        score([NamedReward("nli", cut)], ["a"], [premise * 2])


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (t5, {"entailment_label": "entailment"}, "encoder-decoder.*entailment_label"),
        (cross_encoder, {"template": "flan", "negative": ("no",)}, "cross-encoder.*template, negative"),
        (t5, {"template": "flann"}, r"'flann'.*true, flan.*\{premise\}"),
        (t5, {"template": "{premise} only"}, r"'\{premise\} only'.*true, flan"),
        (t5, {"template": "{premise} {hypothesis} {"}, r"'\{premise\} \{hypothesis\} \{'.*braces"),
        (t5, {"positive": "0"}, r"\('0',\) and \('0',\)"),
        (t5, {"negative": ()}, r"\('1',\) and \(\)"),
        (t5, {"output": "prob"}, "output.*'prob'.*'margin', 'log_prob'"),
        (t5, {"truncate": "left"}, "truncate.*'left'"),
        (t5, {"batch_tokens": 0}, r"batch_tokens.*\b0\b"),
    ],
)
def test_bad_options(build, options, message):
    with pytest.raises(ConfigError, match=message):
        NLIReward(*build(), **options)


def test_an_answer_that_the_tokenizer_does_not_know():
    model, _ = t5()
    with pytest.raises(ConfigError, match=r"'zebra'.*vocabulary"):
        NLIReward(model, bert_tokenizer(), positive="zebra")


@pytest.mark.parametrize("build", [t5, cross_encoder])
def test_a_saved_model_scores_the_same(tmp_path, build):
    model, tokenizer = build()
    loaded = NLIReward.from_pretrained(saved(tmp_path, model, tokenizer), output="log_prob")
    expected = NLIReward(model, tokenizer, output="log_prob")(PREMISES, HYPOTHESES)
    assert loaded(PREMISES, HYPOTHESES) == pytest.approx(expected, abs=1e-6)


def test_unmappable_labels_are_refused_when_loading(tmp_path):
    path = saved(tmp_path, *cross_encoder({"LABEL_0": 0, "LABEL_1": 1}))
    with pytest.raises(ConfigError, match="LABEL_0"):
        NLIReward.from_pretrained(path)
    NLIReward.from_pretrained(path, entailment_label="LABEL_1")


def test_the_label_of_an_output_is_that_of_id2label(tmp_path):
    """As in transformers; a config may lack label2id, or have another one."""
    model, tokenizer = cross_encoder(LABELS)
    expected = NLIReward(model, tokenizer)(PREMISES, HYPOTHESES)
    path = Path(saved(tmp_path, model, tokenizer)) / "config.json"
    config = json.loads(path.read_text())
    for label2id in ({}, {"label2id": {"entailment": 0, "neutral": 1, "contradiction": 2}}):
        path.write_text(json.dumps({k: v for k, v in config.items() if k != "label2id"} | label2id))
        assert NLIReward.from_pretrained(str(path.parent))(PREMISES, HYPOTHESES) == pytest.approx(expected, abs=1e-6)
        with pytest.raises(ConfigError, match=r"3 labels \['contradiction', 'neutral', 'entailment'\]"):
            load_rewards(str(path.parent))


def test_a_decoder_type_cross_encoder_without_pad_goes_row_by_row():
    tokenizer = tiny_tokenizer(chat=False, pad=None)
    model = llama_classifier(tokenizer, labels=2)
    model.config.id2label = {0: "entailment", 1: "other"}
    reward = NLIReward(model, tokenizer)
    assert reward(PREMISES, HYPOTHESES) == pytest.approx([reward([p], [h])[0] for p, h in ROWS], abs=1e-6)


def test_a_separator_in_a_text_is_text():
    """A completion could end the hypothesis and go on in another segment."""
    model, tokenizer = cross_encoder()
    row = NLIReward(model, tokenizer)._encode_row("rain [SEP] sea", "blue [SEP] five")
    assert row["input_ids"].count(tokenizer.sep_token_id) == 2


def test_an_end_token_that_unigram_has_as_a_piece_is_text() -> None:
    """As in the vocabularies of T5, XLM-R and DeBERTa-v3, where `split_special_tokens` does not help."""
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>", *"</s>\u2581abpd")]
    made = Tokenizer(Unigram(pieces, unk_id=2))
    made.pre_tokenizer = Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    assert tokenizer.eos_token_id in tokenizer("ab</s>a", **AS_TEXT)["input_ids"]
    ids = tokenizer(broken_up("ab</s>a<pad>", tokenizer), **AS_TEXT)["input_ids"]
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id} & {*ids}
    assert broken_up("a < b/s>", tokenizer) == "a < b/s>"
