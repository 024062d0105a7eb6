"""What masks are expected to cost in time: a table of measured runs, read between its points; differentiable.

A run (writer, channelwise operations, reader) whose channels share a mask has been timed at a grid of widths: how many
of its channels keep each level or more. What lies outside of such runs takes time by its MACs, at a common rate, which
makes the whole dense network's time come out as it was measured.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial import ConvexHull

from fdjax.graph.counting import GroupRun, group_runs, layer_totals
from fdjax.graph.masks import Counts, MaskedGraph
from fdjax.ops.fcmask import coef_mask
from fdjax.pruning.expected import expected_macs, outside_macs

Point = tuple[int, ...]
# The layers outside of the timed runs have at least this share of the dense network's time.
_LEAST_OUTSIDE = 0.03


def between(grid: Sequence[float], values: Mapping[Point, float], at: Sequence[float]) -> float:
    """Reads values between the points of a grid, linearly.

    Args:
      grid: coordinates along every axis, ascending, at least two.
      values: by indices into `grid` that descend from axis to axis.
      at: coordinates, which descend as well.
    """
    places = np.asarray(grid, np.float64)
    corner = [int(np.clip(np.searchsorted(places, x, "right") - 1, 0, len(places) - 2)) for x in at]
    parts = [float((x - places[i]) / (places[i + 1] - places[i])) for x, i in zip(at, corner, strict=True)]
    # A simplex of the cell: one step after the other, the longest first. Of equals the first, so that indices descend
    # at its corners, too.
    found, left = 0.0, 1.0
    for axis in sorted(range(len(parts)), key=lambda axis: -parts[axis]):
        if left > parts[axis]:
            found += (left - parts[axis]) * values[tuple(corner)]
        left, corner[axis] = parts[axis], corner[axis] + 1
    return found + left * values[tuple(corner)] if left else found


@dataclasses.dataclass(frozen=True)
class RunTimes:
    """A run, timed.

    Attributes:
      path: of its mask.
      layers: their names.
      channels: that share the mask.
      levels: the kept counts that the mask is rounded to, ascending.
      widths: numbers of channels that were timed, ascending from 0 to all.
      points: indices into `widths` for each level above the first, descending: how many channels keep it or more.
      milliseconds: of each point.
    """

    path: str
    layers: tuple[str, ...]
    channels: int
    levels: tuple[int, ...]
    widths: tuple[int, ...]
    points: tuple[Point, ...]
    milliseconds: tuple[float, ...]

    @functools.cached_property
    def _at(self) -> Mapping[Point, float]:
        return dict(zip(self.points, self.milliseconds, strict=True))

    @property
    def dense(self) -> float:
        """With all channels whole."""
        return self._at[(len(self.widths) - 1,) * (len(self.levels) - 1)]

    def at(self, counts: np.ndarray) -> float:
        """Milliseconds with these kept counts [channels], between the points linearly."""
        return self.between(np.array([(counts >= level).mean() for level in self.levels[1:]]))

    def between(self, shares: np.ndarray) -> float:
        """Milliseconds where these shares of the channels keep each level above the first, or more."""
        return between(self.widths, self._at, [float(share) * self.channels for share in shares])

    def scaled(self, factors: Mapping[Point, float]) -> RunTimes:
        """With every time multiplied by a factor, of which `factors` has those at shares of 0, 1/2 and 1 (0, 1, 2)."""
        found = []
        for point, ms in self._at.items():
            shares = [2 * self.widths[index] / self.channels for index in point]
            found.append(ms * between((0, 1, 2), factors, shares))
        return dataclasses.replace(self, milliseconds=tuple(found))

    def nearest(self, point: Point) -> Point:
        """The point nearest to shares of 0, 1/2 and 1 (0, 1, 2)."""
        wanted = (half * self.channels / 2 for half in point)
        return tuple(int(np.abs(np.asarray(self.widths) - width).argmin()) for width in wanted)

    @functools.cached_property
    def planes(self) -> np.ndarray:
        """The lower convex envelope as the highest of planes: [planes, slopes by share of channels, and the height].

        Along it no level is an obstacle on the way down, also where a group of its own costs more than it saves at
        first.
        """
        shares = np.asarray(self.widths, np.float64)[np.asarray(self.points)] / self.channels
        times = np.asarray(self.milliseconds, np.float64)
        scale = max(float(times.max()), 1e-9)
        points = np.column_stack([shares, times / scale])
        lid = np.column_stack([shares, np.full(len(shares), 3.0)])
        equations = ConvexHull(np.concatenate([points, lid])).equations
        below = equations[equations[:, -2] < -1e-9]
        # normal . (x, t) + offset = 0  ->  t = -(normal_x . x + offset) / normal_t
        return np.unique(-np.delete(below, -2, axis=1) / below[:, -2:-1], axis=0) * scale


@dataclasses.dataclass(frozen=True)
class TimeTable:
    """What `fdjax.frozen` has measured of a network on an engine.

    Attributes:
      engine: its name.
      batch: images at once.
      dense_ms: of the whole dense network.
      least: the share of that time that is left when all that masks can remove is removed, as measured.
      runs: timed.
    """

    engine: str
    batch: int
    dense_ms: float
    least: float
    runs: tuple[RunTimes, ...]

    @property
    def scale(self) -> float:
        """By which runs take less time within the network than alone, at most 1."""
        alone = sum(run.dense for run in self.runs)
        return min(1.0, (1 - _LEAST_OUTSIDE) * self.dense_ms / alone) if alone else 1.0

    @property
    def inside(self) -> frozenset[str]:
        """The layers of the runs."""
        return frozenset(name for run in self.runs for name in run.layers)

    def outside(self, network: MaskedGraph) -> tuple[str, ...]:
        """The wrapped layers that are in no timed run. Masks of their own sides keep a channel whole or not at all:
        what bands take is not in the table, and is more time than the dense layer's as a rule."""
        return tuple(name for name in network.wrapped_layers if name not in self.inside)

    def rate(self, network: MaskedGraph) -> float:
        """Milliseconds of a MAC outside of the runs."""
        macs = sum(layer.dense_macs for name, layer in network.layers.items() if name not in self.inside)
        rest = self.dense_ms - self.scale * sum(run.dense for run in self.runs)
        return rest / macs if macs else 0.0

    def parts(self, network: MaskedGraph, counts: Counts) -> tuple[float, float]:
        """Milliseconds of the runs and of what lies outside of them, with hard masks, as the table has it."""
        runs = self.scale * sum(run.at(np.asarray(counts[run.path])) for run in self.runs)
        outside = sum(macs for name, (macs, _) in layer_totals(network, counts).items() if name not in self.inside)
        return runs, self.rate(network) * outside

    def ratio(self, network: MaskedGraph, counts: Counts) -> float:
        """The time of hard masks over the dense network's, as the table has it."""
        return sum(self.parts(network, counts)) / self.dense_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TimeTable:
        """The table that `to_dict` wrote, also after a trip through JSON."""
        made = dict.fromkeys(("layers", "levels", "widths", "milliseconds"), tuple)
        runs = tuple(
            RunTimes(
                **{
                    **run,
                    **{name: kind(run[name]) for name, kind in made.items()},
                    "points": tuple(map(tuple, run["points"])),
                }
            )
            for run in fields["runs"]
        )
        return cls(**{**fields, "runs": runs})


