"""Makes the feed of a run: from memory, or a stream of examples from disk."""

from __future__ import annotations

import numpy as np

from fdjax.config import Config
from fdjax.data import Images, RandomResizedCrop, StoredImages, TrainingOrder, TrainingStream
from fdjax.training.devices import Devices
from fdjax.training.feed import Feed


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
    data, stream = config.data, None
    if isinstance(images, StoredImages):
        stream = TrainingStream(
            images,
            labels,
            order.rows,
            seed=config.seed,
            crop=RandomResizedCrop.asked(data.random_resized_crop, data.crop_area),
            threads=data.workers,
            part=devices.local_part(data.batch_size),
        )
    return Feed(
        devices,
        images,
        labels,
        resident={"auto": None, "yes": True, "no": False}[config.compute.data_on_device],
        steps_per_dispatch=config.compute.steps_per_dispatch,
        stream=stream,
    )
