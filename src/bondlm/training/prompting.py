"""How a run's prompts are rendered: according to its settings and, if it continues, its folder."""

from datetime import datetime
from pathlib import Path
from typing import Any

from bondlm.data.rendering import Rendering
from bondlm.runs.prompting import read_prompting, write_prompting
from bondlm.training.processes import World, decided_by_main


def rendering_of_run(args: Any, *, drawn: datetime | None = None) -> Rendering:
    """The rendering that the settings ask for, with the start time of the folder's run.

    For a new run this is now, or the time when the samples that it learns from were `drawn`.
    """
    folder = Path(str(args.output_dir))

    def decide() -> datetime:
        before = read_prompting(folder)
        return before["now"] if before else drawn or datetime.today()

    now = decided_by_main(decide, World.of(args), wait_s=args.ddp_timeout)
    return Rendering(prompt_format=args.prompt_format, variables=args.chat_template_kwargs or {}, now=now)


def note_rendering(folder: Path, rendering: Rendering, *, replace: bool = True) -> None:
    """Store the rendering in the run folder; with `replace=False` only if it has none yet."""
    if rendering.now is None or (not replace and read_prompting(folder) is not None):
        return
    write_prompting(folder, rendering.prompt_format, rendering.variables, rendering.now)
