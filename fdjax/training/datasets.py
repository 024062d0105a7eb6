"""Opens the data set that a config names."""

from __future__ import annotations

from fdjax.config import DataConfig
from fdjax.data import Dataset, check_source, limit_training, open_dataset, with_unlabelled


def open_data(data: DataConfig, seed: int) -> Dataset:
    """Opens a data set, in memory or streamed from disk, and applies `data.unlabelled` and `data.train_limit`.

    Raises:
      UserError: if the data set is missing or not as it should be.
    """
    check_source(data.name, data.path)
    dataset = open_dataset(
        data.name,
        data.path,
        data.image_size,
        data.grayscale,
        stream=data.loading == "stream",
        crop_share=data.eval_crop,
        background=data.background,
    )
    if data.unlabelled is not None:
        dataset = with_unlabelled(dataset, data.unlabelled, data.background)
    return limit_training(dataset, data.train_limit, seed)
