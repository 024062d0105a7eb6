"""Brings examples to the steps: a small data set stays on the devices, the batches of a large one are prefetched."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdjax.data import Images, TrainingStream
from fdjax.training.devices import Devices
from fdjax.training.state import TrainState
from fdjax.training.steps import Metrics, Step

# By default, data sets up to this many bytes are kept on the devices.
_RESIDENT_BYTES = 2 << 30
# The number of batches that are prefetched while the devices work.
_AHEAD = 2

Dispatch = Callable[..., tuple[TrainState, Metrics]]
Item = TypeVar("Item")


class Feed:
    """Training examples, and the compiled programs that consume them.

    Args:
      devices: the run's devices.
      images: uint8 [n, H, W, C], on the host.
      labels: int [n].
      resident: whether to keep the examples on the devices; None: if they have at most 2 GiB.
      steps_per_dispatch: the most steps in one dispatch, if the examples are on the devices; None: 1 on the CPU, where
        a step takes long, 20 elsewhere.
      stream: makes the batches; `images` and `labels` are then not read.
    """

    def __init__(
        self,
        devices: Devices,
        images: Images,
        labels: np.ndarray,
        *,
        resident: bool | None = None,
        steps_per_dispatch: int | None = None,
        stream: TrainingStream | None = None,
    ):
        self._devices, self._images, self._labels = devices, images, labels.astype(np.int32)
        self._stream = stream
        self.resident = images.nbytes <= _RESIDENT_BYTES if resident is None else resident
        if stream is not None:
            self.resident = False
        default = 1 if devices.platform == "cpu" else 20
        self.longest = (steps_per_dispatch or default) if self.resident else 1
        self._on_devices = devices.replicate((self._images, self._labels)) if self.resident else None

    def compile(self, step: Step) -> Dispatch:
        """Makes the program that does one or more steps; it compiles when it is first called.

        Args:
          step: (state, images [B, H, W, C], labels [B]) -> state, metrics.

        Returns:
          (state, *arguments from `batches`) -> the new state, and the sums of the metrics over the steps. The state is
          donated.
        """
        everywhere, split = self._devices.everywhere, self._devices.split_first

        def take(images: jax.Array, labels: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
            return lax.with_sharding_constraint((images[indices], labels[indices]), split)

        def one(state, images, labels, indices):
            return step(state, *take(images, labels, indices[0]))

        def several(state, images, labels, indices, count):
            def body(at, carry):
                state, sums = carry
                state, metrics = step(state, *take(images, labels, indices[at]))
                return state, jax.tree.map(jnp.add, sums, metrics)

            _, like = jax.eval_shape(one, state, images, labels, indices)
            zeros = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), like)
            return lax.fori_loop(0, count, body, (state, zeros))

        if not self.resident:
            program = step
        elif self.longest == 1:
            program = one
        else:
            program = several
        return jax.jit(program, donate_argnums=0, out_shardings=(everywhere, everywhere))

    def batches(
        self, plan: Iterable[tuple[Item, np.ndarray]], span: tuple[int, int] = (0, 0)
    ) -> Iterator[tuple[Item, tuple[Any, ...]]]:
        """Transfers the arguments of the programs that `compile` makes.

        Args:
          plan: pairs of any item and the indices of the examples of some steps, int [steps, B]; at most `longest`
            steps.
          span: the plan's first step in the run, and the step after its last; only a stream reads it.

        Yields:
          The item of each pair, and the arguments that follow the state.
        """
        if self._stream is not None:
            made = self._stream.batches(*span)
            yield from self._prefetched(plan, lambda _: tuple(map(self._devices.split_local, next(made))))
            return
        if self._on_devices is None:
            yield from self._prefetched(plan, self._from_host)
            return
        for item, indices in plan:
            filled = np.zeros((self.longest, indices.shape[1]), np.int32)
            filled[: len(indices)] = indices
            count = () if self.longest == 1 else (np.int32(len(indices)),)
            yield item, (*self._on_devices, self._devices.split(filled, axis=1), *count)

    def _from_host(self, rows: np.ndarray) -> tuple[jax.Array, ...]:
        return self._devices.split_rows(self._images, rows), self._devices.split_rows(self._labels, rows)

    @staticmethod
    def _prefetched(
        plan: Iterable[tuple[Item, np.ndarray]], load: Callable[[np.ndarray], tuple[jax.Array, ...]]
    ) -> Iterator[tuple[Item, tuple[Any, ...]]]:
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            waiting: deque = deque()
            for item, indices in plan:
                waiting.append((item, pool.submit(load, indices[0])))
                if len(waiting) > _AHEAD:
                    item, batch = waiting.popleft()
                    yield item, batch.result()
            for item, batch in waiting:
                yield item, batch.result()


class Waiting:
    """Measures how long a loop waits for its batches; the devices wait for them at most as long."""

    def __init__(self) -> None:
        self.restart()

    def over(self, batches: Iterator[Item]) -> Iterator[Item]:
        """Yields the same items, and measures the time that each takes to come."""
        while True:
            begin = time.monotonic()
            try:
                item = next(batches)
            except StopIteration:
                return
            self._waited += time.monotonic() - begin
            yield item

    def restart(self) -> None:
        """Starts measuring anew; what was measured since the last call is dropped."""
        self._waited, self._since = 0.0, time.monotonic()

    def share(self) -> float:
        """Returns the share of the time since the last call (or the beginning) that was spent waiting, 0 to 1."""
        share = self._waited / max(time.monotonic() - self._since, 1e-9)
        self.restart()
        return share
