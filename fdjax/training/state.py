"""The state of a run: one pytree with both trained collections and an optimizer state for each."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from fdjax.training.own_network import Network
from fdjax.zoo import FCMASK


class TrainState(struct.PyTreeNode):
    """Everything that a step reads and writes.

    Attributes:
      step: int32, the number of steps done in all phases.
      key: uint32 key data; each step folds `step` into it.
      params: the weights.
      batch_stats: running averages of batch norm.
      fcmask: the FCMasks, values in [0, 1].
      weight_opt: optax state of the weights.
      mask_opt: optax state of the masks.
      teacher: params and batch_stats of the unpruned network for distillation; otherwise empty.
      lambda_: float32, the weight of the penalty.
      controller: float32 scalars: `start`, the offset from the target at the beginning of a phase; `offset`, the last
        one measured, or with `approach="aim"` the one that is allowed now.
    """

    step: jax.Array
    key: jax.Array
    params: Any
    batch_stats: Any
    fcmask: Any
    weight_opt: Any
    mask_opt: Any
    teacher: Any
    lambda_: jax.Array
    controller: Any

    def variables(self) -> dict[str, Any]:
        """Returns the collections in the form that Flax takes."""
        return {"params": self.params, "batch_stats": self.batch_stats, FCMASK: self.fcmask}

    def collections(self) -> dict[str, Any]:
        """Returns the fields that have to be finite; `controller` is left out because it begins as NaN."""
        return {
            field: getattr(self, field)
            for field in ("params", "batch_stats", "fcmask", "weight_opt", "mask_opt", "teacher", "lambda_")
        }

    def with_teacher(self) -> TrainState:
        """Adds the weights as the teacher, unless there is one.

        The teacher is a copy, because the state is donated: two fields cannot share a donated buffer.

        Returns:
          The state with a teacher.
        """
        if self.teacher:
            return self
        weights = {"params": self.params, "batch_stats": self.batch_stats}
        return self.replace(teacher=jax.tree.map(jnp.array, weights))


def init_variables(network: Network, input_shape: tuple[int, int, int], seed: int) -> dict[str, Any]:
    """Initialises the collections params, batch_stats and fcmask (all ones) of a network for (H, W, C) images."""
    # XLA takes seconds to compile so many random numbers for a CPU. At this level it takes half as long, for the same
    # bits.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    init: Any = jax.jit(lambda key: network.init(key, jnp.zeros((1, *input_shape))), compiler_options=options)
    # A network without wrapped layers has no masks.
    return {FCMASK: {}, **init(jax.random.key(seed))}


def variable_shapes(network: Network, input_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Returns the shapes and types of what `init_variables` makes."""
    shapes: Any = jax.eval_shape(lambda key: network.init(key, jnp.zeros((1, *input_shape))), jax.random.key(0))
    return {FCMASK: {}, **shapes}


def whole_masks(network: Network, input_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Makes the collection fcmask of `init_variables`, all ones, without the others."""
    return jax.tree.map(lambda mask: jnp.ones(mask.shape, mask.dtype), variable_shapes(network, input_shape)[FCMASK])


def new_controller() -> dict[str, jax.Array]:
    """Makes the memory of the controller before its first measurement.

    Returns:
      Scalars that are NaN, float32.
    """
    return {name: jnp.asarray(np.nan, jnp.float32) for name in ("offset", "start")}


def create_state(
    variables: dict[str, Any],
    seed: int,
    weight_optimizer: optax.GradientTransformation,
    mask_optimizer: optax.GradientTransformation,
) -> TrainState:
    """Makes the state at step 0.

    Args:
      variables: the collections params, batch_stats and fcmask.
      seed: the run's seed, from which the steps' random numbers come.
      weight_optimizer: the optimizer of the weights.
      mask_optimizer: the optimizer of the masks.

    Returns:
      The state.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1)),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        fcmask=variables[FCMASK],
        weight_opt=weight_optimizer.init(variables["params"]),
        mask_opt=mask_optimizer.init(variables[FCMASK]),
        teacher={},
        lambda_=jnp.zeros((), jnp.float32),
        controller=new_controller(),
    )
