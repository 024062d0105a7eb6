"""Writes CIFAR-10 as the folder of pictures that the studies here read: train/CLASS/*.png and test/CLASS/*.png.

python -m fdjax data prepare cifar10 --source cifar-10-python.tar.gz --out PREPARED
python results/cifar10_as_pictures.py --prepared PREPARED --out data/cifar10
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from fdjax.data import load_dataset


def main() -> None:
    """Writes the pictures, without loss, named by their place in the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", required=True, help="folder that `fdjax data prepare cifar10` wrote")
    parser.add_argument("--out", type=Path, required=True, help="new folder of pictures")
    flags = parser.parse_args()
    dataset = load_dataset("cifar10", flags.prepared)
    splits = {
        "train": (dataset.train_images, dataset.train_labels),
        "test": (dataset.test_images, dataset.test_labels),
    }
    flags.out.mkdir(parents=True)  # It must not exist: nothing is overwritten.
    for split, (images, labels) in splits.items():
        for place, (image, label) in enumerate(zip(np.asarray(images), labels, strict=True)):
            folder = flags.out / split / dataset.class_names[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{place:05d}.png")


if __name__ == "__main__":
    main()
