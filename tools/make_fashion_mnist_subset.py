"""Writes the Fashion-MNIST subset that comes with fdjax from the four original idx.gz files.

    python tools/make_fashion_mnist_subset.py --source DIR

DIR holds `train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz`, `t10k-images-idx3-ubyte.gz` and
`t10k-labels-idx1-ubyte.gz` (https://github.com/zalandoresearch/fashion-mnist, or Debian's package
`dataset-fashion-mnist`). The same source and seed give the same file, byte for byte (with the same zlib).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import math
import os
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np

NUM_CLASSES = 10
TRAIN_PER_CLASS = 1000
TEST_PER_CLASS = 200
MAX_BYTES = 6_000_000
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "fdjax" / "data" / "fashion_mnist_subset.npz"


def read_idx(path: Path) -> np.ndarray:
    """Reads a gzipped idx file of unsigned bytes.

    Args:
      path: the file.

    Returns:
      uint8 array with the shape the file's header gives.

    Raises:
      ValueError: the file is not an idx file of unsigned bytes, or its length does not match its header.
    """
    with gzip.open(path, "rb") as file:
        data = file.read()
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    rank = data[3]
    start = 4 + 4 * rank
    if len(data) < start:
        raise ValueError(f"{path} ends within its header")
    shape = struct.unpack(f">{rank}I", data[4:start])
    if len(data) != start + math.prod(shape):
        raise ValueError(f"{path} has {len(data) - start} bytes of data; its header says {shape}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def choose_balanced(labels: np.ndarray, per_class: int, seed: int, stream: int) -> np.ndarray:
    """Chooses `per_class` examples of each class at random, in random order.

    Args:
      labels: uint8 [n], 0..9.
      per_class: how many of each class.
      seed: the seed; `stream` keeps the train and the test choice independent.
      stream: a small number, different for each choice.

    Returns:
      int64 [10 * per_class] indices into `labels`.

    Raises:
      ValueError: a class has fewer than `per_class` examples.
    """
    # NumPy guarantees the raw streams of its bit generators in all versions, but not its shuffles.
    bits = np.random.Philox(np.random.SeedSequence([seed, stream]))
    order = np.argsort(bits.random_raw(len(labels)), kind="stable")
    chosen = []
    for label in range(NUM_CLASSES):
        of_class = order[labels[order] == label]
        if len(of_class) < per_class:
            raise ValueError(f"class {label} has {len(of_class)} examples; {per_class} are needed")
        chosen.append(of_class[:per_class])
    joined = np.concatenate(chosen)
    return joined[np.argsort(bits.random_raw(len(joined)), kind="stable")]


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """Returns `arrays` as the bytes of a compressed .npz that `numpy.load` reads.

    `numpy.savez_compressed` writes the time of day into the zip; here the date is fixed.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for key, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            info.external_attr = 0o644 << 16
            archive.writestr(info, member.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)
    return out.getvalue()


def make_subset(source: Path, seed: int) -> dict[str, np.ndarray]:
    """Returns the subset of the full data set in `source`.

    Returns:
      `train_images` uint8 [10000, 28, 28], `train_labels` uint8 [10000], `test_images` uint8 [2000, 28, 28],
      `test_labels` uint8 [2000].

    Raises:
      OSError: a file is missing or unreadable.
      ValueError: a file is damaged or does not fit its partner.
    """
    subset = {}
    splits = (("train", "train", TRAIN_PER_CLASS), ("test", "t10k", TEST_PER_CLASS))
    for stream, (split, prefix, per_class) in enumerate(splits):
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{prefix}: images {images.shape} and labels {labels.shape} are not those of Fashion-MNIST"
            )
        chosen = choose_balanced(labels, per_class, seed, stream)
        subset[f"{split}_images"] = images[chosen]
        subset[f"{split}_labels"] = labels[chosen]
    return subset


def main() -> int:
    """Parses the command line and writes the file; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="folder with the four original idx.gz files")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the .npz to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice and its order (default: %(default)s)")
    args = parser.parse_args()
    try:
        data = npz_bytes(make_subset(args.source, args.seed))
    except (OSError, EOFError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if len(data) >= MAX_BYTES:
        print(f"error: the subset takes {len(data)} bytes; it must stay below {MAX_BYTES}", file=sys.stderr)
        return 1
    partial = args.out.with_suffix(".partial")
    partial.write_bytes(data)
    os.replace(partial, args.out)
    print(f"{args.out}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
