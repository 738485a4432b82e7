"""What operators and kernels agree on: names of slots and rows, the tile, and when a tensor is read in place.

Free of Triton, so that the CPU operators import it too. kernels/csrc/afd_core.h has the same numbers in C++.
Symbols as in nft.py: e+- = a +- d are the errors of the two branches, m is 1 or sigma^2.
"""

from enum import IntEnum

from torch import Tensor

TILE = 4096  # elements per program, and per noise tile: 1024 Philox counters with four outputs each


class Slot(IntEnum):
    """The sums over the elements of a sample, then the maxima."""

    SIZE = 0  # |e+|
    SIZE_GAP = 1  # |e+| - |e-|
    POS = 2  # e+^2
    NEG = 3  # e-^2
    PRIOR = 4  # m (v - v_ref)^2
    KEPT = 5  # elements inside the mask
    DRIFT = 6  # (v - v_old)^2
    V = 7  # v^2
    REF = 8  # v_ref^2
    X0 = 9  # x0^2
    OLD_REF = 10  # (v_old - v_ref)^2
    R_POS = 11  # r e+^2, for an r per element; so the next three
    R_NEG = 12  # (1 - r) e-^2
    R_PRIOR = 13  # r m (v - v_ref)^2
    R = 14
    X0_MAX = 15  # x0^2; this and the next are maxima, not sums
    DRIFT_MAX = 16  # (v - v_old)^2

    @property
    def bit(self) -> int:
        """This slot in a bit mask of slots."""
        return 1 << self


MAXIMA = Slot.X0_MAX  # the first slot that is a maximum


class Row(IntEnum):
    """The results per sample: fields of `NFTStats`, and last the three coefficients of the gradient."""

    POS_LOSS = 0
    NEG_LOSS = 1
    WEIGHT_POS = 2
    WEIGHT_NEG = 3
    PRIOR = 4
    OLD_DEVIATION = 5
    V_NORM = 6
    V_REF_NORM = 7
    OLD_DEVIATION_MAX = 8
    OLD_PRIOR = 9
    X0_SQUARE = 10
    X0_SQUARE_MAX = 11
    DIFFERENCE = 12  # c+ - c-; with an r per element: c+ at r = 1
    SUM = 13  # c+ + c-; with an r per element: c- at r = 0
    REFERENCE = 14  # c_ref


COEFFICIENTS = Row.DIFFERENCE  # the first row that is no statistic


class Total(IntEnum):
    """The results per call, next to the loss."""

    POLICY = 0
    PRIOR = 1
    SIGNAL = 2
    R_MEAN = 3


class Source(IntEnum):
    """Where the noised state comes from."""

    NOISE = 0
    SEED = 1
    X_T = 2
    CLEAN = 3  # no noise: the predictions are of x0 (space="clean")


class Frames(IntEnum):
    """How t and sigma lie over a sample's elements; its frames are `inner` consecutive elements each."""

    ONE = 0  # one value a sample
    LONG = 1  # a quarter of a tile meets one border at most, and no border splits the eight elements of a thread
    SHORT = 2  # anything else: every element looks up its frame

    @classmethod
    def of(cls, frames: int, inner: int, tiles: int) -> "Frames":
        """What `frames` values per sample of `tiles` tiles are."""
        if frames == 1:
            return cls.ONE
        return cls.LONG if inner >= TILE // 4 and inner % 8 == 0 and tiles <= 2**32 * 8 // TILE else cls.SHORT


def rows_contiguous(x: Tensor) -> bool:
    """Whether every sample x[b] is contiguous; the stride between samples is free."""
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:])):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def contiguous_rows(x: Tensor) -> Tensor:
    """x, or a copy of it, with every sample contiguous."""
    return x if rows_contiguous(x) else x.contiguous()
