"""Makes the state that a phase begins with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fdjax.config import Config
from fdjax.graph.masks import MaskedGraph
from fdjax.training.build import collection_of, counts_of, soft_collection
from fdjax.training.controller import first_lambda
from fdjax.training.optimizers import optimizers_for
from fdjax.training.own_network import Network
from fdjax.training.phases import Phase, has_teacher
from fdjax.training.restore import Past
from fdjax.training.rounding import gated_masks
from fdjax.training.state import TrainState, init_variables, new_controller


def enter_phase(
    config: Config,
    network: Network,
    graph: MaskedGraph,
    done: Past,
    state: TrainState,
    phase: Phase,
    *,
    soft_before: bool,
) -> TrainState:
    """Makes the state that a phase begins with.

    It depends only on the state before and the config, so that a resumed run gets the same state.

    Args:
      config: the run's config.
      network: with soft masks.
      graph: channel graph of the network.
      done: the past of the run; the layers that the gate releases are recorded in it.
      state: at the end of the phase before, or a new one.
      phase: the phase that begins.
      soft_before: whether the masks have not been rounded yet.

    Returns:
      The state, with new optimizer states and a new controller.
    """
    if phase.hard and soft_before:
        hard = gated_masks(config.learn, graph, state.fcmask, done.table, learned=done.masks_learned)
        done.released = list(hard.released)
        state = state.replace(fcmask=jax.tree.map(jnp.asarray, collection_of(graph, hard.counts)))
    if phase.learns_masks and not soft_before:
        soft = soft_collection(graph, counts_of(graph, state.fcmask), config.learn.counts_below_whole)
        state = state.replace(fcmask=jax.tree.map(jnp.asarray, soft))
    if has_teacher(config, phase):
        state = state.with_teacher()
    if phase.name == "scratch":
        fresh = init_variables(network, graph.input_shape, config.seed + 1)
        state = state.replace(params=fresh["params"], batch_stats=fresh["batch_stats"])
    weight_opt, mask_opt = optimizers_for(config, phase)
    mask_steps = phase.steps - phase.weight_steps(config)
    # Lambda carries over from one mask phase to the next.
    lambda_ = float(state.lambda_) if phase.learns_masks else 0.0
    if phase.learns_masks and not lambda_:
        lambda_ = first_lambda(config.learn, graph, mask_steps)
    return state.replace(
        weight_opt=weight_opt.init(state.params),
        mask_opt=mask_opt.init(state.fcmask),
        lambda_=jnp.asarray(lambda_, jnp.float32),
        controller=new_controller(),
    )
