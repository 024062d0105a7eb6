"""Counts on the channel graph: published figures, and expected MACs of hard masks against the exact count."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from fdjax.graph.counting import network_macs
from fdjax.pruning.expected import expected_ratio
from fdjax.pruning.harden import harden_to_target
from fdjax.zoo import MobileNet, ResNet
from tests.graph_networks import network_for

PUBLISHED = {
    "mobilenetv2_cifar10": (MobileNet("mobilenetv2_cifar10", 10, block=4), (32, 32, 3), "89.01", "117.98"),
    "mobilenetv2_cifar100": (MobileNet("mobilenetv2_cifar100", 100, block=4), (32, 32, 3), "42.96", "53.67"),
    "resnext29": (ResNet("resnext29", 10, block=4), (32, 32, 3), "772.47", "843.25"),
    "resnet110": (ResNet("resnet110", 10), (32, 32, 3), "252.89", "252.89"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_their_published_counts(name: str) -> None:
    module, shape, dense, full = PUBLISHED[name]
    network = network_for(module, shape)
    macs = network_macs(network, network.full_counts()).to_dict()
    assert (f"{macs['dense'] / 1e6:.2f}", f"{macs['full_transforms'] / 1e6:.2f}") == (dense, full)
    assert macs["pruned"] == macs["total"] == macs["dense"]


@pytest.mark.parametrize("tied", [False, True])
def test_whole_channels_are_expected_to_cost_what_they_cost(tied: bool) -> None:
    network = network_for(MobileNet("mobilenetv2_small", 10, block=2, tied=tied), (28, 28, 1))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        alive = {path: rng.integers(0, 2, mask.channels) for path, mask in network.masks.items()}
        counts = {path: alive[path] * network.masks[path].num_coefs for path in alive}
        masks = {path: jnp.asarray(of, jnp.float32) for path, of in alive.items()}
        exact = network_macs(network, counts)
        assert exact.ratio < 1
        assert float(expected_ratio(network, masks, (0,))) == pytest.approx(exact.ratio, rel=1e-6)


def test_hardening_meets_its_target() -> None:
    network = network_for(MobileNet("mobilenetv2_small", 10, block=2, tied=True), (28, 28, 1))
    rng = np.random.default_rng(0)
    masks = {path: rng.uniform(size=mask.channels).astype(np.float32) for path, mask in network.masks.items()}
    hard = harden_to_target(network, masks, 0.5, levels=(0, 1))
    assert hard.macs.ratio == pytest.approx(0.5, abs=0.02)
    assert hard.macs == network_macs(network, hard.counts, hard.released)
