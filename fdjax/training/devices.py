"""Data parallelism: one mesh over all devices of all processes, batches sharded over it, everything else replicated.

The steps are written for the whole batch. XLA divides the work, and sums gradients, the loss and the statistics of
batch norm over the devices.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fdjax.errors import UserError

_DATA = "data"
# CUDA devices below this compute capability have no bfloat16 units.
_FIRST_BFLOAT16_GPU = 8.0


class Devices:
    """The devices that a run uses.

    Args:
      local: number of each process's devices to use; None: all.

    Raises:
      UserError: if a process has fewer devices.
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
        """Names the devices and processes, for the run's announcement."""
        kind = f"{self.platform} ({self._devices[0].device_kind})"
        text = kind if len(self) == 1 else f"{len(self)} x {kind}, each batch split among them"
        return text if self.processes == 1 else f"{text}, in {self.processes} processes"

    def check_batch(self, batch_size: int) -> None:
        """Raises `UserError` if a batch cannot be sharded evenly."""
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
        """Whether any process passes True; all processes have to call it at the same step."""
        return bool(np.max(multihost_utils.process_allgather(np.asarray(asked))))

    def replicate(self, tree: Any) -> Any:
        """Replicates the arrays of a pytree on every device; every process has to pass the same values."""

        def place(leaf: Any) -> jax.Array:
            if isinstance(leaf, jax.Array) and leaf.sharding == self.everywhere:
                return leaf
            return self._place(np.asarray(leaf), self.everywhere)

        return jax.tree.map(place, tree)

    def split(self, array: np.ndarray, axis: int = 0) -> jax.Array:
        """Shards an array that every process holds whole; each process transfers only its own part.

        Args:
          array: the array; the axis has to be a multiple of the number of devices.
          axis: the axis to shard, 0 or 1.

        Returns:
          The sharded array.
        """
        return self._place(array, self.split_second if axis else self.split_first)

    @staticmethod
    def _place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def local_part(self, batch_size: int) -> slice:
        """Returns the rows of a batch that this process holds."""
        each = batch_size // self.processes
        return slice(jax.process_index() * each, (jax.process_index() + 1) * each)

    def split_local(self, array: np.ndarray) -> jax.Array:
        """Assembles a sharded array from the parts of all processes.

        Args:
          array: the `local_part` of this process, [B / processes, ...].

        Returns:
          The whole array, [B, ...], sharded along its first axis.
        """
        return jax.make_array_from_process_local_data(self.split_first, array)

    def split_rows(self, source: Any, rows: np.ndarray) -> jax.Array:
        """Reads rows of a source into an array that is sharded along its first axis.

        Args:
          source: an array, or images that are read when they are indexed, [n, ...].
          rows: indices of the rows, int [B]; each process reads only its own part of them.

        Returns:
          `source[rows]`, [B, ...], sharded.
        """
        shape = (len(rows), *source.shape[1:])

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            return source[rows if index is None else rows[index[0]]]

        return jax.make_array_from_callback(shape, self.split_first, read)

    def wait_for_all(self, where: str) -> None:
        """Waits until every process has reached this call; `where` names it."""
        if self.processes > 1:
            multihost_utils.sync_global_devices(f"fdjax {where}")


def to_host(tree: Any) -> Any:
    """Copies the arrays of a pytree, which are replicated on every device, to NumPy arrays."""
    return jax.tree.map(np.asarray, tree)
