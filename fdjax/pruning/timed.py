"""The expected time of masks: interpolation in a table of measured runs, differentiable.

A run (writer, channelwise operations, reader) whose channels share a mask is timed on a grid of widths, where a width
is the number of channels that keep at least some level. Everything outside of such runs takes time in proportion to its
MACs. The rate is set so that the dense network takes as long as it was measured to take.
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
# The layers outside the timed runs get at least this share of the dense network's time.
_LEAST_OUTSIDE = 0.03


def between(grid: Sequence[float], values: Mapping[Point, float], at: Sequence[float]) -> float:
    """Interpolates linearly between the points of a grid.

    Args:
      grid: coordinates along every axis, ascending, at least two.
      values: values by indices into `grid`; indices do not increase from axis to axis.
      at: the coordinates to interpolate at, which do not increase either.

    Returns:
      The interpolated value.
    """
    places = np.asarray(grid, np.float64)
    corner = [int(np.clip(np.searchsorted(places, x, "right") - 1, 0, len(places) - 2)) for x in at]
    parts = [float((x - places[i]) / (places[i + 1] - places[i])) for x, i in zip(at, corner, strict=True)]
    # Walk the corners of a simplex of the cell, by the longest remaining step first. Among equal steps, the first axis
    # comes first, so that the indices at the corners do not increase either.
    found, left = 0.0, 1.0
    for axis in sorted(range(len(parts)), key=lambda axis: -parts[axis]):
        if left > parts[axis]:
            found += (left - parts[axis]) * values[tuple(corner)]
        left, corner[axis] = parts[axis], corner[axis] + 1
    return found + left * values[tuple(corner)] if left else found


@dataclasses.dataclass(frozen=True)
class RunTimes:
    """The times of a run.

    Attributes:
      path: path of the run's mask.
      layers: names of the run's layers.
      channels: number of channels that share the mask.
      levels: the kept counts that the mask is rounded to, ascending.
      widths: the numbers of channels that were timed, ascending from 0 to all.
      points: for each level above the first, the index into `widths` of how many channels keep at least that level;
        indices do not increase.
      milliseconds: the time of each point.
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
        """Milliseconds with all channels whole."""
        return self._at[(len(self.widths) - 1,) * (len(self.levels) - 1)]

    def at(self, counts: np.ndarray) -> float:
        """Returns the milliseconds of kept counts, interpolated between the points.

        Args:
          counts: kept counts [channels], 0 to N.

        Returns:
          Milliseconds.
        """
        return self.between(np.array([(counts >= level).mean() for level in self.levels[1:]]))

    def between(self, shares: np.ndarray) -> float:
        """Returns the interpolated milliseconds of shares of channels.

        Args:
          shares: for each level above the first, the share of channels that keep at least that level, [levels - 1] in
            [0, 1].

        Returns:
          Milliseconds.
        """
        return between(self.widths, self._at, [float(share) * self.channels for share in shares])

    def scaled(self, factors: Mapping[Point, float]) -> RunTimes:
        """Returns the run with every time multiplied by a factor.

        `factors` holds the factors at shares 0, 1/2 and 1, which its keys denote by 0, 1 and 2; others are
        interpolated.
        """
        found = []
        for point, ms in self._at.items():
            shares = [2 * self.widths[index] / self.channels for index in point]
            found.append(ms * between((0, 1, 2), factors, shares))
        return dataclasses.replace(self, milliseconds=tuple(found))

    def nearest(self, point: Point) -> Point:
        """Returns the point nearest to shares of 0, 1/2 and 1, denoted by 0, 1 and 2."""
        wanted = (half * self.channels / 2 for half in point)
        return tuple(int(np.abs(np.asarray(self.widths) - width).argmin()) for width in wanted)

    @functools.cached_property
    def planes(self) -> np.ndarray:
        """The lower convex envelope, as the maximum of planes: [planes, slopes by share of channels, then the height].

        Along the envelope, no level is an obstacle on the way down, even if a new group at first costs more than it
        saves.
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
    """The times that `fdjax.frozen` measured of a network on an engine.

    Attributes:
      engine: name of the engine.
      batch: images per call.
      dense_ms: milliseconds of the whole dense network.
      least: the measured share of that time that is left when everything that masks can remove is removed.
      runs: the timed runs.
    """

    engine: str
    batch: int
    dense_ms: float
    least: float
    runs: tuple[RunTimes, ...]

    @property
    def scale(self) -> float:
        """The factor, at most 1, by which runs take less time within the network than alone."""
        alone = sum(run.dense for run in self.runs)
        return min(1.0, (1 - _LEAST_OUTSIDE) * self.dense_ms / alone) if alone else 1.0

    @property
    def inside(self) -> frozenset[str]:
        """Names of the layers in timed runs."""
        return frozenset(name for run in self.runs for name in run.layers)

    def outside(self, network: MaskedGraph) -> tuple[str, ...]:
        """Returns the wrapped layers that are in no timed run.

        Masks of their own sides keep a channel whole or not at all, because the table has no time for bands, which
        usually take more time than the dense layer.
        """
        return tuple(name for name in network.wrapped_layers if name not in self.inside)

    def rate(self, network: MaskedGraph) -> float:
        """Returns the milliseconds per MAC outside the timed runs."""
        macs = sum(layer.dense_macs for name, layer in network.layers.items() if name not in self.inside)
        macs += network.graph.product_macs
        rest = self.dense_ms - self.scale * sum(run.dense for run in self.runs)
        return rest / macs if macs else 0.0

    def parts(self, network: MaskedGraph, counts: Counts) -> tuple[float, float]:
        """Estimates the time of hard masks.

        Args:
          network: the graph with its masks.
          counts: path of every FCMask -> kept counts [channels], 0 to N.

        Returns:
          Milliseconds of the timed runs, and of everything else.
        """
        runs = self.scale * sum(run.at(np.asarray(counts[run.path])) for run in self.runs)
        outside = sum(macs for name, (macs, _) in layer_totals(network, counts).items() if name not in self.inside)
        outside += network.graph.product_macs
        return runs, self.rate(network) * outside

    def ratio(self, network: MaskedGraph, counts: Counts) -> float:
        """Estimates the time of hard masks over the dense network's.

        Args:
          network: the graph with its masks.
          counts: path of every FCMask -> kept counts [channels], 0 to N.

        Returns:
          The ratio, above 0.
        """
        return sum(self.parts(network, counts)) / self.dense_ms

    def to_dict(self) -> dict[str, Any]:
        """Returns the table in plain JSON types, which `from_dict` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TimeTable:
        """Reads a table that `to_dict` wrote, possibly after a round trip through JSON."""
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
    """The expected cost of soft masks.

    Attributes:
      shares: per run, the share of its channels that keep at least each level above the first, [levels - 1].
      outside: milliseconds of everything outside the timed runs.
    """

    shares: tuple[jax.Array, ...]
    outside: jax.Array


