"""`bondlm report RUN [RUN...]`: one HTML page about one or several runs, with its figures and numbers next to it."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from bondlm.cli.console import make_console, say


def write_page(folder: Path, console: Console) -> None:
    """Write the page of a run folder that was just evaluated, or print a line if a package for it is missing."""
    if find_spec("jinja2") is None or find_spec("matplotlib") is None:
        console.print("no report.html: pip install 'bondlm[report]', then bondlm report")
        return
    from bondlm.report import write_report

    write_report([folder])


def run(options: dict[str, Any]) -> int:
    """Write the page; options are `runs` (a folder, or a list of them) and `output`."""
    console = make_console()
    runs = options.get("runs") or []
    folders = [Path(str(name)) for name in (runs if isinstance(runs, list) else [runs])]
    output = Path(str(options["output"])) if options.get("output") else None
    with console.status("drawing figures and writing the page"):
        from bondlm.report import write_report

        page = write_report(folders, output)
    say(console, f"report: {page} ({page.stat().st_size / 1e6:.1f} MB)")
    return 0
