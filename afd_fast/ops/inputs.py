"""The arguments of every nft_loss operator.

Legend: B samples, T packed rows, F frames, w the working dtype (float32, float64 for float64).
"""

from typing import NamedTuple

from afd_kernels.layout import Source
from torch import Tensor

from afd_fast.reference.recipes import recipe_from_key


class Inputs(NamedTuple):
    """In the schema's order."""

    v: Tensor  # [B, ...] or packed [T, ...]
    x0: Tensor
    r: Tensor  # [B]
    t: Tensor  # [B, F], w
    noise: Tensor | None  # exactly one of noise, seed, x_t; none with space="clean"
    seed: int | None
    x_t: Tensor | None
    v_old: Tensor | None
    v_ref: Tensor | None
    sigma: Tensor | None  # [B, F]; None is t
    sample_mask: Tensor | None
    ref_mask: Tensor | None
    element_mask: Tensor | None  # like v: bool, or weights
    each: Tensor | None  # like v, w: an r per element, then r itself is not read
    policy_weight: Tensor | None  # [B]
    prior_weight: Tensor | None
    cu_seqlens: Tensor | None
    inner: int  # element n of a sample belongs to frame (n // inner) % F
    recipe: str  # NFTRecipe.key
    stats: bool

    @property
    def source(self) -> Source:
        """Where the noised state comes from."""
        if recipe_from_key(self.recipe).space == "clean":
            return Source.CLEAN
        if self.x_t is not None:
            return Source.X_T
        return Source.SEED if self.noise is None else Source.NOISE


SCHEMA = (
    "Tensor v, Tensor x0, Tensor r, Tensor t, Tensor? noise, int? seed, Tensor? x_t, Tensor? v_old, Tensor? v_ref, "
    "Tensor? sigma, Tensor? sample_mask, Tensor? ref_mask, Tensor? element_mask, Tensor? each, Tensor? policy_weight, "
    "Tensor? prior_weight, Tensor? cu_seqlens, SymInt inner, str recipe, bool stats"
)