def expected_parts(network: MaskedGraph, fcmasks: Mapping[str, jax.Array], table: TimeTable) -> Expected:
    """Computes what an expected time is made of; differentiable.

    Args:
      network: the graph with its masks.
      fcmasks: path -> FCMask [channels], in [0, 1].
      table: the time table of this network.

    Returns:
      The shares of channels per run, and the time outside the runs.
    """
    shares = []
    for run in table.runs:
        mask = coef_mask(fcmasks[run.path].astype(jnp.float32), network.masks[run.path].num_coefs, run.levels[:-1])
        # The coefficients between two levels fade together, so the first of them represents all.
        shares.append(mask[np.array(run.levels[:-1])].mean(axis=1))
    # Outside the runs, channels are kept whole or removed (`TimeTable.outside`).
    macs = expected_macs(network, fcmasks, (0,), without=table.inside) + outside_macs(network, table.inside)
    return Expected(tuple(shares), table.rate(network) * macs)


def expected_time(network: MaskedGraph, fcmasks: Mapping[str, jax.Array], table: TimeTable) -> jax.Array:
    """Computes the expected time over the dense network's, along the convex envelopes of the runs' times.

    Args:
      network: the graph with its masks.
      fcmasks: path -> FCMask [channels], in [0, 1].
      table: the time table of this network.

    Returns:
      A differentiable float32 scalar, 1 if nothing is pruned.
    """
    parts, total = expected_parts(network, fcmasks, table), jnp.zeros(())
    for run, shares in zip(table.runs, parts.shares, strict=True):
        planes = jnp.asarray(run.planes, jnp.float32)
        total += (planes[:, :-1] @ shares + planes[:, -1]).max()
    return (table.scale * total + parts.outside) / table.dense_ms


def soft_ratio(table: TimeTable, parts: Expected) -> float:
    """Returns the interpolated time over the dense network's; for hard masks, it is the table's estimate."""
    runs = sum(run.between(np.asarray(s)) for run, s in zip(table.runs, parts.shares, strict=True))
    return (table.scale * runs + float(parts.outside)) / table.dense_ms


def timed_runs(network: MaskedGraph, levels: Sequence[int] | None) -> dict[str, GroupRun]:
    """Returns path of a mask -> run, for runs that a table can hold: at most one level between 0 and N."""
    runs = group_runs(network).values()
    return {run.mask.path: run for run in runs if len(network.levels_of(run.mask.path, levels)) <= 3}


def grid(channels: int, axes: int, multiple: int) -> tuple[tuple[int, ...], tuple[Point, ...]]:
    """Chooses the widths and points at which to time a run (`RunTimes`).

    Args:
      channels: number of channels of the run.
      axes: number of levels above the first, 1 or 2.
      multiple: every width but the last is a multiple of this.

    Returns:
      (widths, points).
    """
    steps = 6 if axes == 1 else 3
    nominal = (round(channels * step / steps / multiple) * multiple for step in range(1, steps))
    widths = tuple(sorted({0, channels, *(width for width in nominal if 0 < width < channels)}))
    places = range(len(widths))
    points = [(i,) for i in places] if axes == 1 else [(i, j) for i in places for j in places if j <= i]
    return widths, tuple(points)


def corners(axes: int) -> tuple[Point, ...]:
    """Lists the shares 0, 1/2 and 1, denoted by 0, 1 and 2, at which a whole network is timed, except none and all."""
    points = [(i,) for i in range(3)] if axes == 1 else [(i, j) for i in range(3) for j in range(i + 1)]
    return tuple(points[1:-1])


def counts_at(run: GroupRun, levels: Sequence[int], widths: Sequence[int], point: Point) -> np.ndarray:
    """Makes the kept counts of a point, in which the first channels keep the most.

    Args:
      run: the run.
      levels: the kept counts that its mask is rounded to, ascending.
      widths: as in `RunTimes`.
      point: as in `RunTimes`.

    Returns:
      int [channels].
    """
    counts = np.full(run.mask.channels, levels[0])
    for level, index in zip(levels[1:], point, strict=True):
        counts[: widths[index]] = level
    return counts
