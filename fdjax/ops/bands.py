"""BandPlan: the channels that take part in each band of a pointwise layer, decided before any array is touched."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from fdjax.ops.blocks import check_block


def _order(counts: Sequence[int]) -> tuple[int, ...]:
    """Sorts channels by kept count, highest first; channels with equal counts keep their order."""
    return tuple(int(channel) for channel in np.argsort(-np.asarray(counts), kind="stable"))


def _segments(counts: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Lists (start, stop, count) of each run of equal counts, sorted by `_order`; channels of count 0 are left out."""
    ordered = sorted(counts, reverse=True)
    runs, start = [], 0
    while start < len(ordered) and ordered[start] > 0:
        stop = start + ordered.count(ordered[start])
        runs.append((start, stop, ordered[start]))
        start = stop
    return tuple(runs)


@dataclasses.dataclass(frozen=True)
class BandPlan:
    """A static, hashable plan for `banded_pointwise` (Figure 4c).

    When channels are sorted by kept count, the channels that keep coefficient n form a prefix. Band n is therefore a
    dense product of a prefix of the input channels and a prefix of the output channels.

    Attributes:
      block: the block size K, 1 to 16.
      input_counts: kept count of each of the C input channels, 0 to N.
      output_counts: kept count of each of the D output channels, 0 to N.
    """

    block: int
    input_counts: tuple[int, ...]
    output_counts: tuple[int, ...]

    def __post_init__(self) -> None:
        check_block(self.block)
        for side in ("input_counts", "output_counts"):
            counts = getattr(self, side)
            if not isinstance(counts, tuple) or not all(type(count) is int for count in counts):
                raise ValueError(f"{side} must be a tuple of Python ints, got {counts!r}")
            if counts and not 0 <= min(counts) <= max(counts) <= self.num_coefs:
                raise ValueError(f"{side} must lie in 0..{self.num_coefs} for block {self.block}, got {counts}")

    @property
    def num_coefs(self) -> int:
        """The number of coefficients N = K*K."""
        return self.block**2

    @functools.cached_property
    def input_order(self) -> tuple[int, ...]:
        """The input channels, highest kept count first."""
        return _order(self.input_counts)

    @functools.cached_property
    def output_order(self) -> tuple[int, ...]:
        """The output channels, highest kept count first."""
        return _order(self.output_counts)

    @functools.cached_property
    def input_segments(self) -> tuple[tuple[int, int, int], ...]:
        """(start, stop, count) of each run of equal counts in `input_order`; channels with count 0 are left out."""
        return _segments(self.input_counts)

    @functools.cached_property
    def output_segments(self) -> tuple[tuple[int, int, int], ...]:
        """(start, stop, count) of each run of equal counts in `output_order`; channels with count 0 are left out."""
        return _segments(self.output_counts)

    @functools.cached_property
    def widths(self) -> tuple[tuple[int, int], ...]:
        """(input channels, output channels) of each band, 0 to N-1."""
        bands = range(self.num_coefs)
        inputs, outputs = np.asarray(self.input_counts), np.asarray(self.output_counts)
        return tuple((int((inputs > band).sum()), int((outputs > band).sum())) for band in bands)

    def to_json(self) -> str:
        """Returns the plan as one line of JSON, which `from_json` reads."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> BandPlan:
        """Reads a plan that `to_json` wrote.

        Args:
          text: the JSON text.

        Returns:
          The plan.

        Raises:
          ValueError: the text is not a valid plan.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            return cls(fields["block"], tuple(fields["input_counts"]), tuple(fields["output_counts"]))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"the JSON text does not hold a BandPlan: {error!r}") from error


def plan_bands(input_counts: Sequence[int], output_counts: Sequence[int], block: int) -> BandPlan:
    """Makes a BandPlan from kept counts.

    Args:
      input_counts: C integers in 0..N, as a sequence or an array.
      output_counts: D integers in 0..N.
      block: the block size K, 1 to 16.

    Returns:
      The plan, which is hashable and can be a static argument of `jax.jit`.

    Raises:
      ValueError: a count or the block is out of range.

    Example:
      >>> plan_bands([4, 1], [2, 0, 4], block=2).widths
      ((2, 2), (1, 2), (1, 1), (1, 1))
    """
    return BandPlan(block, tuple(int(n) for n in input_counts), tuple(int(n) for n in output_counts))
