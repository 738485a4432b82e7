"""One call in the place of a public trainer's loss block: `loss, terms = afd_fast.dropin.<trainer>(...)`.

Tensors come in the trainer's shapes and order, settings under its names; `terms` holds what its file logs from this block.
docs/dropin/ has a page per trainer: what to delete, what to write, which numbers change.
"""

from afd_fast.dropin.terms import floats
from afd_fast.dropin.trainers import (
    astrolabe,
    cosmos_rl,
    diffusionnft,
    edit_r1,
    fastvideo,
    flow_factory,
    gardo,
    rlinf,
    unirl,
    verl_omni,
)

__all__ = ["astrolabe", "cosmos_rl", "diffusionnft", "edit_r1", "fastvideo", "floats", "flow_factory", "gardo", "rlinf",
           "unirl", "verl_omni"]  # fmt: skip
