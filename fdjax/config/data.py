"""The images of a run."""

from __future__ import annotations

import dataclasses
from typing import Literal

from PIL import ImageColor

from fdjax.config.checked import Checked


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """The images, and how they are batched and augmented."""

    name: str = "fashion_mnist_subset"
    """Data set: fashion_mnist_subset (embedded), folder or prepared (both need path), or a TFDS set (cifar10, ...)."""
    path: str | None = None
    """Directory of the data. folder: the one with train/<class>/* and test/<class>/*. prepared: that of one TFDS set.
    A TFDS name: TFDS's data directory (default: TFDS's own)."""
    image_size: int | tuple[int, int] | None = None
    """Size in pixels, of a square or of height and width, to which the middle of each image is resized (folder and
    TFDS; default: images keep their size)."""
    background: str = "white"
    """Colour behind the transparent parts of an image: an English name, or #rrggbb."""
    validation: float = 0.0
    """Share of the training set, 0 to below 1, held out (seeded, class by class) to choose the best checkpoint."""
    train_limit: int | None = None
    """Number of training images to use (seeded, the same share of each class); None: all."""
    loading: Literal["memory", "stream"] = "memory"
    """Where images are held. memory: all are decoded once and kept in memory. stream: they stay on disk and are decoded
    as needed, for sets larger than memory (folder, prepared, TFDS; needs image_size)."""
    workers: int | None = None
    """Number of threads that decode a streamed set (None: one per processor); results do not depend on it."""
    random_resized_crop: bool = False
    """Train on a random part of each image, 8 to 100% of its area, resized, as is usual for ImageNet (stream only)."""
    crop_area: float = 0.0
    """Least share of an image's area, 0 to 1, of the random part to train on, which is resized (0: off). 0.5 is gentle
    enough for fine-tuning. Works in memory too."""
    eval_crop: float = 1.0
    """Side of the square cut from the middle of a test image, as a share of its shorter side; 0.875 is usual for
    ImageNet (stream only)."""
    unlabelled: str | None = None
    """Folder of images, at any depth, to train on in place of the set's training images. They need no labels:
    distill.weight must be 1, and the network must come from --init."""
    grayscale: bool = False
    """Convert the images of a folder or TFDS set to grey (one channel)."""
    batch_size: int = 128
    """Images per step."""
    crop_padding: int = 4
    """Zero padding in pixels before the random crop back to size (0: no random crop)."""
    flip: bool = True
    """Flip images horizontally at random."""
    jitter: float = 0.0
    """Strength of the colour jitter, 0 to 1: factors of brightness, contrast and saturation are 1 - jitter to
    1 + jitter."""
    cutout: int = 0
    """Side in pixels of a square that is cut out of each image at a random place (0: none)."""
    erase: float = 0.0
    """Probability, 0 to 1, that a random rectangle of 2 to 33% of an image is erased."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weights of classes in the loss. balanced: inverse to the number of a class's examples, so that all classes count
    equally."""
    mixup: float = 0.0
    """Parameter of mixup: pairs of images and labels are mixed by a share from Beta(mixup, mixup). 0: off; 0.2 is
    common."""

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) of `image_size`."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def _check(self) -> None:
        self._require(0 <= self.validation < 1, "validation", "a share from 0 to below 1")
        self._require(
            self.unlabelled is None or not self.validation,
            "validation",
            "0 with data.unlabelled, whose images have no labels for validation",
        )
        self._require(self.train_limit is None or self.train_limit >= 1, "train_limit", "at least 1, or None")
        self._require(self.batch_size >= 1, "batch_size", "at least 1")
        self._require(0 <= self.crop_padding <= 1024, "crop_padding", "from 0 to 1,024 pixels")
        streamed = self.loading == "stream"
        self._require(
            not streamed or self.image_size is not None, "image_size", "a number of pixels when loading is 'stream'"
        )
        self._require(
            not streamed or self.name != "fashion_mnist_subset", "loading", "'memory' for the embedded subset"
        )
        self._require(self.workers is None or 1 <= self.workers <= 1024, "workers", "from 1 to 1,024, or None")
        self._require(streamed or not self.random_resized_crop, "random_resized_crop", "off unless loading is 'stream'")
        self._require(
            not (self.random_resized_crop and self.crop_padding),
            "crop_padding",
            "0 with random_resized_crop, which replaces the random crop",
        )
        self._require(0 <= self.crop_area <= 1, "crop_area", "a share from 0 to 1")
        self._require(
            not self.crop_area or not (self.random_resized_crop or self.crop_padding),
            "crop_area",
            "0 with random_resized_crop or crop_padding, which are other random crops",
        )
        self._require(0 < self.eval_crop <= 1, "eval_crop", "a share above 0 and at most 1")
        self._require(streamed or self.eval_crop == 1, "eval_crop", "1 unless loading is 'stream'")
        self._require(0 <= self.jitter <= 1, "jitter", "from 0 to 1")
        self._require(0 <= self.cutout <= 65_536, "cutout", "from 0 to 65,536 pixels")
        self._require(0 <= self.erase <= 1, "erase", "a probability from 0 to 1")
        self._require(self.mixup >= 0, "mixup", "0 or more")
        self._require(
            self.size is None or 1 <= min(self.size) <= max(self.size) <= 16_384,
            "image_size",
            "from 1 to 16,384 pixels, or None",
        )
        self._require(_is_colour(self.background), "background", "a colour's name in English, or #rrggbb")
        self._require(
            self.name not in ("folder", "prepared") or self.path is not None,
            "path",
            f"a directory when name is {self.name!r}",
        )


def _is_colour(name: str) -> bool:
    try:
        ImageColor.getrgb(name)
    except ValueError:
        return False
    return True
