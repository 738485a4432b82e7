"""Recipes: the constants that make one published loss out of the formula in nft.py.

Sources and commits of the public trainers: docs/nft.md, CHANGELOG.md.
"""

import functools
import json
import numbers
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Literal, TypedDict

import torch
from typing_extensions import Unpack

from afd_fast.errors import check_fields

RecipeName = Literal[
    "afd", "astrolabe", "diffusionnft", "cosmos_rl", "fastvideo", "verl_omni", "flow_factory", "edit_r1", "gardo", "unirl"
]  # fmt: skip
Space = Literal["v", "x0", "clean"]  # errors of velocities, of x0 from velocities, of predictions of x0
RefSpace = Literal["v", "x0"]
Weighting = Literal["adaptive", "none"]
Scale = Literal["adv_clip", "none"]
Reduction = Literal["mean", "sum"]
RefWeight = Literal["r", "uniform"]
RefEmpty = Literal["all", "zero"]
Form = Literal["mse", "dpo"]
DriftLimit = Literal["norm", "ratio"]
DriftClip = Literal["project", "max"]
RefReduction = Literal["sample", "batch"]
AdvClip = float | tuple[float, float]  # c for (-c, c), or (low, high)


def clip_range(clip: AdvClip) -> tuple[float, float]:
    """(low, high) of a clip of advantages."""
    if isinstance(clip, numbers.Real):
        return -float(clip), float(clip)
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise ValueError(f"clip must be a number or (low, high), got {clip!r}")
    low, high = clip
    return low, high


@dataclass(frozen=True)
class NFTRecipe:
    """Which of the published losses. The fields are the constants of the formula in nft.py.

    name: of the loss, one of `RecipeName`.
    beta: interpolation between v_old and v.
    ref_coef: weight lambda of the prior.
    adv_clip: clip of the advantages, a number or (low, high).
    space: of the errors, "v" or "x0"; "clean" for networks that predict x0: v, v_old, v_ref are predictions of it, the
        errors are v - x0, the prior compares predictions, and no noise is needed.
    weighting: "adaptive" (W) or "none" (1).
    weight_floor: lower bound of W.
    divide_by_beta: whether d is beta or 1.
    scale: "adv_clip" multiplies the loss by the upper end of adv_clip, "none" by 1.
    sample_reduction: over the elements of a sample, "mean" or "sum".
    batch_reduction: over the samples, "mean" or "sum".
    ref_space: of the prior, "v" or "x0".
    ref_weight: rho is "r", or "uniform" (1).
    ref_empty: what an all-False ref_mask means, "all" samples or a "zero" prior.
    ref_reduction: the prior averages each sample and then the batch ("sample"), or every element of the "batch" at once,
        so that a sample counts by its elements.
    shared_weight: W- is W+ (adaptive weighting only).
    weight_grad: W is differentiated too (adaptive weighting only).
    form: "mse" is r E+ + (1 - r) E-, "dpo" softplus(dpo_beta (2r - 1) (E+ - E-) / 2), where E+- = s(e+-^2) / W+-.
    dpo_beta: sharpness of "dpo".
    drift_clip: limit of ||v - v_old|| per sample; None is no limit.
    drift_limit: whether drift_clip is that "norm", or its "ratio" to ||v_old||.
    drift_clip_by: how a sample beyond the limit is clipped. "project" scales v - v_old down to the limit, and the gradient
        goes through the scale; "max" takes the larger of its loss and the loss at the limit, which has no gradient.
    """

    name: str = "afd"
    beta: float = 0.1
    ref_coef: float = 1e-4
    adv_clip: AdvClip = 5.0
    space: Space = "v"
    weighting: Weighting = "none"
    weight_floor: float = 1e-5
    divide_by_beta: bool = False
    scale: Scale = "none"
    sample_reduction: Reduction = "sum"
    batch_reduction: Reduction = "sum"
    ref_space: RefSpace = "v"
    ref_weight: RefWeight = "r"
    ref_empty: RefEmpty = "zero"
    ref_reduction: RefReduction = "sample"
    shared_weight: bool = False
    weight_grad: bool = False
    form: Form = "mse"
    dpo_beta: float = 1.0
    drift_clip: float | None = None
    drift_limit: DriftLimit = "norm"
    drift_clip_by: DriftClip = "project"
    key: str = field(init=False, repr=False, compare=False)  # the recipe as text, which an operator's schema can carry

    def __post_init__(self) -> None:
        check_fields(self)
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}: at 0 the loss has no gradient")
        if self.ref_coef < 0 or self.weight_floor <= 0:
            raise ValueError(f"ref_coef >= 0 and weight_floor > 0 are needed, got {self.ref_coef}, {self.weight_floor}")
        if (self.shared_weight or self.weight_grad) and self.weighting != "adaptive":
            raise ValueError('shared_weight and weight_grad are about W: they need weighting="adaptive"')
        if self.dpo_beta <= 0 or (self.drift_clip is not None and self.drift_clip <= 0):
            raise ValueError(f"dpo_beta and drift_clip must be positive, got {self.dpo_beta} and {self.drift_clip}")
        if self.space == "clean" and self.ref_space != "v":
            raise ValueError('space="clean" takes ref_space="v": the prior compares predictions as they are')
        low, high = self.clip_range
        if not low < 0 < high:
            raise ValueError(f"adv_clip must span zero, got {self.adv_clip}")
        constants = {name: getattr(self, name) for name in _NAMES} | {"factor": self.factor}
        object.__setattr__(self, "key", json.dumps(constants))  # made here, so that a compiled graph only reads it

    @property
    def clip_range(self) -> tuple[float, float]:
        """(low, high) of the advantages."""
        return clip_range(self.adv_clip)

    @property
    def factor(self) -> float:
        """c / d."""
        return (self.clip_range[1] if self.scale == "adv_clip" else 1.0) / (self.beta if self.divide_by_beta else 1.0)


