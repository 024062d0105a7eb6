"""The values that ONNX's operators take and make, in JAX.

ONNX has images as [B, C, H, W]. Values of four dimensions that a convolution, a pool or a batch norm has touched are
held as [B, H, W, C] and marked so (`Tensor.channels_last`); all axes that an operator names are those of ONNX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


class Unsupported(Exception):
    """An operation that cannot be computed here; its message says what of it."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A value that depends on the image or on a trained weight.

    Attributes:
      array: the numbers.
      channels_last: whether a value that is [B, C, H, W] in ONNX is held as [B, H, W, C].
    """

    array: jax.Array
    channels_last: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the value has in ONNX."""
        shape = self.array.shape
        return tuple(shape[at] for at in TO_FIRST) if self.channels_last else shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.array.ndim

    def axis(self, axis: int) -> int:
        """Returns the place in `array` of an axis of ONNX, which may count from the end."""
        axis %= self.ndim
        return (0, 3, 1, 2)[axis] if self.channels_last else axis

    def like(self, array: jax.Array) -> Tensor:
        """Marks another array as this one is.

        Args:
          array: of as many dimensions.

        Returns:
          The value.
        """
        return Tensor(array, self.channels_last)


# A value that does not depend on the image, as ONNX has it; a value that does; or an input that is left out.
Value = np.ndarray | Tensor | None


@dataclasses.dataclass(frozen=True)
class Call:
    """One execution of a node.

    Attributes:
      inputs: its values, in order. In the place of a kernel stands None.
      attributes: the node's attributes.
      weights: leaf -> trained array of the layer, such as "kernel" and "bias".
      opset: version of the operators.
      batch: the number of images that the file fixes, or None, and the number that there are.
      outputs: number of results.
      train: whether the network is in training.
      key: in training, a PRNG key for dropout; None: nothing is dropped.
      batch_stats: takes "mean" and "var" of the batch in training, from a batch norm.
    """

    inputs: Sequence[Value]
    attributes: Mapping[str, Any]
    weights: Mapping[str, jax.Array]
    opset: int
    batch: tuple[int | None, int]
    outputs: int = 1
    train: bool = False
    key: jax.Array | None = None
    batch_stats: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def has(self, at: int) -> bool:
        """Whether an input is given."""
        return at < len(self.inputs) and self.inputs[at] is not None

    def tensor(self, at: int = 0) -> Tensor:
        """Returns an input as a value of JAX."""
        value = self.inputs[at] if at < len(self.inputs) else None
        if value is None:
            raise Unsupported(f"its input {at} is left out")
        return value if isinstance(value, Tensor) else Tensor(jnp.asarray(value))

    def image(self, at: int = 0) -> jax.Array:
        """Brings an input to the layout of images.

        Args:
          at: its place; it has four dimensions.

        Returns:
          [B, H, W, C].

        Raises:
          Unsupported: it has other dimensions, or is left out.
        """
        return with_channels_last(self.tensor(at))

    def plain(self, at: int = 0) -> jax.Array:
        """Brings an input to the layout that ONNX has.

        Args:
          at: its place.

        Returns:
          The array.

        Raises:
          Unsupported: it is left out.
        """
        return as_in_onnx(self.tensor(at))

    def known(self, at: int, name: str, default: Any = None) -> Any:
        """Returns what is an attribute in some opsets and a constant input in others, as plain numbers."""
        if name in self.attributes:
            return self.attributes[name]
        if not self.has(at):
            return default
        value = self.inputs[at]
        if isinstance(value, Tensor):
            raise Unsupported(f"its {name} depends on the image")
        assert value is not None
        return value.tolist()


def with_channels_last(value: Tensor) -> jax.Array:
    """Brings a value to the layout of images.

    Args:
      value: [B, C, H, W] in ONNX.

    Returns:
      [B, H, W, C].

    Raises:
      Unsupported: it has other dimensions.
    """
    if value.ndim != 4:
        raise Unsupported(f"it is of values of {value.ndim} dimensions; only images, of 4, are read")
    return value.array if value.channels_last else value.array.transpose(TO_LAST)


def as_in_onnx(value: Tensor) -> jax.Array:
    """Brings a value to the layout that ONNX has.

    Args:
      value: of any number of dimensions.

    Returns:
      The array.
    """
    return value.array.transpose(TO_FIRST) if value.channels_last else value.array
