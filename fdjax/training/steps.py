"""The training steps: pure functions of (state, images, labels), each of which differentiates one collection."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from fdjax.config import DistillConfig, LearnConfig
from fdjax.data import augment, mixup, normalize
from fdjax.graph.masks import MaskedGraph
from fdjax.ops.fcmask import fcmask_penalty, nearest_level
from fdjax.pruning.expected import expected_macs, expected_ratio
from fdjax.pruning.timed import TimeTable, expected_time
from fdjax.training.controller import ratio_at
from fdjax.training.own_network import Network
from fdjax.training.state import TrainState
from fdjax.zoo import FCMASK

Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Metrics]]
Prepare = Callable[[jax.Array, jax.Array], jax.Array]
# (state, batch) -> (logits, labels, label smoothing) -> the loss of a step, without the penalty on masks.
Objective = Callable[[TrainState, jax.Array], Callable[..., jax.Array]]

# Folded into a step's key for the module's dropout; augmentation and mixup fold in other numbers.
_MODULE_STREAM = 9


def make_prepare(
    graph: MaskedGraph,
    crop_padding: int,
    flip: bool,
    precision: str = "float32",
    *,
    jitter: float = 0.0,
    cutout: int = 0,
    erase: float = 0.0,
    crop_area: float = 0.0,
) -> Prepare:
    """Returns (key, raw images [B, H, W, C]) -> augmented, normalised batch [B, H, W, C].

    The batch has the type `precision`, in which the network then computes; weights, statistics and losses stay float32.
    The other settings are those of `fdjax.data.augment`. Pixels that are cut out or erased become 0 in the batch.
    """

    def prepare(key: jax.Array, images: jax.Array) -> jax.Array:
        batch = augment(
            key,
            images,
            pad=crop_padding,
            flip=flip,
            jitter=jitter,
            cutout_size=cutout,
            erase=erase,
            fill=np.array(graph.input_mean, np.float32),
            crop_area=crop_area,
        )
        return normalize(batch, graph.input_mean, graph.input_std, precision)

    return prepare


def _mixed(key: jax.Array, x: jax.Array, labels: jax.Array, classes: int, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Returns the batch and the targets after mixup, or unchanged if `alpha` is 0."""
    if not alpha:
        return x, labels
    return mixup(jax.random.fold_in(key, 2), x, labels, classes, alpha)


def cross_entropy(
    logits: jax.Array, labels: jax.Array, smoothing: float = 0.0, class_weights: np.ndarray | None = None
) -> jax.Array:
    """Computes the mean cross entropy.

    Args:
      logits: [B, classes].
      labels: int [B], or shares of the classes, float [B, classes].
      smoothing: label smoothing, 0 to below 1.
      class_weights: the weight of each class's examples, float [classes]; None: all 1.

    Returns:
      The loss, a scalar.
    """
    if labels.ndim == 1 and not smoothing:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    else:
        targets = jax.nn.one_hot(labels, logits.shape[-1]) if labels.ndim == 1 else labels
        smooth = optax.smooth_labels(targets, smoothing) if smoothing else targets
        losses = optax.softmax_cross_entropy(logits, smooth)
    if class_weights is not None:
        weights = jnp.asarray(class_weights, losses.dtype)
        losses = losses * (weights[labels] if labels.ndim == 1 else labels @ weights)
    return losses.mean()


