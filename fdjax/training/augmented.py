"""Training images after augmentation, as a run sees them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.config import Config
from fdjax.data import (
    RandomResizedCrop,
    StoredImages,
    TrainingStream,
    augment,
    mixup,
    take_rows,
    training_statistics,
)
from fdjax.training.datasets import open_data


def augmented_rows(config: Config, count: int, times: int) -> list[tuple[str, list[np.ndarray]]]:
    """Augments some training images as the steps of a run would.

    Args:
      config: the run's config; it names the data set and the augmentation.
      count: number of images; they are spread evenly over the training set.
      times: number of augmented versions of each image.

    Returns:
      For each image its class name, and the image and its versions, uint8 [H, W, C]. Mixup mixes an image with that of
      the row above.
    """
    data = config.data
    dataset = open_data(data, config.seed)
    chosen = np.linspace(0, len(dataset.train_labels) - 1, count).astype(int)
    labels = dataset.train_labels[chosen]
    images = take_rows(dataset.train_images, chosen)
    plain = np.asarray(images[:])
    fill, _ = training_statistics(dataset, config.seed)
    crop = RandomResizedCrop.asked(data.random_resized_crop, data.crop_area)

    def once(key: jax.Array, images: jax.Array) -> jax.Array:
        batch = augment(
            key,
            images,
            data.crop_padding,
            data.flip,
            jitter=data.jitter,
            cutout_size=data.cutout,
            erase=data.erase,
            fill=np.array(fill, np.float32),
            crop_area=0.0 if data.loading == "stream" else data.crop_area,
        ).astype(jnp.float32)
        if data.mixup:
            batch, _ = mixup(jax.random.fold_in(key, 2), batch, jnp.asarray(labels), dataset.num_classes, data.mixup)
        return jnp.clip(jnp.round(batch), 0, 255).astype(jnp.uint8)

    rows = [[image] for image in plain]
    shown = plain
    for time in range(times):
        if isinstance(images, StoredImages):
            stream = TrainingStream(images, labels, lambda step: np.arange(count), seed=config.seed, crop=crop)
            shown, _ = next(stream.batches(time, time + 1))
        key = jax.random.fold_in(jax.random.key(config.seed), time)
        for row, image in zip(rows, np.asarray(jax.jit(once)(key, jnp.asarray(shown))), strict=True):
            row.append(image)
    return [(dataset.class_names[label], row) for label, row in zip(labels, rows, strict=True)]
