"""Times weight steps of plain Flax modules, as they are, under `fdjax.fast_convolutions`, and as fdjax's own networks.

    python benchmarks/own_convolutions.py --threads 1 --rounds 7 --json FILE

The modules are MobileNetV2 for CIFAR-10 and ResNet-20, of `flax.linen.Conv` and `BatchNorm` only. A step is the
gradient of the cross entropy with respect to the weights, with statistics of the batch. The steps are timed in
alternation in one process, and the medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import _contest as contest

from fdjax.errors import reports_user_errors

NETWORKS = ("mobilenetv2_cifar10", "resnet20")
COLUMNS = ("network", "batch", "plain_ms", "fast_ms", "zoo_ms", "ratio", "plain_compile_s", "fast_compile_s")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the flags."""
    parser = contest.Parser("Times steps of plain Flax modules, as they are and with fast convolutions.")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="networks")
    parser.add_argument("--width", type=contest.width_multiplier, default=0.5, help="width multiplier of MobileNetV2")
    parser.add_argument("--batch", type=contest.integer(1), default=16, help="images in a step")
    contest.add_shared_flags(parser)
    return parser.parse_args(arguments)


def plain_module(network: str, width: float) -> Any:
    """Makes the module, with the layers of fdjax's network of this name and the names that Flax gives them."""
    import flax.linen as nn
    import jax

    from fdjax.zoo import MobileNet
    from fdjax.zoo.resnet import padded_shortcut

    class MobileNetV2(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            def conv_norm(y: jax.Array, features: int, window: int, stride: int = 1, groups: int = 1) -> jax.Array:
                y = nn.Conv(features, (window, window), stride, feature_group_count=groups, use_bias=False)(y)
                return nn.BatchNorm(use_running_average=not train, momentum=0.9)(y)

            zoo = MobileNet(network, 10, width=width)
            x = nn.relu6(conv_norm(x, zoo.stem_channels, 3))
            for plan in zoo.blocks((x.shape[1], x.shape[2])):
                y = nn.relu6(conv_norm(x, plan.wide_channels, 1))
                y = nn.relu6(conv_norm(y, plan.wide_channels, 3, plan.stride, plan.wide_channels))
                y = conv_norm(y, plan.out_channels, 1)
                x = x + y if plan.residual else y
            x = nn.relu6(conv_norm(x, zoo.head_channels or 1280, 1))
            return nn.Dense(10)(x.mean(axis=(1, 2)))

    class ResNet20(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            def conv_norm(y: jax.Array, features: int, stride: int = 1) -> jax.Array:
                y = nn.Conv(features, (3, 3), stride, padding=1, use_bias=False)(y)
                return nn.BatchNorm(use_running_average=not train, momentum=0.9)(y)

            x = nn.relu(conv_norm(x, 16))
            for features in (16, 32, 64):
                for repeat in range(3):
                    stride = 2 if features > 16 and not repeat else 1
                    y = conv_norm(nn.relu(conv_norm(x, features, stride)), features)
                    x = nn.relu(y + padded_shortcut(x, stride, features))
            return nn.Dense(10)(x.mean(axis=(1, 2)))

    return MobileNetV2() if network == "mobilenetv2_cifar10" else ResNet20()


def step_of(apply: Any, variables: Any, images: Any, labels: Any) -> tuple[Any, float]:
    """Returns a jitted step as a function without arguments, and the processor time of its compilation."""
    import jax
    import optax

    def loss(params: Any) -> Any:
        logits, updated = apply({**variables, "params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated

    start = time.process_time()
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(variables["params"]).compile()
    return lambda: compiled(variables["params"]), time.process_time() - start


def measure(network: str, flags: argparse.Namespace) -> dict[str, Any]:
    """Measures the row of a network."""
    import jax
    import numpy as np

    import fdjax
    from fdjax.config import Config, LearnConfig
    from fdjax.frozen.clock import interleaved
    from fdjax.zoo import FCMASK
    from fdjax.zoo.registry import make_network

    rng, shape = np.random.default_rng(flags.seed), (flags.batch, 32, 32, 3)
    images, labels = rng.normal(size=shape).astype(np.float32), rng.integers(0, 10, flags.batch)
    module = plain_module(network, flags.width)
    width = flags.width if network.startswith("mobile") else 1.0
    model = Config.from_dict({"model": {"name": network, "width": width}}).model
    zoo: Any = make_network(model, LearnConfig(), 10).without_masks()
    own_variables: Any = jax.jit(lambda key: module.init(key, images, train=False))(jax.random.key(flags.seed))
    zoo_variables: Any = dict(jax.jit(lambda key: zoo.init(key, images))(jax.random.key(flags.seed)))
    zoo_variables.pop(FCMASK, None)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(made["params"])) for made in (own_variables, zoo_variables)]
    if sizes[0] != sizes[1]:
        raise SystemExit(f"the networks differ: {sizes[0]} and {sizes[1]} parameters")

    def of_module(variables: Any, images: Any) -> Any:
        return module.apply(variables, images, train=True, mutable=["batch_stats"])

    def of_zoo(variables: Any, images: Any) -> Any:
        return zoo.apply(variables, images, train=True, mutable=["batch_stats"])

    row: dict[str, Any] = {"network": network, "batch": flags.batch, "parameters": sizes[0]}
    steps = {}
    for name, apply, variables in (
        ("plain", of_module, own_variables),
        ("fast", fdjax.fast_convolutions(of_module), own_variables),
        ("zoo", of_zoo, zoo_variables),
    ):
        steps[name], row[f"{name}_compile_s"] = step_of(apply, variables, images, labels)
    (plain, _), (fast, _) = (steps[name]()[0] for name in ("plain", "fast"))
    row["loss_difference"] = abs(float(plain) - float(fast))
    times = interleaved(steps, flags.rounds)
    row |= {f"{name}_ms": float(np.median(of.own)) for name, of in times.items()}
    return {**row, "ratio": statistics.median((times["fast"].own / times["plain"].own).tolist())}


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures each network."""
    flags = parse(arguments)
    contest.measure_rows(
        flags, COLUMNS, [(network,) for network in flags.network], lambda point: measure(point[0], flags)
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
