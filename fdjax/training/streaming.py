"""Makes the stream of a run's training examples if they are not in memory."""

from __future__ import annotations

import numpy as np

from fdjax.config import Config
from fdjax.data import Images, RandomResizedCrop, StoredImages, TrainingOrder, TrainingStream
from fdjax.training.devices import Devices
from fdjax.training.feed import Feed


def training_stream(
    config: Config, images: Images, labels: np.ndarray, order: TrainingOrder, devices: Devices
) -> TrainingStream | None:
    """Makes the stream of batches of stored images.

    Args:
      config: the run's config.
      images: images of the training set, uint8 [n, H, W, C].
      labels: int [n].
      order: the order of the examples.
      devices: the devices over which a batch is sharded.

    Returns:
      The stream of this process's part of each batch; None if the images are in memory.
    """
    data = config.data
    if not isinstance(images, StoredImages):
        return None
    return TrainingStream(
        images,
        labels,
        order.rows,
        seed=config.seed,
        crop=RandomResizedCrop.asked(data.random_resized_crop, data.crop_area),
        threads=data.workers,
        part=devices.local_part(data.batch_size),
    )


def make_feed(config: Config, devices: Devices, images: Images, labels: np.ndarray, order: TrainingOrder) -> Feed:
    """Makes the feed that gives a run its batches.

    Args:
      config: config of the run.
      devices: the devices that the batches are sharded over.
      images: images of the training set, [n, H, W, C].
      labels: labels of the training set, [n].
      order: the order of the examples.

    Returns:
      The feed.
    """
    return Feed(
        devices,
        images,
        labels,
        resident={"auto": None, "yes": True, "no": False}[config.compute.data_on_device],
        steps_per_dispatch=config.compute.steps_per_dispatch,
        stream=training_stream(config, images, labels, order, devices),
    )
