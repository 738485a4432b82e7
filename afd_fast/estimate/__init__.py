"""What an iteration costs at least on a named GPU, by arithmetic: nothing is run or downloaded."""

from afd_fast.estimate.iteration import Estimate, estimate, floor, gpu_of, tables

__all__ = ["Estimate", "estimate", "floor", "gpu_of", "tables"]
