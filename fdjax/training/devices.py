"""Data parallelism: one mesh over all devices of all processes, batches split over it, everything else on every device.

The steps are written for the whole batch; XLA divides the work and adds what is summed over the batch: gradients, the
loss, and batch norm's statistics.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fdjax.errors import UserError

_DATA = "data"
# CUDA devices before this compute capability have no bfloat16 units.
_FIRST_BFLOAT16_GPU = 8.0


class Devices:
    """The devices that a run works on.

    Args:
      local: how many of each process's devices to use; None for all.

    Raises:
      UserError: there are not so many.
    """

    def __init__(self, local: int | None = None):
        available = jax.local_device_count()
        if local is not None and not 1 <= local <= available:
            raise UserError(f"--devices {local}: this process has {available}; give 1 to {available}")
        by_process: dict[int, list[Any]] = {}
        for device in jax.devices():
            by_process.setdefault(device.process_index, []).append(device)
        self._devices = [device for process in sorted(by_process) for device in by_process[process][:local]]
        mesh = Mesh(np.array(self._devices), (_DATA,), axis_types=(AxisType.Auto,))
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.split_first = NamedSharding(mesh, PartitionSpec(_DATA))
        self.split_second = NamedSharding(mesh, PartitionSpec(None, _DATA))
        self.platform = self._devices[0].platform
        self.processes = jax.process_count()
        self.is_writer = jax.process_index() == 0

    def __len__(self) -> int:
        return len(self._devices)

    def describe(self) -> str:
        """For the run's announcement."""
        kind = f"{self.platform} ({self._devices[0].device_kind})"
        text = kind if len(self) == 1 else f"{len(self)} x {kind}, each batch split among them"
        return text if self.processes == 1 else f"{text}, in {self.processes} processes"

    def check_batch(self, batch_size: int) -> None:
        """Raises `UserError` if a batch cannot be split evenly."""
        if batch_size % len(self):
            below = batch_size // len(self) * len(self)
            near = f"{below} or {below + len(self)}" if below else f"{len(self)}"
            raise UserError(
                f"data.batch_size is {batch_size}, which cannot be split evenly over {len(self)} devices; give a "
                f"multiple, such as {near}, or use fewer devices (--devices)"
            )

    def check_precision(self, precision: str) -> None:
        """Raises `UserError` if the devices have no units for `precision`."""
        if precision != "bfloat16":
            return
        capability = getattr(self._devices[0], "compute_capability", None)
        old = self.platform == "gpu" and capability is not None and float(capability) < _FIRST_BFLOAT16_GPU
        if self.platform == "cpu" or old:
            kind = f"compute capability {capability}" if old else "it would be emulated, slower than float32"
            raise UserError(
                f"model.precision bfloat16 is not supported on {self._devices[0].device_kind} ({kind}); give float32, "
                f"or use a TPU or a GPU of compute capability {_FIRST_BFLOAT16_GPU} or more"
            )

    def agree(self, asked: bool) -> bool:
        """Whether any process says yes; all of them call it at the same step."""
        return bool(np.max(multihost_utils.process_allgather(np.asarray(asked))))

    def replicate(self, tree: Any) -> Any:
        """The arrays of a pytree, on every device; every process gives the same values."""

        def place(leaf: Any) -> jax.Array:
            if isinstance(leaf, jax.Array) and leaf.sharding == self.everywhere:
                return leaf
            return self._place(np.asarray(leaf), self.everywhere)

        return jax.tree.map(place, tree)

    def split(self, array: np.ndarray, axis: int = 0) -> jax.Array:
        """An array that every process holds, divided along `axis` (0 or 1): a process moves its own part only."""
        return self._place(array, self.split_second if axis else self.split_first)

    @staticmethod
    def _place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def local_part(self, batch_size: int) -> slice:
        """Which rows of a batch this process holds."""
        each = batch_size // self.processes
        return slice(jax.process_index() * each, (jax.process_index() + 1) * each)

    def split_local(self, array: np.ndarray) -> jax.Array:
        """The whole of an array of which each process has its `local_part`, divided along its first axis."""
        return jax.make_array_from_process_local_data(self.split_first, array)

    def split_rows(self, source: Any, rows: np.ndarray) -> jax.Array:
        """`source[rows]` divided along its first axis; a process reads its own rows only."""
        shape = (len(rows), *source.shape[1:])

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            return source[rows if index is None else rows[index[0]]]

        return jax.make_array_from_callback(shape, self.split_first, read)

    def wait_for_all(self, where: str) -> None:
        """Waits until every process has come here."""
        if self.processes > 1:
            multihost_utils.sync_global_devices(f"fdjax {where}")


def to_host(tree: Any) -> Any:
    """Arrays that are on every device, as NumPy arrays."""
    return jax.tree.map(np.asarray, tree)
