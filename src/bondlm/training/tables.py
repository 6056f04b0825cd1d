"""Send the samples of a logged step as a table to the run's loggers: wandb, trackio, TensorBoard."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from bondlm.training.callbacks import RunFolderCallback

NAME = "completions"  # TRL's


class TablesCallback(TrainerCallback):
    """Also sends the rows of samples.jsonl to the loggers of `report_to`, if there are any."""

    def __init__(self, run_folder: RunFolderCallback, callback_handler: Any) -> None:
        """`callback_handler` has the loggers; more may be added later."""
        self._run_folder, self._handler = run_folder, callback_handler

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Send one table per logged step."""
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        samples = self._run_folder.samples()
        columns, rows = table_of(samples, state.global_step)
        if not rows:
            return
        if "wandb" in args.report_to and (wandb := import_module("wandb")).run is not None:
            table = wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
            wandb.log({NAME: table, "train/global_step": state.global_step})
        if "trackio" in args.report_to and (trackio := import_module("trackio")).context_vars.current_run.get():
            trackio.log({NAME: _trackio_table(columns, rows), "train/global_step": state.global_step})
        for callback in self._handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text(NAME, as_markdown(columns, rows), state.global_step)


def table_of(samples: Sequence[Mapping[str, Any]], step: int) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows, one row per completion: step, prompt, role, text, reward, and what `log_extra` added."""
    extra = sorted({n for s in samples for who in ("policy", "anchor") for c in s[who] for n in c.get("extra", {})})
    rows = [
        [step, _text(s["prompt"]), who, c["text"], c["reward"], *(c.get("extra", {}).get(name) for name in extra)]
        for s in samples
        for who in ("policy", "anchor")
        for c in s[who]
    ]
    return ["step", "prompt", "from", "completion", "reward", *extra], rows


def as_markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table for TensorBoard, with bars and line ends in cells escaped."""
    lines = [list(columns), ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _text(prompt: Any) -> str:
    """A prompt as one text; in a conversation each message follows its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)


def _trackio_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    frame = import_module("pandas").DataFrame(rows, columns=list(columns), dtype=object)  # None and 2 are not converted
    return import_module("trackio").Table(dataframe=frame)
