"""MobileNetV2 of Keras Applications, fine-tuned, and pruned to half of its MACs by a plain optax loop.

    python results/own/prune_keras.py --data FOLDER --weights FILE --out FOLDER --frozen FOLDER

README.md beside this file says where data and weights are from, and what came out.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import torch

import fdjax
from fdjax.data import open_dataset
from fdjax.provenance import commit, processor

MEAN, STD = (np.array(rgb, np.float32) * 255 for rgb in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


class FastDepthwise(keras.layers.DepthwiseConv2D):
    """Keras' layer as fdjax computes it: XLA's gradient takes several times as long on a processor."""

    def call(self, inputs):
        kernel = jnp.asarray(self.kernel.value)[..., 0]
        if self.strides[0] == 1:
            return fdjax.depthwise_conv(inputs, kernel, 1)
        # A layer before it has added the zeros that PyTorch's padding adds.
        return fdjax.depthwise_conv(inputs[:, 1:-1, 1:-1], kernel, self.strides[0], padding="torch")


def make_model(side: int, classes: int, depthwise: Any = None) -> keras.Model:
    """Keras' network; with another class of depthwise layers if one is given."""
    body = keras.applications.MobileNetV2(weights=None, include_top=False, pooling="avg", input_shape=(side, side, 3))
    for layer in body.layers:  # As PyTorch has them, where the weights are from.
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.epsilon, layer.momentum = 1e-5, 0.9
        if isinstance(layer, keras.layers.ZeroPadding2D):
            layer.padding = ((1, 1), (1, 1))
    logits = keras.layers.Dense(classes, name="top")(body.output)
    model = keras.Model(body.input, logits)
    if depthwise is None:
        return model

    def clone(layer):
        kind = depthwise if isinstance(layer, keras.layers.DepthwiseConv2D) else type(layer)
        return kind.from_config(layer.get_config())

    return keras.models.clone_model(model, clone_function=clone)


def load_imagenet(model: keras.Model, file: str) -> None:
    """Weights of a PyTorch MobileNetV2 without classifier, by order."""
    tensors = iter(value.numpy() for name, value in torch.load(file).items() if "num_batches" not in name)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([next(tensors) for _ in range(4)])
        elif isinstance(layer, keras.layers.DepthwiseConv2D):
            layer.set_weights([next(tensors).transpose(2, 3, 0, 1)])
        elif isinstance(layer, keras.layers.Conv2D):
            layer.set_weights([next(tensors).transpose(2, 3, 1, 0)])
    assert next(tensors, None) is None


def functions_of(model: keras.Model) -> tuple[dict[str, jax.Array], Any, Any]:
    """Variables by path; inference (variables, raw images) -> logits; training -> (logits, updated variables)."""
    trainable, others = ([v.path for v in of] for of in (model.trainable_variables, model.non_trainable_variables))

    def call(variables, images, training):
        values = [[variables[path] for path in paths] for paths in (trainable, others)]
        images = (images - MEAN) / STD
        # Keras pads the first layer on the right; PyTorch on the left.
        images = jnp.pad(images, ((0, 0), (1, 0), (1, 0), (0, 0)))[:, : images.shape[1], : images.shape[2]]
        logits, updated = model.stateless_call(*values, images, training=training)
        return logits, {**variables, **dict(zip(others, updated, strict=True))}

    variables = {v.path: jnp.asarray(v.value) for v in model.variables}
    return variables, lambda v, x: call(v, x, False)[0], lambda v, x: call(v, x, True)


def entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Trainer:
    """Batches of a data set, and the two plain loops."""

    def __init__(self, data: Any, batch: int, seed: int):
        self.images, self.labels, self.batch = data.train_images, data.train_labels, batch
        self.rng = np.random.default_rng(seed)
        self.steps_per_epoch = len(self.labels) // batch

    def batches(self, epochs: float):
        """Shuffled, flipped and shifted by up to 4 pixels."""
        order = np.array([], int)
        for _ in range(round(epochs * self.steps_per_epoch)):
            if len(order) < self.batch:
                order = self.rng.permutation(len(self.labels))
            rows, order = order[: self.batch], order[self.batch :]
            images = self.images[rows].astype(np.float32)
            padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
            top, left = self.rng.integers(0, 9, 2)
            images = padded[:, top : top + images.shape[1], left : left + images.shape[2]]
            flipped = np.where(self.rng.random((self.batch, 1, 1, 1)) < 0.5, images[:, :, ::-1], images)
            yield flipped, self.labels[rows]

    def weights(self, variables, learn, train, epochs: float, rate: float, say):
        """Trains the variables in `learn`; `train` gives logits and updated variables."""
        steps = round(epochs * self.steps_per_epoch)
        optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

        @jax.jit
        def step(variables, state, images, labels):
            learned = {path: variables[path] for path in learn}

            def loss(learned):
                logits, updated = train({**variables, **learned}, images)
                return entropy(logits, labels), updated

            (value, updated), grads = jax.value_and_grad(loss, has_aux=True)(learned)
            updates, state = optimizer.update(grads, state, learned)
            return {**updated, **optax.apply_updates(learned, updates)}, state, value

        state, losses = optimizer.init({path: variables[path] for path in learn}), []
        for images, labels in self.batches(epochs):
            variables, state, value = step(variables, state, images, labels)
            losses.append(float(value))
            if len(losses) % self.steps_per_epoch == 0:
                epoch, mean = len(losses) // self.steps_per_epoch, np.mean(losses[-self.steps_per_epoch :])
                say(f"  epoch {epoch}: loss {mean:.3f}")
        return variables

    def masks(self, graph, variables, apply, epochs: float, rate: float, target: float, say):
        """Learns FCMasks: the loss of the masked network, and what its expected MACs are above the target.

        Towards the end what lies between 0 and 1 costs too: rounding then changes little.
        """
        optimizer, masked = optax.adam(rate), fdjax.masked(apply, graph)

        @jax.jit
        def step(fcmask, state, variables, images, labels, aim, sharpness):
            def loss(fcmask):
                ratio = fdjax.expected_ratio(graph, fcmask)
                value = entropy(masked(fcmask, variables, images), labels)
                between = sum((mask * (1 - mask)).mean() for mask in fcmask.values())
                return value + 20 * jax.nn.relu(ratio - aim) + sharpness * between, (value, ratio)

            (_, figures), grads = jax.value_and_grad(loss, has_aux=True)(fcmask)
            updates, state = optimizer.update(grads, state)
            return {p: m.clip(0, 1) for p, m in optax.apply_updates(fcmask, updates).items()}, state, figures

        fcmask = fdjax.init_fcmask(graph)
        state, steps = optimizer.init(fcmask), round(epochs * self.steps_per_epoch)
        for at, (images, labels) in enumerate(self.batches(epochs), 1):
            aim = 1 - (1 - target) * min(1, at / (0.6 * steps))
            sharpness = max(0, at / steps - 0.4)
            fcmask, state, (value, ratio) = step(fcmask, state, variables, images, labels, aim, sharpness)
            if at % 24 == 0 or at == steps:
                say(f"  step {at} of {steps}: loss {value:.3f}, expected MACs {ratio:.3f}x")
        return fcmask


