"""Rewards for the everyday example: small, plain scorers that anyone can check by reading the answers.

Signature as in TRL: ``f(prompts, completions, **columns) -> list[float]``, conversational. A completion is
``[{"role": "assistant", "content": text}]``; the column ``truncated`` (one bool per completion) tells that the answer
hit the length limit without an end-of-sequence token.

What these rewards are NOT: no preference model, no fact checker, no safety filter. "Goldfish live in trees, enjoy!"
can score well. None of them looks at the topic either: add ``similarity:models/all-minilm-l6-v2`` for that, or the best
answer to every question is the same cheerful sentence. They are continuous where they can be, because BOND learns from
comparisons, and a tie teaches nothing.

Weights, chosen by reading the best of 8 answers to training prompts: similarity 1.5, complete 0.5, not_repetitive 1.0,
friendly 0.25. Almost every answer has not_repetitive near 1, so its large weight costs nothing; it is there to stop an
echo of the question, which has similarity 1.
"""

import re
from functools import cache
from typing import Any

Message = dict[str, str]
# A sentence end is punctuation after a letter (so "1." in a list is none), perhaps closed by quotes or brackets.
SENTENCE_END = re.compile(r"[^\W\d_][\"')\]*]*[.!?]+[\"')\]*”’]*(?=\s|$)")
MIN_WORDS = 6  # an answer of fewer words is not counted as a whole one: "Sure!" is a reply, not an answer
PARTIAL = 0.3  # credit of a cut answer that consists of whole sentences, up to the cut
FRIENDLY_ENOUGH = 0.6  # VADER compound score of about two kind words; more of them must not pay
YOU = re.compile(r"\b(you|your|yours|yourself|you'll|you're|you've|you'd|let's)\b", re.IGNORECASE)


def complete(
    prompts: list[list[Message]], completions: list[list[Message]], truncated: list[bool], **columns: Any
) -> list[float]:
    """Does the answer end by itself, with a whole sentence, within the budget? In [0, 1].

    1.0: it ended by itself after sentence punctuation. Otherwise 0.3 times the share of words that lie in finished
    sentences, so a cut answer with one good sentence beats one that never gets to a full stop, and both lose to an
    answer that ends. Answers of fewer than six words are scaled down. It knows nothing about content.
    """
    return [_complete(_text(c), cut) for c, cut in zip(completions, truncated, strict=True)]


def not_repetitive(prompts: list[list[Message]], completions: list[list[Message]], **columns: Any) -> list[float]:
    """Does the answer say more than the question, and not the same thing twice? In [0, 1].

    The share of distinct word trigrams in the answer, times 1 - c^2, where c is the share of the question's trigrams
    that come back in it: a few words of the question are natural in an answer, the whole question is not. It does not
    see repetition in other words, and nonsense is never repetitive: it only guards the other scores against loops and
    against echoing the question, which a similarity score loves.
    """
    return [_novelty(_text(p[-1:]), _text(c)) for p, c in zip(prompts, completions, strict=True)]


def friendly(prompts: list[list[Message]], completions: list[list[Message]], **columns: Any) -> list[float]:
    """Is the tone kind, and does it speak to the reader? In [-1, 1].

    0.75 x VADER sentiment (Hutto and Gilbert 2014, a word list with rules), cut at +-0.6 so that gushing pays nothing
    extra, plus 0.25 where the answer says "you". A word list hears "kill the weeds" as unkind and irony as praise: it
    measures tone words, not kindness, so give it a small weight.
    """
    return [_tone(_text(c)) for c in completions]


def _text(messages: list[Message]) -> str:
    """The text of the last message, or an empty string."""
    return messages[-1]["content"].strip() if messages else ""


def _words(text: str) -> list[str]:
    """Lower-case words, without punctuation."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def _complete(text: str, truncated: bool) -> float:
    words = len(_words(text))
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    if not words or not ends:
        return 0.0
    whole = 1.0 if not truncated and ends[-1] == len(text) else PARTIAL * len(_words(text[: ends[-1]])) / words
    return whole * min(1.0, words / MIN_WORDS)


def _trigrams(words: list[str]) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + 3]) for i in range(len(words) - 2)]


def _novelty(question: str, answer: str) -> float:
    asked, said = _trigrams(_words(question)), _trigrams(_words(answer))
    if not said:
        return 0.0
    copied = len(set(asked) & set(said)) / len(set(asked)) if asked else 0.0
    return len(set(said)) / len(said) * (1.0 - copied**2)


def _tone(text: str) -> float:
    compound = _vader().polarity_scores(text)["compound"]
    tone = max(-1.0, min(1.0, compound / FRIENDLY_ENOUGH))
    return 0.75 * tone + 0.25 * bool(YOU.search(text))


@cache
def _vader() -> Any:
    """The sentiment word list, loaded once (`pip install vaderSentiment==3.3.2`)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
