"""What a training method is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from afd_fast.teachers.dataset import Shard
from afd_fast.training.run import Metrics, Run


@dataclass(frozen=True)
class Method:
    """One iteration over a run's shards, which leaves schedule, step count and averaging over ranks to the loop.

    defaults: keys of the configuration that `afd-fast compare` sets for the method. lr_scale: its learning rate there,
    in units of AFD's, the best of those tried on the embedded task (docs/baselines.md).
    """

    name: str
    iteration: Callable[[Run, Sequence[Shard]], Metrics]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    lr_scale: float = 1.0
    uses_discriminator: bool = True
