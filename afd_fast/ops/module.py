"""nft_loss as a module."""

from torch import Tensor, nn

from afd_fast.ops import nft_loss
from afd_fast.reference.nft import NFTRecipe, nft_recipe


class NFTLoss(nn.Module):
    """`nft_loss` with a fixed recipe; no state. Call it as `nft_loss(v, x0, r, t, ...)`."""

    def __init__(self, recipe: str | NFTRecipe = "afd"):
        super().__init__()
        self.recipe = nft_recipe(recipe) if isinstance(recipe, str) else recipe

    def forward(self, v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, **inputs):
        return nft_loss(v, x0, r, t, recipe=self.recipe, **inputs)

    def extra_repr(self) -> str:
        return repr(self.recipe)
