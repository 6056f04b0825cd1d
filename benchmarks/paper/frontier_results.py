"""The results file of the frontier's queue: rows of several processes and machines, and of runs of several sizes."""

import json
from typing import Any

# Of rows that do not name their size.
SIZE = {"steps": 480, "completions_a_step": 192, "length_at_most": 20, "sft_steps": 500, "held_out": 200}


def size_of(args: Any) -> dict[str, int]:
    """What makes two runs of the same name different runs; part of every row."""
    return {
        "steps": args.steps,
        "completions_a_step": args.completions,
        "length_at_most": args.length,
        "sft_steps": args.sft_steps,
        "held_out": args.held_out,
    }


def read_rows(args: Any) -> list[dict[str, Any]]:
    """All rows; a line that was cut while it was written or copied is left out, so its run is made again."""
    rows = []
    for line in args.results.read_bytes().splitlines() if args.results.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:  # also a character that was cut
            continue
    return rows


def done_runs(args: Any) -> set[tuple[str, int]]:
    """Runs of this size whose last row is in the results. Rows that do not name a size have `SIZE`."""
    size = size_of(args)
    return {
        (row["run"], row["seed"])
        for row in read_rows(args)
        if row["is_last"] and all(row.get(name, SIZE[name]) == value for name, value in size.items())
    }


def append(args: Any, row: dict[str, Any]) -> None:
    """Append one line in a single write, since several processes share the file."""
    from bondlm.runs.folder import plain

    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("a+b", buffering=0) as file:
        end = file.seek(0, 2)
        file.seek(max(end - 1, 0))
        is_cut = file.read(1) not in (b"", b"\n")
        file.write((b"\n" if is_cut else b"") + (json.dumps(plain(row)) + "\n").encode())
