"""The state of a run: one struct with both collections that are trained, and an optimizer state for each."""

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
    """Everything a step reads and writes.

    Attributes:
      step: int32, steps of all phases so far.
      key: uint32 key data; a step folds `step` into it.
      params: weights.
      batch_stats: running averages of batch norm.
      fcmask: the masks.
      weight_opt: optax state of the weights.
      mask_opt: optax state of the masks.
      teacher: params and batch_stats of the unpruned network, where it teaches the pruned one; else empty.
      lambda_: float32, the weight of the penalty.
      controller: float32 scalars of the lambda controller.
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
        """The collections as Flax takes them."""
        return {"params": self.params, "batch_stats": self.batch_stats, FCMASK: self.fcmask}

    def collections(self) -> dict[str, Any]:
        """All that has to be finite, by the names of the fields; the controller's memory begins as NaN."""
        return {
            field: getattr(self, field)
            for field in ("params", "batch_stats", "fcmask", "weight_opt", "mask_opt", "teacher", "lambda_")
        }

    def with_teacher(self) -> TrainState:
        """With a copy of its weights as the teacher, unless there is one (buffers of a state are given away whole)."""
        if self.teacher:
            return self
        weights = {"params": self.params, "batch_stats": self.batch_stats}
        return self.replace(teacher=jax.tree.map(jnp.array, weights))


def init_variables(network: Network, input_shape: tuple[int, int, int], seed: int) -> dict[str, Any]:
    """Fresh collections: params, batch_stats, fcmask (all ones)."""
    init = jax.jit(lambda key: network.init(key, jnp.zeros((1, *input_shape))))
    # A network without wrapped layers has no masks.
    return {FCMASK: {}, **init(jax.random.key(seed))}


def new_controller() -> dict[str, jax.Array]:
    """The controller's memory before it has measured anything."""
    return {name: jnp.asarray(np.nan, jnp.float32) for name in ("offset", "start")}


def create_state(
    variables: dict[str, Any],
    seed: int,
    weight_optimizer: optax.GradientTransformation,
    mask_optimizer: optax.GradientTransformation,
) -> TrainState:
    """The state at step 0."""
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
