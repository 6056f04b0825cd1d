"""Pairs (description, synopsis) from the package index of Debian 12, fetched by apt into a scratch folder.

The system's own apt lists stay as they are, and nothing is installed. The texts are written by Debian's maintainers and
stand under the licence of each package (its debian/copyright file): use them, but do not ship them with your code.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

MIRROR = "http://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
APT_HELPER = Path("/usr/lib/apt/apt-helper")
# Parts of a package (headers, debug symbols, translations) repeat the parent's text; empty packages say nothing.
PART = re.compile(r"-(dev|dbg|dbgsym|doc|docs|data|l10n|i18n|locales?|common|examples|headers|tests?|hyphen.*|help.*)$")
EMPTY = re.compile(
    r"transitional|meta-?package|dummy|virtual package|empty package|debug(ging)? symbols", re.IGNORECASE
)
WORDS = range(15, 41)  # words of a description
SPLITS = {"heldout": 200, "train": 2000}  # "sft" takes the rest

SOURCE = """Types: deb
URIs: {mirror}
Suites: bookworm
Components: main
Targets: Translations
Languages: en
Signed-By: {keyring}
"""


def fetch_index(mirror: str = MIRROR) -> str:
    """The English descriptions of Debian bookworm as text (12 MB to download), read with apt in a scratch folder."""
    if shutil.which("apt-get") is None or not APT_HELPER.exists() or not KEYRING.exists():
        sys.exit(
            "This step reads Debian's package index with apt, and apt or the Debian keyring is not on this machine.\n"
            f"Looked for: apt-get, {APT_HELPER}, {KEYRING} (on Ubuntu: apt install debian-archive-keyring).\n"
            "Elsewhere, write data/debian/{sft,train,heldout}.jsonl yourself, one row a line:\n"
            '{"prompt": "summarize: ...", "reference": "..."}'
        )
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        root.chmod(0o755)  # apt downloads as its own user
        (root / "lists" / "partial").mkdir(parents=True)
        (root / "debian.sources").write_text(SOURCE.format(mirror=mirror, keyring=KEYRING))
        options = {
            "Dir::Etc::sourcelist": root / "debian.sources",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State::lists": root / "lists",
            "Dir::Cache": root,
            "Acquire::Languages": "en",
        }
        flags = [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
        done = subprocess.run(["apt-get", "-qq", "update", *flags], capture_output=True, text=True, check=False)
        found = sorted((root / "lists").glob("*Translation-en*"))
        if done.returncode or not found:
            sys.exit(f"apt could not fetch Debian's index from {mirror}:\n{done.stderr}{done.stdout}")
        return subprocess.run(
            [str(APT_HELPER), "cat-file", str(found[0])], capture_output=True, text=True, check=True
        ).stdout


def parse(index: str) -> Iterator[tuple[str, str, str]]:
    """Yield (package, synopsis, first paragraph of the description)."""
    for stanza in index.split("\n\n"):
        head = re.search(r"^Package: (\S+)$", stanza, re.MULTILINE)
        body = re.search(r"^Description-en: (.*)\n((?: .*(?:\n|$))*)", stanza, re.MULTILINE)
        if head and body:
            first = body.group(2).split("\n .\n")[0]
            yield head.group(1), body.group(1).strip(), " ".join(first.split())


def keep(package: str, synopsis: str, description: str) -> bool:
    """Is this a real description with a real synopsis?"""
    return (
        not PART.search(package)
        and not EMPTY.search(synopsis)
        and len(description.split()) in WORDS
        and len(synopsis.split()) >= 3
    )


def families(synopsis: str, description: str) -> set[str]:
    """Keys of a pair, without case and versions; two pairs with a common key are near duplicates (gcc-11 and gcc-12).

    Besides the two whole texts: the first eight and the last six words of the description, because many packages share
    a template ("This is the ... dictionary from the FreeDict project ...").
    """
    plain = [re.sub(r"[^a-z]+", " ", text.lower()).strip() for text in (synopsis, description)]
    words = plain[1].split()
    return {*plain, "head " + " ".join(words[:8]), "tail " + " ".join(words[-6:])}


def select(index: str) -> list[dict[str, str]]:
    """All pairs that pass the filter, no near duplicates, in an order that depends on the texts alone."""
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    ordered = sorted(parse(index), key=lambda item: (hashlib.sha256(item[2].encode()).hexdigest(), item))
    for package, synopsis, description in ordered:
        keys = families(synopsis, description)
        if keep(package, synopsis, description) and not keys & seen:
            seen |= keys
            rows.append({"prompt": f"summarize: {description}", "reference": synopsis})
    return rows


def write_splits(rows: list[dict[str, str]], folder: Path) -> None:
    """Write heldout.jsonl, train.jsonl and sft.jsonl; the folder appears whole or not at all."""
    needed = sum(SPLITS.values())
    if len(rows) < 2 * needed:
        sys.exit(f"Only {len(rows)} pairs passed the filter; at least {2 * needed} are needed. Is the mirror complete?")
    temporary = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
    temporary.mkdir(parents=True)
    start = 0
    for name, size in (*SPLITS.items(), ("sft", len(rows) - needed)):
        part = rows[start : start + size]
        start += size
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (temporary / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(part)} pairs")
    temporary.rename(folder)