_NAMES = [f.name for f in fields(NFTRecipe) if f.init]


class RecipeFields(TypedDict, total=False):
    """The fields of `NFTRecipe` that `nft_recipe` replaces."""

    beta: float
    ref_coef: float
    adv_clip: AdvClip
    space: Space
    weighting: Weighting
    weight_floor: float
    divide_by_beta: bool
    scale: Scale
    sample_reduction: Reduction
    batch_reduction: Reduction
    ref_space: RefSpace
    ref_weight: RefWeight
    ref_empty: RefEmpty
    ref_reduction: RefReduction
    shared_weight: bool
    weight_grad: bool
    form: Form
    dpo_beta: float
    drift_clip: float | None
    drift_limit: DriftLimit
    drift_clip_by: DriftClip


_NFT = NFTRecipe(
    "diffusionnft", beta=1.0, space="x0", weighting="adaptive", divide_by_beta=True, scale="adv_clip",
    sample_reduction="mean", batch_reduction="mean", ref_weight="uniform",
)  # fmt: skip
RECIPES: dict[str, NFTRecipe] = {
    recipe.name: recipe
    for recipe in (
        NFTRecipe("afd"),  # arXiv 2605.26105, Eq. 4-5 and Table 3
        replace(
            _NFT, name="astrolabe", beta=0.1, weighting="none", divide_by_beta=False, scale="none", ref_space="x0"
        ),  # scripts/train_nft_wan.py:949-969
        _NFT,  # NVlabs/DiffusionNFT scripts/train_nft_sd3.py:934-970
        replace(_NFT, name="cosmos_rl"),  # nft_trainer.py:589-650
        replace(_NFT, name="fastvideo", beta=0.1),  # train/methods/rl/diffusion_nft.py:720-741
        replace(_NFT, name="verl_omni", beta=0.5),  # trainer/diffusion/diffusion_algos.py:819-846
        replace(_NFT, name="flow_factory"),  # trainers/nft.py:409-443
        replace(_NFT, name="edit_r1"),  # train_nft_qwen_image_edit.py:1145-1198
        replace(_NFT, name="gardo", ref_coef=0.04, ref_empty="all"),  # train_sd3_nft_gardo.py:1012-1060
        replace(_NFT, name="unirl"),  # algorithms/diffusionnft.py:343-379
    )
}


def nft_recipe(name: RecipeName, **overrides: Unpack[RecipeFields]) -> NFTRecipe:
    """A named recipe with some fields replaced. ValueError names the nearest match of an unknown name or field."""
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, 1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown recipe {name!r}{hint} Known: {', '.join(RECIPES)}")
    for key in overrides:
        if key not in RecipeFields.__annotations__:
            near = get_close_matches(key, RecipeFields.__annotations__, 1)
            hint = f", did you mean {near[0]!r}?" if near else f": {list(RecipeFields.__annotations__)}"
            raise ValueError(f"NFTRecipe has no field {key!r}{hint}")
    return replace(RECIPES[name], **overrides) if overrides else RECIPES[name]


# torch.compile calls it once, while it traces; the decorator torch.compiler.assume_constant_result would import Dynamo.
# PyTorch 2.6 fails at that; unmarked, its graph breaks here.
if torch.__version__ >= "2.7":
    nft_recipe._dynamo_marked_constant = True  # type: ignore[attr-defined]


def as_recipe(recipe: RecipeName | NFTRecipe) -> NFTRecipe:
    """The recipe itself, or the one of that name."""
    if not isinstance(recipe, (str, NFTRecipe)):
        raise TypeError(f"recipe must be a name or an NFTRecipe, got {type(recipe).__name__}")
    if isinstance(recipe, NFTRecipe):
        return recipe
    return (
        RECIPES[recipe] if recipe in RECIPES else nft_recipe(recipe)
    )  # read, not called: PyTorch 2.6 traces only that


@functools.lru_cache(256)
def recipe_from_key(key: str) -> NFTRecipe:
    """Inverse of `NFTRecipe.key`."""
    found = json.loads(key)
    clip = found["adv_clip"]
    del found["factor"]
    return NFTRecipe(**found | {"adv_clip": tuple(clip) if isinstance(clip, list) else clip})
