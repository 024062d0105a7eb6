"""How examples reach the steps: a small data set lies on the devices, a large one comes batch by batch."""

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

# Data sets up to this many bytes lie on the devices, if the choice is left to us.
_RESIDENT_BYTES = 2 << 30
# Batches that are made ready while the devices work.
_AHEAD = 2

Dispatch = Callable[..., tuple[TrainState, Metrics]]
Item = TypeVar("Item")


class Feed:
    """Training examples, and the compiled programs that consume them.

    Args:
      devices: of the run.
      images: uint8 [n, H, W, C], on the host.
      labels: int [n].
      resident: keep the examples on the devices; None: if they are few.
      steps_per_dispatch: steps that one call may do, if the examples are on the devices; None: one on the CPU, where a
        step takes long, 20 elsewhere.
      stream: makes the batches in place of `images` and `labels`, which are then not looked at.
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
        """Makes the program that does one or more steps: (state, *batches) -> state and the sums of the metrics."""
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
        """Places what the programs of `compile` need.

        Args:
          plan: pairs of anything and the examples of some steps, int [steps, B]; steps up to `longest`.
          span: the plan's first step in the run, and the step after its last; for a stream.

        Yields:
          The first of each pair, and the arguments that follow the state.
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
    """Measures how long a loop waits for its batches: at most what the devices wait for them."""

    def __init__(self) -> None:
        self.restart()

    def over(self, batches: Iterator[Item]) -> Iterator[Item]:
        """The same items."""
        while True:
            begin = time.monotonic()
            try:
                item = next(batches)
            except StopIteration:
                return
            self._waited += time.monotonic() - begin
            yield item

    def restart(self) -> None:
        """Leaves out what came since the last call."""
        self._waited, self._since = 0.0, time.monotonic()

    def share(self) -> float:
        """Waiting as a share of the time since the last call, or since the beginning."""
        share = self._waited / max(time.monotonic() - self._since, 1e-9)
        self.restart()
        return share