def top1(apply, images, labels) -> float:
    said = np.concatenate([apply(images[at : at + 62].astype(np.float32)) for at in range(0, len(images), 62)])
    return float((said.argmax(-1) == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with train, validation and test")
    parser.add_argument("--weights", required=True, help="PyTorch weights of MobileNetV2 1.0 without classifier")
    parser.add_argument("--out", type=Path, required=True, help="folder for log.txt and result.json")
    parser.add_argument("--frozen", required=True, help="folder for the frozen network")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--epochs", type=float, nargs=3, default=(3, 2, 6), help="fine-tuning, masks, refinement")
    parser.add_argument("--multiple", type=int, default=8, help="of which the numbers of channels are multiples")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "log.txt").write_text("")
    began = time.monotonic()

    def say(line: str) -> None:
        line = f"[{time.monotonic() - began:6.0f} s] {line}"
        print(line, flush=True)
        with (flags.out / "log.txt").open("a") as log:
            log.write(line + "\n")

    keras.utils.set_random_seed(flags.seed)
    data = open_dataset("folder", flags.data, flags.side)
    say(f"{len(data.train_labels)} training and {len(data.test_labels)} test images, {data.num_classes} classes")
    plain, fast = (make_model(flags.side, data.num_classes, kind) for kind in (None, FastDepthwise))
    load_imagenet(fast, flags.weights)
    variables, fast_apply, train = functions_of(fast)
    others, apply, _ = functions_of(plain)
    assert set(others) == set(variables)
    few = data.test_images[:2].astype(np.float32)
    assert np.allclose(apply(variables, few), fast_apply(variables, few), atol=1e-3)
    learn = [v.path for v in fast.trainable_variables]
    test = data.test_images, data.test_labels
    fine_tune, learn_masks, refine = flags.epochs

    trainer = Trainer(data, flags.batch, flags.seed)
    variables = trainer.weights(variables, learn, train, fine_tune, 1e-3, say)
    figures = {"fine_tuned_top1": top1(jax.jit(functools.partial(apply, variables)), *test)}
    say(f"fine-tuned: {figures['fine_tuned_top1']:.4f}")

    one = np.zeros((1, flags.side, flags.side, 3), np.float32)
    graph = fdjax.with_masks(fdjax.trace(apply, variables, one), name="MobileNetV2 of Keras Applications")
    say(f"traced\n{graph}")
    fcmask = trainer.masks(graph, variables, fast_apply, learn_masks, 0.02, flags.target, say)
    hard = fdjax.harden(graph, fcmask, target_macs=flags.target, group_multiple=flags.multiple)
    masked = jax.jit(functools.partial(fdjax.masked(apply, graph), hard.counts))
    figures["rounded_top1"] = top1(functools.partial(masked, variables), *test)
    channels = ", ".join(f"{path.split('/')[0]} {int((n > 0).sum())} of {len(n)}" for path, n in hard.counts.items())
    say(f"channels: {channels}")
    say(f"rounded: {figures['rounded_top1']:.4f} at {hard.macs.ratio:.4f}x MACs")

    # The same batches for both, and the same schedule: the control goes on for as long as masks and refinement took.
    control = Trainer(data, flags.batch, flags.seed + 1)
    dense = control.weights(variables, learn, train, learn_masks + refine, 5e-4, say)
    figures["control_top1"] = top1(jax.jit(functools.partial(apply, dense)), *test)
    say(f"dense control: {figures['control_top1']:.4f}")
    refining = Trainer(data, flags.batch, flags.seed + 1)
    refined = refining.weights(
        variables, learn, functools.partial(fdjax.masked(train, graph), hard.counts), refine, 5e-4, say
    )
    figures["masked_top1"] = top1(functools.partial(masked, refined), *test)
    frozen = fdjax.freeze(graph, refined, hard.counts)
    figures["pruned_top1"] = top1(frozen, *test)
    say(f"pruned, refined and frozen: {figures['pruned_top1']:.4f} at {hard.macs.ratio:.4f}x MACs")
    frozen.save(flags.frozen)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(flags).items()}
    for path in ("data", "weights", "out", "frozen"):
        settings[path] = Path(settings[path]).name
    result = {**figures, "macs": hard.macs.to_dict(), "test_images": len(data.test_labels), "settings": settings}
    result |= {"seconds": round(time.monotonic() - began), "processor": processor(), "commit": commit()}
    result["versions"] = {"jax": jax.__version__, "keras": keras.__version__}
    (flags.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    say("done")


if __name__ == "__main__":
    main()
