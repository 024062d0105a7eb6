"""Photographs that come with Python packages, as folders of pictures for the commands in this folder's README.

    pip install foolbox==3.3.4 matplotlib scikit-image scikit-learn     # --no-deps will do
    python results/efficientnet_lite0/make_pictures.py OUT

Writes OUT/calibrate, from the last three packages, and OUT/compare, foolbox's twenty from ImageNet: each photograph
whole, and nine squares cut from it (seeded; 50 to 100% of its shorter side). No photograph is in both.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOGRAPHS = {
    "calibrate": {
        "scikit-image": ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
        "scikit-learn": ("china.jpg", "flower.jpg"),
        "matplotlib": ("grace_hopper.jpg",),
    },
    "compare": {"foolbox": ("imagenet_*.jpg",)},
}
CROPS, SEED = 9, 0


def main(out: Path) -> int:
    random = np.random.default_rng(SEED)
    for folder, packages in PHOTOGRAPHS.items():
        (out / folder).mkdir(parents=True)
        for package, patterns in packages.items():
            listed = importlib.metadata.files(package) or []
            for file in sorted(file for file in listed if any(file.match(pattern) for pattern in patterns)):
                image = Image.open(file.locate()).convert("RGB")  # type: ignore[arg-type]
                image.save(out / folder / f"{package}_{file.stem}.png")
                for number in range(CROPS):
                    side = round(min(image.size) * random.uniform(0.5, 1))
                    left, top = (int(random.integers(length - side + 1)) for length in image.size)
                    crop = image.crop((left, top, left + side, top + side))
                    crop.save(out / folder / f"{package}_{file.stem}_{number}.png")
        print(f"{out / folder}: {len(list((out / folder).iterdir()))} pictures")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make, new or without these two folders")
    flags = parser.parse_args()
    # Before anything is written, so that a second try finds no folder of the first.
    for package in (package for packages in PHOTOGRAPHS.values() for package in packages):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            parser.exit(2, f"error: {package} is not installed; the top of this file says which packages are needed\n")
    sys.exit(main(flags.out))
