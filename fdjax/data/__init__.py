"""Data: sources, augmentation and batching. TensorFlow is never imported, and TFDS only for one of its sets."""

from fdjax.data.augment import (
    augment,
    color_jitter,
    cutout,
    mixup,
    normalize,
    random_crop,
    random_erase,
    random_flip,
    random_part,
)
from fdjax.data.batches import TrainingOrder, batch_indices, epoch_order, steps_per_epoch
from fdjax.data.decode import load_image
from fdjax.data.images import Images, ResizedImages, StoredImages, take_rows
from fdjax.data.sources import Dataset, check_source, describe_source, load_dataset
from fdjax.data.splits import channel_statistics, limit_training, split_validation, training_statistics
from fdjax.data.stored import open_dataset
from fdjax.data.stream import RandomResizedCrop, TrainingStream
from fdjax.data.tfds_sets import FASHION_MNIST_SUBSET, FOLDER, PREPARED
from fdjax.data.unlabelled import read_pictures, with_unlabelled

__all__ = [
    "FASHION_MNIST_SUBSET",
    "FOLDER",
    "PREPARED",
    "Dataset",
    "Images",
    "RandomResizedCrop",
    "ResizedImages",
    "StoredImages",
    "TrainingOrder",
    "TrainingStream",
    "augment",
    "batch_indices",
    "channel_statistics",
    "check_source",
    "color_jitter",
    "cutout",
    "describe_source",
    "epoch_order",
    "limit_training",
    "load_dataset",
    "load_image",
    "mixup",
    "normalize",
    "open_dataset",
    "random_crop",
    "random_erase",
    "random_flip",
    "random_part",
    "read_pictures",
    "split_validation",
    "steps_per_epoch",
    "take_rows",
    "training_statistics",
    "with_unlabelled",
]
