"""What a run writes while it trains: a row per iteration and per evaluation, notes, TensorBoard and, on request, Weights & Biases. Only rank 0 writes."""

import math
from pathlib import Path

from torch import Tensor

from afd_fast.config import TrainConfig, to_dict
from afd_fast.errors import extra
from afd_fast.files.durable import sync
from afd_fast.judges import Scores
from afd_fast.training.events import EventFile
from afd_fast.training.run import Metrics
from afd_fast.training.run_folder import append, read_rows, rewind, write_rows
from afd_fast.training.wandb_run import WandbRun

with extra("train"):
    from rich.console import Console
    from rich.markup import escape


class Journal:
    """The files of one run in its folder. On ranks other than 0 every method does nothing."""

    def __init__(self, out: Path, console: Console, config: TrainConfig, *, lead: bool):
        self.console, self.config, self.lead, self.out = console, config, lead, out
        self.metrics, self.evaluations, self.notes = (
            out / f"{name}.jsonl" for name in ("metrics", "evaluations", "notes")
        )
        self._events: list[EventFile | WandbRun] = []

    def open(self, step: int) -> None:
        """Start after iteration `step`: later rows are of an attempt that was stopped."""
        if self.lead:
            rewind(self.metrics, step)
            rewind(self.evaluations, step + bool(step))
            self._events = [EventFile(self.out / "tensorboard", step)]
            if self.config.logger == "wandb":
                self._events.append(WandbRun(self.out, to_dict(self.config)))

    def close(self) -> None:
        for events in self._events:
            events.close()

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
        if self.lead:
            append(self.metrics, row)
        for events in self._events:
            events.scalars({k if "/" in k else f"train/{k}": v for k, v in metrics.items()}, step + 1)
        return row

    def evaluation(self, row: Scores, by_prompt: list[float], sample: Tensor | None, fps: float) -> None:
        """Keep the judge's scores, in the order of their steps, the first one by prompt, and a video [3, F, H, W]."""
        if not self.lead:
            return
        step = int(row["step"])
        rows = [*read_rows(self.evaluations), row | {"by_prompt": by_prompt}]
        write_rows(self.evaluations, sorted(rows, key=lambda row: row["step"]))
        finite = {f"held_out/{k}": v for k, v in row.items() if k != "step" and math.isfinite(v)}
        for events in self._events:
            events.scalars(finite, step)
            if sample is not None:
                events.video("held_out/sample", sample, fps, step)
