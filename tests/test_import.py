"""Imported networks say what the source's say: torch modules with the sources' names of parameters."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: its networks are what imports are compared with")

import jax  # noqa: E402

from fdjax.importers import FORMATS, count_classes, read_weights  # noqa: E402
from fdjax.zoo import MobileNet, ResNet  # noqa: E402
from tests.imported_networks import imported_logits, relative_error, torch_logits  # noqa: E402
from tests.torch_networks import (  # noqa: E402
    ORIGINAL_ROWS,
    TimmMobileNet,
    TorchMobileNetV2,
    TorchResNet,
    lite0_rows,
    randomise,
)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def images_of(size: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(3, size, size, 3)).astype(np.float32)


def imagenet_resnet(groups: int, inner: int, expansion: int, stem: int) -> TorchResNet:
    return TorchResNet((3, 4, 6, 3), stem, inner, expansion, window=7, stride=2, pool=True, groups=groups)


SMALL_ROWS = ((4, 8, 2, 1, 3), (4, 24, 2, 2, 3))
# At width 0.1; the numbers of channels that EfficientNet-Lite0's stages then have.
LITE0_NARROW = (8, 8, 8, 8, 16, 24, 32)
NETWORKS = {
    "torchvision mobilenetv2": (
        lambda: TorchMobileNetV2(ORIGINAL_ROWS, 32, 1280, 0.35, 10),
        MobileNet("mobilenetv2", 10, 0.35, 1, padding="torch"),
    ),
    "torchvision resnet50": (
        lambda: imagenet_resnet(1, 8, 4, 8),
        ResNet("resnet50", 10, 0.125, 1, padding="torch"),
    ),
    "torchvision resnext50": (
        lambda: imagenet_resnet(4, 8, 2, 8),
        ResNet("resnext50_32x4d", 10, 0.125, 1, padding="torch", cardinality=4, group_width=16),
    ),
    "torchvision resnext29": (
        lambda: TorchResNet((3, 3, 3), 8, 4, 2, window=1, stride=1, pool=False, groups=2),
        ResNet("resnext29", 10, 0.125, 1, padding="torch", cardinality=2, group_width=16),
    ),
    "torchvision resnet20": (
        lambda: TorchResNet((3, 3, 3), 16, 16, 0, window=3, stride=1, pool=False, classifier="linear"),
        ResNet("resnet20", 10, 1.0, 1, padding="torch"),
    ),
    "timm mobilenetv2_small": (
        lambda: TimmMobileNet(SMALL_ROWS, 8, 256, same=False, eps=1e-5),
        MobileNet("mobilenetv2_small", 10, 0.35, 1, padding="torch"),
    ),
    "timm_tf efficientnet_lite0": (
        lambda: TimmMobileNet(lite0_rows(LITE0_NARROW), 8, 1280, same=True, eps=1e-3),
        MobileNet("efficientnet_lite0", 10, 0.1, 1, padding="same", batch_norm_epsilon=1e-3),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_the_source_networks(name: str, tmp_path) -> None:
    """On maps with odd sides for MobileNets, where the two paddings differ most."""
    make, network = NETWORKS[name]
    source = name.split()[0]
    module = randomise(make(), 1)
    torch.save({"state_dict": module.state_dict(), "epoch": 3}, tmp_path / "weights.pth")
    images = images_of(33 if isinstance(network, MobileNet) else 32)
    tensors = read_weights(str(tmp_path / "weights.pth"))
    conventions = FORMATS[source].conventions
    assert (network.padding, network.batch_norm_epsilon) == (conventions.padding, conventions.batch_norm_epsilon)
    found = imported_logits(network, tensors, source, images)
    assert relative_error(found, torch_logits(module, images)) < 1e-4
    assert count_classes(tensors, source, network) == 10


def test_unpruned_frequency_layers_change_nothing(tmp_path) -> None:
    make, network = NETWORKS["timm mobilenetv2_small"]
    module, images = randomise(make(), 2), images_of(16)
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    tensors = read_weights(str(tmp_path / "weights.pth"))
    found = imported_logits(network.clone(block=2), tensors, "timm", images, "soft")
    assert relative_error(found, torch_logits(module, images)) < 1e-4