def balancing_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Computes weights by which all classes count alike in the loss.

    Args:
      labels: int [n], not empty.
      num_classes: number of classes.

    Returns:
      float32 [classes]; the mean over examples is 1, and a class without examples has 0.
    """
    counts = np.bincount(labels, minlength=num_classes)
    weights = np.where(counts > 0, len(labels) / np.maximum(counts, 1), 0)
    return (weights / np.count_nonzero(counts)).astype(np.float32)


def with_class_weights(objective: Objective, class_weights: np.ndarray) -> Objective:
    """Makes an objective that weights examples by their classes.

    Args:
      objective: the objective.
      class_weights: float [classes].

    Returns:
      The weighted objective.
    """

    def weighted(state: TrainState, x: jax.Array) -> Callable[..., jax.Array]:
        return functools.partial(objective(state, x), class_weights=class_weights)

    return weighted


def _accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    # argmax returns the index of NaN, which would count as an answer.
    return jnp.mean((jnp.argmax(logits, axis=-1) == labels) & jnp.isfinite(logits).all(axis=-1))


def labels_alone(state: TrainState, x: jax.Array) -> Callable[..., jax.Array]:
    """The objective without a teacher.

    Args:
      state: not used.
      x: not used.

    Returns:
      `cross_entropy`.
    """
    del state, x
    return cross_entropy


def make_distillation(teacher: Network, distill: DistillConfig) -> Objective:
    """Makes the objective with a teacher (Hinton et al. 2015).

    Args:
      teacher: the unpruned network, whose weights are in the state.
      distill: weight w and temperature T of (1 - w) * cross entropy + w * T^2 * KL(teacher || student), where the
        logits of both networks are divided by T.

    Returns:
      (state, batch) -> (logits, labels, label smoothing) -> loss.
    """

    def objective(state: TrainState, x: jax.Array):
        taught = teacher.apply({**state.teacher, FCMASK: state.fcmask}, x, train=False)
        assert isinstance(taught, jax.Array)
        targets = jax.nn.log_softmax(jax.lax.stop_gradient(taught) / distill.temperature)

        def mixture(
            logits: jax.Array, labels: jax.Array, smoothing: float = 0.0, class_weights: np.ndarray | None = None
        ) -> jax.Array:
            student = jax.nn.log_softmax(logits / distill.temperature)
            distance = optax.losses.kl_divergence_with_log_targets(student, targets).mean() * distill.temperature**2
            if distill.weight == 1:
                return distance
            return (1 - distill.weight) * cross_entropy(
                logits, labels, smoothing, class_weights
            ) + distill.weight * distance

        return mixture

    return objective


def make_weight_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    prepare: Prepare,
    objective: Objective = labels_alone,
    *,
    train_batch_norm: bool = True,
    label_smoothing: float = 0.0,
    mixup_alpha: float = 0.0,
) -> Step:
    """Makes a step that updates the weights and not the masks. Its accuracy is by the labels before mixup."""

    def step(state: TrainState, images: jax.Array, labels: jax.Array):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        x, targets = _mixed(key, prepare(key, images), labels, network.num_classes, mixup_alpha)
        loss_from = objective(state, x)

        def loss_of(params):
            logits, updated = network.apply(
                {**state.variables(), "params": params}, x, train=train_batch_norm, mutable=["batch_stats"],
                rngs=jax.random.fold_in(key, _MODULE_STREAM),
            )  # fmt: skip
            return loss_from(logits, targets, label_smoothing), (logits, updated)

        (loss, (logits, updated)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, weight_opt = optimizer.update(grads, state.weight_opt, state.params)
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=updated["batch_stats"] if train_batch_norm else state.batch_stats,
            weight_opt=weight_opt,
        )
        return state, {"loss": loss, "top1": _accuracy(logits, labels)}

    return step


def skip_nonfinite(step: Step) -> Step:
    """Guards a step: if its loss or its new state is not finite, only the step number changes.

    The metrics are then 0, and the metric `skipped` is 1.
    """

    def guarded(state: TrainState, images: jax.Array, labels: jax.Array):
        stepped, metrics = step(state, images, labels)
        numbers = [leaf for leaf in jax.tree.leaves(stepped.collections()) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        sound = jnp.stack([jnp.isfinite(leaf).all() for leaf in (metrics["loss"], *numbers)]).all()
        kept = jax.tree.map(lambda new, old: jnp.where(sound, new, old), stepped, state).replace(step=stepped.step)
        metrics = {name: jnp.where(sound, metric, 0) for name, metric in metrics.items()}
        return kept, {**metrics, "skipped": 1 - sound.astype(jnp.float32)}

    return guarded


# The penalty up to which masks count as being at the aim: an excess of 2% of the dense network's cost.
_ON_AIM = 0.02**2


def mask_penalty(graph: MaskedGraph, fcmask: Any, learn: LearnConfig, table: TimeTable | None = None) -> jax.Array:
    """Computes the penalty that lambda weighs.

    Args:
      graph: channel graph of the network.
      fcmask: the collection, values in [0, 1].
      learn: the kind of penalty, levels and convention.
      table: measured times, if the target is a time.

    Returns:
      A scalar: the paper's penalty (section 3.3), or expected MACs over dense MACs, or with `table` the expected time
      over the dense network's.
    """
    if learn.penalty == "fcmask":
        return fcmask_penalty(jax.tree.leaves(fcmask))
    masks: dict[str, Any] = flatten_dict(fcmask, sep="/")
    if table is not None:
        return expected_time(graph, masks, table)
    expected = expected_macs(graph, masks, learn.counts_below_whole, learn.target_convention)
    # The count of a large network does not fit into int32.
    return expected / float(graph.dense_macs)


def excess_penalty(
    graph: MaskedGraph, fcmask: Any, learn: LearnConfig, offset: jax.Array, table: TimeTable | None = None
) -> jax.Array:
    """Computes the penalty of masks whose expected cost is above the aim.

    Args:
      graph: channel graph of the network.
      fcmask: the collection, values in [0, 1].
      learn: the kind of penalty, levels, convention and target.
      offset: a scalar, the offset from the target that the aim allows (`fdjax.training.controller`).
      table: measured times, if the target is a time.

    Returns:
      A scalar: the square of the excess of the expected cost, over the dense network's, above the aim; 0 below it. With
      the paper's penalty, twice the excess, without its gradient, times the mean FCMask.
    """
    masks: dict[str, Any] = flatten_dict(fcmask, sep="/")
    if table is None:
        cost = expected_ratio(graph, masks, learn.counts_below_whole, learn.target_convention)
    else:
        cost = expected_time(graph, masks, table)
    assert learn.target is not None
    excess = jax.nn.relu(cost - ratio_at(offset, learn.target))
    if learn.penalty == "fcmask":
        return 2 * jax.lax.stop_gradient(excess) * fcmask_penalty(jax.tree.leaves(fcmask)) / max(1, len(masks))
    return excess**2


def make_mask_step(
    network: Network,
    graph: MaskedGraph,
    optimizer: optax.GradientTransformation,
    prepare: Prepare,
    learn: LearnConfig,
    objective: Objective = labels_alone,
    *,
    mixup_alpha: float = 0.0,
    table: TimeTable | None = None,
    pull: optax.Schedule | None = None,
) -> Step:
    """Makes a step that updates the masks by the loss of section 3.3 and projects them to [0, 1].

    Weights and batch norm do not change. With `pull`, each mask also moves a share of its way to the nearest level,
    decoupled from the gradient, as weight decay is in AdamW; `pull` has the share, 0 to 1, by the number of the step.
    With an aim, masks above it are not moved so.
    """

    def ways_to_levels(fcmask: Any) -> Any:
        masks: dict[str, Any] = flatten_dict(fcmask, sep="/")
        ways = {}
        for path, mask in masks.items():
            levels = graph.levels_of(path, learn.counts_below_whole)
            ways[path] = nearest_level(mask, graph.masks[path].num_coefs, levels) - mask
        return unflatten_dict(ways, sep="/")

    def step(state: TrainState, images: jax.Array, labels: jax.Array):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        x, targets = _mixed(key, prepare(key, images), labels, network.num_classes, mixup_alpha)
        loss_from = objective(state, x)

        def loss_of(fcmask):
            logits = network.apply({**state.variables(), FCMASK: fcmask}, x, train=False)
            assert isinstance(logits, jax.Array)
            loss = loss_from(logits, targets)
            if learn.approach == "aim":
                penalty = excess_penalty(graph, fcmask, learn, state.controller["offset"], table)
            else:
                penalty = mask_penalty(graph, fcmask, learn, table)
            return loss + state.lambda_ * penalty, (loss, logits, penalty)

        (_, (loss, logits, penalty)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.fcmask)
        updates, mask_opt = optimizer.update(grads, state.mask_opt, state.fcmask)
        if pull is not None:
            share, ways = pull(state.step), ways_to_levels(state.fcmask)
            if learn.approach == "aim":
                # Masks that are still above the aim have to come down first: the pull would hold them.
                share = jnp.where(penalty <= _ON_AIM, share, 0.0)
            updates = jax.tree.map(lambda update, way: update + share * way, updates, ways)
        # Outside [0, 1] the gradient of a mask is zero, so that it could not come back.
        fcmask = jax.tree.map(lambda m: jnp.clip(m, 0, 1), optax.apply_updates(state.fcmask, updates))
        state = state.replace(step=state.step + 1, fcmask=fcmask, mask_opt=mask_opt)
        return state, {"loss": loss, "top1": _accuracy(logits, labels)}

    return step
