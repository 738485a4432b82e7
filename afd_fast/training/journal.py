"""What a run writes while it trains: a row per iteration and per evaluation, notes, TensorBoard. Only rank 0 writes."""

import math
from pathlib import Path

from torch import Tensor

from afd_fast.errors import extra
from afd_fast.files.durable import sync
from afd_fast.judges import Scores
from afd_fast.training.events import EventFile
from afd_fast.training.run import Metrics
from afd_fast.training.run_folder import append, read_rows, rewind, write_rows

with extra("train"):
    from rich.console import Console
    from rich.markup import escape


class Journal:
    """The files of one run in its folder. On ranks other than 0 every method does nothing."""

    def __init__(self, out: Path, console: Console, *, lead: bool):
        self.console, self.lead = console, lead
        self.metrics, self.evaluations, self.notes = (
            out / f"{name}.jsonl" for name in ("metrics", "evaluations", "notes")
        )
        self._tensorboard = out / "tensorboard"
        self._events: EventFile | None = None

    def open(self, step: int) -> None:
        """Start after iteration `step`: later rows are of an attempt that was stopped."""
        if self.lead:
            rewind(self.metrics, step)
            rewind(self.evaluations, step + bool(step))
            self._events = EventFile(self._tensorboard, step)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()

    def settle(self) -> None:
        """Have every row on the disk, so that it survives whatever the checkpoint survives that is written next."""
        if self.lead:
            sync(self.metrics)

    def note(self, step: int, text: str) -> None:
        """Log what differs from a run left alone, and keep it for the report."""
        if self.lead:
            self.console.print(f"[yellow]note:[/] {escape(text)}")
            append(self.notes, {"step": step, "text": text})
            sync(self.notes)

    def iteration(self, step: int, elapsed: float, metrics: Metrics) -> Metrics:
        """Keep the metrics of the iteration after `step` others; returns their row."""
        row = {"step": step, "elapsed": elapsed, **metrics}
        if self._events is not None:
            append(self.metrics, row)
            self._events.scalars({k if "/" in k else f"train/{k}": v for k, v in metrics.items()}, step + 1)
        return row

    def evaluation(self, row: Scores, sample: Tensor | None, fps: float) -> None:
        """Keep the judge's scores, in the order of their steps, and a video [3, F, H, W]."""
        if self._events is None:
            return
        step = int(row["step"])
        write_rows(self.evaluations, sorted([*read_rows(self.evaluations), row], key=lambda row: row["step"]))
        finite = {f"held_out/{k}": v for k, v in row.items() if k != "step" and math.isfinite(v)}
        self._events.scalars(finite, step)
        if sample is not None:
            self._events.video("held_out/sample", sample, fps, step)
