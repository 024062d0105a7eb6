"""The stream of a run's training examples, where they do not lie in memory."""

from __future__ import annotations

import numpy as np

from fdjax.config import Config
from fdjax.data import Images, RandomResizedCrop, StoredImages, TrainingOrder, TrainingStream
from fdjax.training.devices import Devices


def training_stream(
    config: Config, images: Images, labels: np.ndarray, order: TrainingOrder, devices: Devices
) -> TrainingStream | None:
    """Batches of stored images in the run's order; None where the images are in memory.

    Args:
      config: of the run.
      images: of the training set.
      labels: int [n].
      order: of the examples.
      devices: among which a batch is split.
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
