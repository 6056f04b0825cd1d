"""Hooks of MkDocs: the README is the first page, reference pages come from the code, and links to files of the
repository that are no pages of docs/ lead to copies of them, so that the site is whole without a network.
"""

import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import reference
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
HOME = "README.md"
ALSO = ("CONTRIBUTING.md", "CHANGELOG.md", "examples/everyday/README.md")  # pages of the menu
ASSETS = {".png", ".svg", ".jpg"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash", ".json": "json", ".jsonl": "json"}
LINK = re.compile(r"(?<!\\)\]\((?!\w+:|#|/)([^)\s]+)\)")


def on_files(files: Files, config: Mapping[str, Any]) -> Files:
    """Add the pages that do not lie in docs/."""
    pages = {page.src_uri: page.content_string for page in files.documentation_pages()}
    pages["index.md"] = (ROOT / HOME).read_text(encoding="utf-8")
    pages |= reference.pages()
    for path, text in _reached({_origin(uri): text for uri, text in pages.items()}):
        pages[_place(path)] = text
    known = set(files.src_uris)
    for uri, text in pages.items():
        if uri in known:
            continue
        path = ROOT / uri.removeprefix("source/")
        if path.suffix in ASSETS:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        else:
            files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Mapping[str, Any], files: Files) -> str:
    """Lead the links of a page, which are those of the repository, to pages of the site."""
    here = page.file.src_uri

    def lead(match: re.Match[str]) -> str:
        target, hash_sign, anchor = match[1].partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(_origin(here)), target))
        if not (ROOT / path).exists():
            return match[0]  # a dead link: MkDocs says so
        there = posixpath.relpath(_place(path), posixpath.dirname(here) or ".")
        return f"]({there}{hash_sign}{anchor})"

    return LINK.sub(lead, markdown)


def _origin(uri: str) -> str:
    """The path in the repository of a page of the site."""
    if uri == "index.md":
        return HOME
    return uri.removeprefix("source/") if uri.startswith("source/") else f"docs/{uri}"


def _place(path: str) -> str:
    """The page of the site that holds a path of the repository."""
    if path == HOME:
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    is_whole = path.endswith(".md") or Path(path).suffix in ASSETS
    return f"source/{path}" if is_whole else f"source/{path}.md"


def _reached(pages: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Path and text of each file outside of docs/ that a page links to, and that such a file links to."""
    seen, waiting = set(pages), [*pages.items()]
    for path in ALSO:
        seen.add(path)
        waiting.append((path, _text(path)))
        yield path, _text(path)
    while waiting:
        path, text = waiting.pop()
        for match in LINK.finditer(text):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[1].partition("#")[0]))
            if target in seen or target.startswith(("docs/", "..")) or not (ROOT / target).exists():
                continue
            seen.add(target)
            yield target, _text(target)
            if target.endswith(".md"):
                waiting.append((target, _text(target)))


def _text(path: str) -> str:
    full = ROOT / path
    if full.is_dir():
        names = sorted(each.name for each in full.iterdir() if each.suffix in {".py", ".yaml", ".md"})
        return f"# {path}\n\n" + "".join(f"- `{name}`\n" for name in names)
    if full.suffix in ASSETS:
        return ""
    text = full.read_text(encoding="utf-8")
    return text if path.endswith(".md") else f"# {full.name}\n\n`{path}`\n\n{_block(text, full.suffix)}"


def _block(text: str, suffix: str) -> str:
    return f"````{LANGUAGES.get(suffix, 'text')}\n{text.rstrip()}\n````\n"
