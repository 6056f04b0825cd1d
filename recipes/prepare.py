"""Write the JSONL files of a recipe from a data set of the hub, as a small YAML file describes them.

    python recipes/prepare.py recipes/summarization/data.yaml
    python recipes/prepare.py recipes/dialogue/data.yaml --rows 200      # a look

Keys: `dataset` (hub name or a folder that `datasets.load_dataset` reads), `out` (folder), `splits` (file name ->
{split, rows, skip}), `max_words` (of a prompt; longer rows are left out), and one of
- `prompt`: a text with {column} in it; `columns`: column to write -> column of the data set; `completion_prefix`;
- `messages`: the column with a conversation, cut before the assistant's answer number `turns` (or its last one).
Files that are there are not made again.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

KEYS = {"dataset", "out", "splits", "max_words", "prompt", "columns", "completion_prefix", "messages", "turns"}
Row = dict[str, Any]


def as_text(row: Row, recipe: Row) -> Row:
    """A row with a text prompt and the columns that the recipe keeps."""
    names = recipe.get("columns", {})
    kept = {new: row[old] for new, old in names.items()}
    if "completion" in kept:
        kept["completion"] = recipe.get("completion_prefix", "") + kept["completion"].strip()
    return {"prompt": recipe["prompt"].format(**row)} | kept


def as_chat(row: Row, recipe: Row) -> Row | None:
    """The conversation up to an answer of the assistant, or None if it has none to a user's message."""
    messages = [{"role": m["role"], "content": m["content"]} for m in row[recipe["messages"]]]
    ends = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i and messages[i - 1]["role"] == "user"]
    if not ends:
        return None
    return {"prompt": messages[: ends[min(recipe.get("turns", 1), len(ends)) - 1]]}


def usable(row: Row | None, most: int) -> bool:
    """Has the row a prompt that is neither empty nor too long, and no empty answer?"""
    if row is None or not str(row.get("completion", "x")).strip():
        return False
    prompt = row["prompt"]
    texts = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]
    return all(text.strip() for text in texts) and sum(len(text.split()) for text in texts) <= most


def rows_of(source: Iterable[Row], recipe: Row) -> Iterator[Row]:
    """Usable rows, no prompt twice."""
    seen = set()
    make = as_chat if "messages" in recipe else as_text
    for row in source:
        new = make(row, recipe)
        key = json.dumps(new and new["prompt"])
        if new is not None and usable(new, recipe.get("max_words", 10**9)) and key not in seen:
            seen.add(key)
            yield new


def prepare(recipe: Row, load: Callable[[str, str], Iterable[Row]], rows: int | None = None) -> None:
    """Write each file that is not there yet, whole or not at all."""
    wrong = set(recipe) - KEYS
    if wrong or ("prompt" in recipe) == ("messages" in recipe):
        sys.exit(f"The recipe needs `prompt` or `messages`, and knows {', '.join(sorted(KEYS))}; not {sorted(wrong)}")
    folder = Path(recipe["out"])
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in recipe["splits"].items():
        path = folder / f"{name}.jsonl"
        if path.exists():
            print(f"{path}: already there")
            continue
        try:
            source = load(recipe["dataset"], part["split"])
            start, most = part.get("skip", 0), min(part["rows"], rows or part["rows"])
            found = list(islice(rows_of(source, recipe), start, start + most))
        except KeyError as error:
            sys.exit(f"{recipe['dataset']}, split {part['split']}: no column {error}. Correct the recipe.")
        except (OSError, ValueError) as error:
            sys.exit(f"{recipe['dataset']} cannot be read: {error}\nIs there a network, and `pip install datasets`?")
        if not found:
            sys.exit(f"{recipe['dataset']}, split {part['split']}: no usable row behind the first {start}")
        partial = path.with_name(f"{path.name}.tmp{os.getpid()}")
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
        partial.replace(path)
        print(f"{path}: {len(found)} rows")


def from_hub(name: str, split: str) -> Iterable[Row]:
    from datasets import load_dataset

    return load_dataset(name, split=split)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--rows", type=int, help="most rows of a file")
    args = parser.parse_args()
    if not args.recipe.is_file():
        sys.exit(f"{args.recipe}: no such file")
    prepare(yaml.safe_load(args.recipe.read_text(encoding="utf-8")), from_hub, args.rows)


if __name__ == "__main__":
    main()
