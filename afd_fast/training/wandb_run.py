"""A run's curves and videos at Weights & Biases, for `logger=wandb`; with WANDB_MODE=offline, in the run's folder alone."""

import io
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from afd_fast.errors import ConfigError, extra
from afd_fast.students.files import first_line
from afd_fast.video_io import gif

REMEDY = "run `wandb login`, or set WANDB_MODE=offline and `wandb sync` the folder later"


def check_wandb() -> None:
    """MissingExtra where the package is not installed, ConfigError where it has no account to send to. Nothing is sent."""
    with extra("wandb"):
        import wandb

    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
        raise ConfigError(f"logger=wandb has no API key: {REMEDY}")


class WandbRun:
    """The call surface of `EventFile`. A run that is continued goes on under its id, which the run's folder keeps."""

    def __init__(self, out: Path, config: Mapping[str, Any]):
        with extra("wandb"):
            import wandb

        self._wandb = wandb
        mark = out / "wandb-id.txt"
        if not mark.exists():
            mark.write_text(secrets.token_hex(4))
        settings = wandb.Settings(silent=True, console="off")
        try:
            self._run: Any = wandb.init(
                project="afd_fast", name=config["name"], id=mark.read_text().strip(), resume="allow", dir=str(out),
                config=dict(config), settings=settings,
            )  # fmt: skip
        except (wandb.Error, OSError) as error:
            raise ConfigError(f"logger=wandb: {first_line(error)}: {REMEDY}") from error

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Values by tag."""
        self._run.log(dict(values), step=step)

    def video(self, tag: str, video: Tensor, fps: float, step: int) -> None:
        """A video [3, F, H, W], in [0, 1] or uint8."""
        self._run.log({tag: self._wandb.Video(io.BytesIO(gif(video, fps)), format="gif")}, step=step)

    def close(self) -> None:
        self._run.finish()
