"""Data: sources, augmentation and batching. Never imports TensorFlow; TFDS only when one of its sets is asked for."""

from fdjax.data.augment import augment, normalize, random_crop, random_flip
from fdjax.data.batches import batch_indices, epoch_order, steps_per_epoch
from fdjax.data.sources import (
    FASHION_MNIST_SUBSET,
    FOLDER,
    Dataset,
    channel_statistics,
    check_source,
    describe_source,
    limit_training,
    load_dataset,
    load_image,
    split_validation,
)

__all__ = [
    "FASHION_MNIST_SUBSET",
    "FOLDER",
    "Dataset",
    "augment",
    "batch_indices",
    "channel_statistics",
    "check_source",
    "describe_source",
    "epoch_order",
    "limit_training",
    "load_dataset",
    "load_image",
    "normalize",
    "random_crop",
    "random_flip",
    "split_validation",
    "steps_per_epoch",
]
