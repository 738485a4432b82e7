"""The scores of all tools for one folder, and the difference of two folders prompt by prompt."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from afd_fast.errors import ConfigError
from afd_fast.evaluation import flickering, folder, intervals, vbench, videoalign, videophy2
from afd_fast.evaluation.intervals import Groups, Score


class Tool(Protocol):
    """The module of a tool, as far as its scores go."""

    def values(self, out: Path) -> dict[str, Groups]:
        """{score: {prompt: its videos' values}} of the folder; empty if the tool was not run."""

    def collect(self, out: Path) -> list[Score]:
        """The means of `values` with 95 % intervals."""


@dataclass(frozen=True)
class Difference:
    """A row of a comparison: means over the prompts that both have, other - base and its 95 % interval (nan: none)."""

    name: str
    base: float
    other: float
    difference: float
    low: float
    high: float
    prompts: int
    note: str = ""


def _tools(out: Path) -> list[Tool]:
    first: list[Tool] = [vbench] if (out / vbench.SUITE).exists() else []
    return [*first, videophy2, videoalign, flickering]


def collect(out: Path) -> list[Score]:
    """The scores that the tools wrote into a folder. Raises ConfigError for incomplete results, and for none."""
    scores = [score for tool in _tools(out) for score in tool.collect(out)]
    if not scores:
        raise ConfigError(f"{out} holds no results; run `afd-fast eval run` first")
    return scores


def _values(out: Path) -> dict[str, Groups]:
    tables: dict[str, Groups] = {}
    for tool in _tools(out):
        found = tool.values(out)
        if tool is vbench:
            found = {f"VBench {k}": {p: [100 * v for v in vs] for p, vs in t.items()} for k, t in found.items()}
        tables |= found
    return tables


def _vbench(part: Mapping[str, vbench.Value]) -> dict[str, vbench.Value]:
    """The entries of VBench's dimensions, named and scaled as `vbench.totals` takes them."""
    return {k: part[f"VBench {k}"] / 100 for k in vbench.DIMENSIONS if f"VBench {k}" in part}


def _means(side: dict[str, Groups]) -> dict[str, float]:
    """The mean of every score and of VBench's totals."""
    means = {name: intervals.mean(groups) for name, groups in side.items()}
    return means | {f"VBench {k}": total for k, total in vbench.totals(_vbench(means)).items()}


def _draws(side: dict[str, Groups]) -> dict[str, np.ndarray]:
    """The resampled means [DRAWS] of every score and of VBench's totals."""
    draws = intervals.draws(side)
    return draws | {f"VBench {k}": total for k, total in vbench.totals(_vbench(draws)).items()}


def differences(base: Path, other: Path) -> list[Difference]:
    """Every score that both folders have, with VBench's totals.

    The comparison is paired: both sides are resampled by the same prompts, so what a prompt does to both cancels. Prompts
    without a value on both sides are left out. Raises ConfigError for folders of other prompts, or without a common score.
    """
    if {c.prompt for c in folder.read_manifest(base)} != {c.prompt for c in folder.read_manifest(other)}:
        raise ConfigError(f"{base} and {other} are of other prompts; only videos of the same prompts can be compared")
    a, b = _values(base), _values(other)
    shared = {name: [p for p in a[name] if a[name][p] and b[name].get(p)] for name in a if name in b}
    shared = {name: prompts for name, prompts in shared.items() if prompts}
    if not shared:
        raise ConfigError(
            f"{base} and {other} hold no score in common; run `afd-fast eval run` with the same tool on both"
        )
    sides = [{name: {p: t[name][p] for p in prompts} for name, prompts in shared.items()} for t in (a, b)]
    means, draws = [_means(side) for side in sides], [_draws(side) for side in sides]
    rows = []
    for name, mean in means[0].items():
        prompts = len(shared.get(name, {p for groups in sides[0].values() for p in groups}))
        bounds = intervals.percentiles(draws[1][name] - draws[0][name]) if prompts > 1 else intervals.NONE
        lost = len(a[name].keys() | b[name].keys()) - prompts if name in shared else 0
        note = f"{lost} prompts lack a value" if lost else ""
        rows.append(Difference(name, mean, means[1][name], means[1][name] - mean, *bounds, prompts, note))
    return rows
