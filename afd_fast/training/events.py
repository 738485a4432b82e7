"""A TensorBoard event file, written where the call is: SummaryWriter's thread would print a traceback on a full disk."""

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from afd_fast.errors import extra
from afd_fast.video_io import gif

with extra("train"):
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter


class EventFile:
    """A new file in the folder. Of earlier files, TensorBoard then shows only steps below `step`."""

    def __init__(self, folder: Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1000}.{platform.node()}.{os.getpid()}"
        self._records = RecordWriter((folder / name).open("wb"))
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Values by tag."""
        shown = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(Event(step=step, summary=Summary(value=shown)))

    def video(self, tag: str, video: Tensor, fps: float, step: int) -> None:
        """A video [3, F, H, W], in [0, 1] or uint8."""
        image = Summary.Image(
            encoded_image_string=gif(video, fps), height=video.shape[2], width=video.shape[3], colorspace=3
        )
        self._add(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, image=image)])))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()

    def close(self) -> None:
        self._records.close()