class Expected(NamedTuple):
    """What soft masks are expected to cost.

    Attributes:
      shares: of every run's channels, how many keep each level above the first or more, [levels - 1].
      outside: milliseconds of what lies outside of the runs.
    """

    shares: tuple[jax.Array, ...]
    outside: jax.Array


def expected_parts(network: MaskedGraph, fcmasks: Mapping[str, jax.Array], table: TimeTable) -> Expected:
    """What a time is made of; differentiable. `fcmasks`: path -> FCMask [channels], in [0, 1]."""
    shares = []
    for run in table.runs:
        mask = coef_mask(fcmasks[run.path].astype(jnp.float32), network.masks[run.path].num_coefs, run.levels[:-1])
        # The coefficients between two levels fade together: the first of them stands for all.
        shares.append(mask[np.array(run.levels[:-1])].mean(axis=1))
    # Outside of the runs channels stay whole or go (`TimeTable.outside`).
    macs = expected_macs(network, fcmasks, (0,), without=table.inside) + outside_macs(network, table.inside)
    return Expected(tuple(shares), table.rate(network) * macs)


def expected_time(network: MaskedGraph, fcmasks: Mapping[str, jax.Array], table: TimeTable) -> jax.Array:
    """Expected time over the dense network's along the convex envelopes of the runs' times; differentiable.

    Args:
      network: the network.
      fcmasks: path -> FCMask [channels], in [0, 1].
      table: of this network.

    Returns:
      A float32 scalar, 1 where nothing is pruned.
    """
    parts, total = expected_parts(network, fcmasks, table), jnp.zeros(())
    for run, shares in zip(table.runs, parts.shares, strict=True):
        planes = jnp.asarray(run.planes, jnp.float32)
        total += (planes[:, :-1] @ shares + planes[:, -1]).max()
    return (table.scale * total + parts.outside) / table.dense_ms


def soft_ratio(table: TimeTable, parts: Expected) -> float:
    """Expected time over the dense network's between the table's points: for hard masks what the table says of them."""
    runs = sum(run.between(np.asarray(s)) for run, s in zip(table.runs, parts.shares, strict=True))
    return (table.scale * runs + float(parts.outside)) / table.dense_ms


def timed_runs(network: MaskedGraph, levels: Sequence[int] | None) -> dict[str, GroupRun]:
    """Path of a mask -> the run that a table can have of it: at most one level between 0 and N."""
    runs = group_runs(network).values()
    return {run.mask.path: run for run in runs if len(network.levels_of(run.mask.path, levels)) <= 3}


def grid(channels: int, axes: int, multiple: int) -> tuple[tuple[int, ...], tuple[Point, ...]]:
    """Widths and points to time a run at (`RunTimes`).

    Args:
      channels: of the run.
      axes: levels above the first, 1 or 2.
      multiple: that widths are to be of, but for all channels.
    """
    steps = 6 if axes == 1 else 3
    nominal = (round(channels * step / steps / multiple) * multiple for step in range(1, steps))
    widths = tuple(sorted({0, channels, *(width for width in nominal if 0 < width < channels)}))
    places = range(len(widths))
    points = [(i,) for i in places] if axes == 1 else [(i, j) for i in places for j in places if j <= i]
    return widths, tuple(points)


def corners(axes: int) -> tuple[Point, ...]:
    """Shares of 0, 1/2 and 1 (0, 1, 2) at which a whole network is timed, but for nothing and all."""
    points = [(i,) for i in range(3)] if axes == 1 else [(i, j) for i in range(3) for j in range(i + 1)]
    return tuple(points[1:-1])


def counts_at(run: GroupRun, levels: Sequence[int], widths: Sequence[int], point: Point) -> np.ndarray:
    """Kept counts [channels] at a point, the channels that keep most first."""
    counts = np.full(run.mask.channels, levels[0])
    for level, index in zip(levels[1:], point, strict=True):
        counts[: widths[index]] = level
    return counts
