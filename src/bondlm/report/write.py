"""Write the page of run folders, its figures and its numbers to disk."""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bondlm.errors import ConfigError, out_of_space
from bondlm.report import numbers, tables
from bondlm.report.read import Run, read_runs
from bondlm.report.safe import visible
from bondlm.report.samples import samples_block
from bondlm.runs.folder import ENVIRONMENT_FILE, EVAL_FILE, write_whole
from bondlm.runs.manifest import MANIFEST_FILE
from bondlm.runs.worth import at_least

PAGE_FILE, FIGURES_FOLDER = "report.html", "figures"
RUN_FILES = (EVAL_FILE, ENVIRONMENT_FILE, MANIFEST_FILE)
_PAGE = Path(__file__).parent / "page"


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write one HTML page about run folders, with its figures and numbers next to it; returns the page's path.

    Args:
        folders: run folders with an eval.json. The details are about the first; the others are compared with it.
        output: the path of the page; None is report.html in the first folder. The numbers get the same name with
            `.json`. The figures (SVG and PNG) go to the folder `figures` next to it (`NAME-figures` if the page has
            another name, NAME.html).

    Raises:
        ConfigError: there is no folder or evaluation, a package is missing, or the output cannot be written.
        OSError: the disk is full.
        DataError: a file of a run folder that is not what it should be.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"a report needs {error.name}: run pip install 'bondlm[report]'") from error
    from bondlm.report.draw import draw_figures

    runs = read_runs(folders)
    page = output or folders[0] / PAGE_FILE
    if page.is_dir() or not page.parent.is_dir():
        raise ConfigError(f"output={str(page)!r} is not a file in a folder that exists: name the page to write")
    if page.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"output={str(page)!r}: a page is an HTML file, let its name end in .html")
    figures = page.parent / (FIGURES_FOLDER if page.name == PAGE_FILE else f"{page.stem}-{FIGURES_FOLDER}")
    numbers_file = page.with_suffix(".json")
    _refuse_others_file(numbers_file, page)
    found = numbers.report_numbers(runs, version("bondlm"))
    try:
        drawn = draw_figures(runs, figures)
        write_whole(numbers_file, json.dumps(found, indent=2, allow_nan=False) + "\n")
        write_whole(page, render(runs, drawn, version("bondlm")))
    except OSError as error:
        if out_of_space(error):
            raise
        raise ConfigError(
            f"{str(error.filename)!r} cannot be written ({error.strerror}): choose another place with --output"
        ) from error
    return page


def _refuse_others_file(path: Path, page: Path) -> None:
    """Refuse a page name whose numbers would overwrite another file of a run folder."""
    taken = path.name in RUN_FILES
    if path.exists() and not taken:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = None
        taken = not (isinstance(content, dict) and {"bondlm", "runs"} <= set(content))
    if taken:
        raise ConfigError(
            f"output={str(page)!r}: the page's numbers would be {str(path)!r}, which is another file's name: choose "
            "another name for the page"
        )


def render(runs: Sequence[Run], drawn: Sequence[Any], bondlm_version: str) -> str:
    """Return the page's HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": numbers.number,
        "percent": numbers.percent,
        "estimate": numbers.estimate,
        "visible": lambda text: visible(str(text)),
    }
    script = (_PAGE / "report.js").read_text(encoding="utf-8")
    samples, note = samples_block(runs)
    return environment.get_template("report.html").render(
        runs=runs,
        headlines=[numbers.headline(run.result) for run in runs],
        warnings=tables.warnings(runs),
        ratios=[numbers.kl_ratio(run.result) for run in runs],
        at_least=at_least(runs[0].result),
        untouched_reward=numbers.untouched_reward(runs[0].result),
        tables=tables.tables(runs),
        figures=[figure for figure in drawn if not figure.training],
        training=[figure for figure in drawn if figure.training],
        svg={figure.name: Markup(figure.svg) for figure in drawn},  # noqa: S704 (matplotlib escapes what it writes)
        style=Markup((_PAGE / "report.css").read_text(encoding="utf-8")),  # noqa: S704 (the package's own file)
        script=Markup(script),  # noqa: S704 (the package's own file)
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        samples=Markup(samples),  # noqa: S704 (`script_json` leaves no < > & in it)
        samples_note=note,
        has_samples=any(run.samples for run in runs),
        version=bondlm_version,
    )
