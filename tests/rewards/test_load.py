from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from tiny import tiny_t5, tiny_tokenizer
from torch import nn
from transformers import AutoModelForSequenceClassification

from bondlm.errors import ConfigError
from bondlm.rewards import (
    HTTPReward,
    JudgeReward,
    NLIReward,
    SequenceClassifierReward,
    SimilarityReward,
    is_ranking,
    load_rewards,
    score,
)
from rewards.judge_stub import by_length, judging

from .small_models import bert_classifier, bert_encoder, bert_tokenizer, saved


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


class Judge:
    def __call__(self, completions):
        return [1.0] * len(completions)


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A working directory with models/rm, models/nli, models/t5, models/mini and rewards.py."""
    monkeypatch.chdir(tmp_path)
    tokenizer = bert_tokenizer()
    saved(tmp_path / "models/rm", bert_classifier(tokenizer), tokenizer)
    labels = {"label2id": {"no": 0, "entailment": 1}, "id2label": {0: "no", 1: "entailment"}}
    saved(tmp_path / "models/nli", bert_classifier(tokenizer, num_labels=2, **labels), tokenizer)
    saved(tmp_path / "models/mini", bert_encoder(tokenizer), tokenizer)
    t5_tokenizer = tiny_tokenizer(chat=False)
    saved(tmp_path / "models/t5", tiny_t5(t5_tokenizer), t5_tokenizer)
    (tmp_path / "rewards.py").write_text(
        "def brevity(completions):\n    return [-float(len(c)) for c in completions]\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "kind", "name"),
    [
        ("models/rm", SequenceClassifierReward, "rm"),
        ("./models/rm/", SequenceClassifierReward, "rm"),
        ("classifier:models/rm", SequenceClassifierReward, "rm"),
        ("nli:models/nli", NLIReward, "nli"),
        ("nli:models/t5", NLIReward, "t5"),
        ("similarity:models/mini", SimilarityReward, "mini"),
    ],
)
def test_model_specs(models, spec, kind, name):
    (reward,) = load_rewards(spec)
    assert (type(reward.function), reward.name, reward.weight) == (kind, name, 1.0)
    assert torch.isfinite(score([reward], ["How do I boil an egg?"], ["put it in water"], {}).total).all()


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (length, "length"),
        (partial(length, x=1), "length"),
        (lambda completions: [], "lambda"),
        (Judge(), "Judge"),
        (Mock(return_value=[]), "Mock"),
        ("rewards.py:brevity", "brevity"),
        ("math:sqrt", "sqrt"),
    ],
)
def test_function_specs(models, spec, name):
    (reward,) = load_rewards(spec)
    assert reward.name == name
    assert callable(reward.function)
    assert not reward.ranks
    assert not is_ranking(spec)


def test_a_list_keeps_order_weights_and_names_apart(models):
    rewards = load_rewards([length, "rewards.py:brevity", length, length], [1.0, 2.0, 0.5, 0.25])
    assert [(reward.name, reward.weight) for reward in rewards] == [
        ("length", 1.0),
        ("brevity", 2.0),
        ("length_2", 0.5),
        ("length_3", 0.25),
    ]
    assert score(rewards, ["p"], ["abcd"], {}).total.tolist() == [4.0 - 8.0 + 2.0 + 1.0]


def test_a_suffix_never_meets_a_real_name():
    def length_2(completions):
        return [0.0]

    assert [reward.name for reward in load_rewards([length_2, length, length])] == ["length_2", "length", "length_3"]


def test_options_reach_the_reward(models):
    spec = "nli:models/t5?template=flan&premise_prefix=summarize: &negative=no,it&max_length=200&output=log_prob"
    (reward,) = load_rewards(spec)
    direct = NLIReward.from_pretrained(
        "models/t5", template="flan", premise_prefix="summarize: ", negative=("no", "it"), output="log_prob"
    )
    prompts, completions = ["summarize: rain falls", "summarize: a dog"], ["it is wet", "a cat"]
    assert reward.function(prompts, completions) == pytest.approx(direct(prompts, completions), abs=1e-6)
    assert reward.function._limit == 200
    (other,) = load_rewards("nli:models/t5?template=%7Bpremise%7D%26{hypothesis}+&premise_prefix=summarize:%20")
    assert (other.function._template, other.function.premise_prefix) == ("{premise}&{hypothesis}+", "summarize: ")
    (classifier,) = load_rewards("models/rm?truncate=left&append_eos=false&batch_size=2&batch_tokens=99")
    reward = classifier.function
    assert (reward.truncate, reward._eos_id, reward.batch_size, reward.batch_tokens) == ("left", None, 2, 99)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nli:models/t5?templat=flan", "'templat=flan'.*'nli:'.*'template'"),
        ("similarity:models/mini?template=x", "template=x.*max_length, truncate, batch_size, batch_tokens"),
        ("models/rm?truncate", "'truncate'.*'classifier:'.*name=value"),
        ("models/rm?max_length=ten", "max_length=ten"),
        ("models/rm?append_eos=perhaps", "append_eos.*'perhaps'"),
        ("./models/absent", r" /.*/models/absent"),
        ("models/nli", "2 labels.*nli:models/nli"),
        ("nil:models/t5", "'nil:models/t5'.*'nli:'"),
        ("rewards.py", r"'rewards\.py:function'"),
        ("os.path.join", r"^reward 'os\.path\.join' is not a model\..*'os\.path:join'"),
        ("absent_library.rewards.length", r"hub.*'absent_library\.rewards:length'"),
        ("accuracy_reward", r"hub.*'module:accuracy_reward'"),
        (3.0, r"3\.0 \(float\)"),
        ([], "no reward"),
    ],
)
def test_bad_specs(models, spec, message):
    with pytest.raises(ConfigError, match=message):
        load_rewards(spec)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"weights.*\b1\b.*\b2\b"),
        ([1.0, float("nan")], "'length_2'.*weight.*nan"),
        ([1.0, "2"], "'length_2'.*weight.*'2'"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(ConfigError, match=message):
        load_rewards([length, length], weights)


def test_a_module_needs_its_tokenizer_and_goes_to_the_device(models):
    tokenizer = bert_tokenizer()
    model = bert_classifier(tokenizer)
    with pytest.raises(ConfigError, match=r"BertForSequenceClassification.*processing_classes"):
        load_rewards(model)
    (reward,) = load_rewards(model, processing_classes=tokenizer, device="cpu")
    assert reward.name == "BertForSequenceClassification"
    assert reward.function.tokenizer is tokenizer
    (loaded,) = load_rewards("models/rm")
    expected = reward.function(["rain"], ["in the sea"])
    assert loaded.function(["rain"], ["in the sea"]) == pytest.approx(expected, abs=1e-6)
    trained = AutoModelForSequenceClassification.from_pretrained("models/rm")
    Path("models/rm/reward.json").write_text('{"prompt_format": "plain"}')
    tokenizer.chat_template = "{{ messages }}"
    assert load_rewards(trained, processing_classes=tokenizer)[0].function.prompt_format == "plain"
    assert load_rewards(model, processing_classes=tokenizer)[0].function.prompt_format == "chat"
    assert load_rewards(model, processing_classes=tokenizer, device="meta")[0].function.model.device.type == "meta"
    with pytest.raises(ConfigError, match=r"reward_processing_classes: 'models/rm' is a name"):
        load_rewards(model, processing_classes="models/rm")
    with pytest.raises(ConfigError, match=r"Linear.*config"):
        load_rewards(nn.Linear(1, 1), processing_classes=tokenizer)


def test_a_given_tokenizer_replaces_the_models_own_and_is_never_ignored(models):
    tokenizer = bert_tokenizer(max_length=7)
    rewards = load_rewards(["models/rm", length], processing_classes=[tokenizer, None])
    assert rewards[0].function._limit == 7
    with pytest.raises(ConfigError, match=r"'length'.*function.*None"):
        load_rewards(length, processing_classes=tokenizer)
    with pytest.raises(ConfigError, match=r"processing_classes.*\b1\b.*\b2\b"):
        load_rewards(["models/rm", length], processing_classes=tokenizer)


def test_dtype_of_loaded_models(models):
    (reward,) = load_rewards("similarity:models/mini", dtype=torch.bfloat16)
    assert reward.function.model.dtype is torch.bfloat16
    assert reward.function(["rain"], ["sea"])[0] == pytest.approx(
        load_rewards("similarity:models/mini")[0].function(["rain"], ["sea"])[0], abs=0.05
    )


def test_servers_have_limits_of_their_own_written_or_as_objects():
    """Their requests have; a call of one may take as long as its faults are ridden out."""
    url = "http://127.0.0.1:1"
    specs = [f"judge:{url}/v1?model=m&cache=off", f"{url}/score", JudgeReward(url, "m", cache="off"), HTTPReward(url)]
    assert [reward.timeout for reward in load_rewards(specs, timeout=7.0)] == [None] * 4
    assert load_rewards(length, timeout=7.0)[0].timeout == 7.0


@pytest.mark.parametrize("spec", ["judge:http://127.0.0.1:1/v1?model=m&cache=off", "http://127.0.0.1:1/score"])
def test_a_server_has_no_use_for_a_processing_class(spec):
    with pytest.raises(ConfigError, match="is a server, which does not use a processing class"):
        load_rewards(spec, processing_classes=bert_tokenizer())


def test_two_judges_of_one_model_have_their_own_agreement(tmp_path):
    (tmp_path / "safe.txt").write_text("Which is safer?")
    with judging(by_length) as server:
        specs = [
            f"judge:{server.url}?model=small&cache=off&rounds=2{more}" for more in ("", f"&prompt={tmp_path}/safe.txt")
        ]
        found = score(load_rewards(specs), ["p", "p", "p"], ["a", "bbb", "cc"], groups=[0, 0, 0])
    assert found.metrics == {"judges/small/agreement": 1.0, "judges/small_2/agreement": 1.0}
