"""nft_loss as a module."""

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor, nn
from typing_extensions import Unpack

from afd_fast.ops import nft_loss
from afd_fast.reference.nft import NFTStats
from afd_fast.reference.nft_inputs import NFTInputs
from afd_fast.reference.recipes import NFTRecipe, RecipeName, as_recipe


class NFTLoss(nn.Module):
    """`nft_loss` with a fixed recipe; no state. Call it as `nft_loss(v, x0, r, t, ...)`."""

    def __init__(self, recipe: RecipeName | NFTRecipe = "afd") -> None:
        super().__init__()
        self.recipe = as_recipe(recipe)

    @overload
    def forward(
        self, v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, *, return_stats: Literal[False] = ...,
        out: Tensor | None = ..., **inputs: Unpack[NFTInputs],
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, *, return_stats: Literal[True],
        out: Tensor | None = ..., **inputs: Unpack[NFTInputs],
    ) -> tuple[Tensor, NFTStats]: ...  # fmt: skip
    @overload
    def forward(
        self, v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, *, return_stats: bool,
        out: Tensor | None = ..., **inputs: Unpack[NFTInputs],
    ) -> Tensor | tuple[Tensor, NFTStats]: ...  # fmt: skip
    def forward(
        self, v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, *, return_stats: bool = False,
        out: Tensor | None = None, **inputs: Unpack[NFTInputs],
    ) -> Tensor | tuple[Tensor, NFTStats]:  # fmt: skip
        """As `nft_loss`."""
        return nft_loss(v, x0, r, t, recipe=self.recipe, return_stats=return_stats, out=out, **inputs)

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module types its call as Callable[..., Any]

    def extra_repr(self) -> str:
        return repr(self.recipe)
