"""MNIST, Fashion-MNIST and KMNIST from their four idx files, compressed by gzip or not."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fdjax.data.prepare.source import Source, SourceSplit, with_class_names
from fdjax.errors import UserError

EXPECTED = {"train": 60_000, "test": 10_000}
_PREFIXES = {"train": "train", "test": "t10k"}
_MAGIC = {"images": (0x803, 3), "labels": (0x801, 1)}


def open_idx(name: str, path: Path, builder: Any, *, skip_damaged: bool) -> Source:
    """Reads a set from the folder of its idx files.

    Args:
      name: `mnist`, `fashion_mnist` or `kmnist`.
      path: the folder with train-images-idx3-ubyte, train-labels-idx1-ubyte and their t10k counterparts, .gz or not.
      builder: TFDS's builder of the set.
      skip_damaged: whether to use the whole images of a truncated file.

    Returns:
      The source.

    Raises:
      UserError: files are missing, damaged or of another format.
    """
    if not path.is_dir():
        raise UserError(f"the source {path} is not a folder; {name} needs one with four idx files")
    features = builder.info.features
    with_class_names(features, "label", features["label"].names)
    splits, files = {}, []
    for split, prefix in _PREFIXES.items():
        image_file, label_file = (_find(path, prefix, kind) for kind in ("images", "labels"))
        files += [image_file, label_file]
        images = _read(image_file, "images", skip_damaged)
        labels = _read(label_file, "labels", skip_damaged)
        if images.shape[1:] != (28, 28):
            raise UserError(f"{image_file} has images of {images.shape[1:]}; {name} has 28x28 pixels")
        if len(images) != len(labels) and not skip_damaged:
            raise UserError(f"{image_file} has {len(images):,} images, but {label_file} {len(labels):,} labels")
        splits[split] = _split(image_file, images, label_file, labels)
    return Source(name, str(builder.version), features, splits, files, {}, EXPECTED)


def _split(image_file: Path, images: np.ndarray, label_file: Path, labels: np.ndarray) -> SourceSplit:
    count = min(len(images), len(labels))

    def read(index: int) -> dict[str, Any]:
        png = io.BytesIO()
        Image.fromarray(images[index]).save(png, "PNG")
        return {"image": png.getvalue()}

    return SourceSplit(
        count,
        read,
        lambda index: int(labels[index]),
        lambda index: f"{image_file}, index {index} (its label in {label_file.name} at offset {8 + index})",
        num_bytes=count * 600,
    )


def _find(folder: Path, prefix: str, kind: str) -> Path:
    number = _MAGIC[kind][1]
    names = [f"{prefix}-{kind}{dot}idx{number}-ubyte{end}" for dot in "-." for end in (".gz", "")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has no file {names[0]} (nor {names[1]})")


def _read(file: Path, kind: str, skip_damaged: bool) -> np.ndarray:
    magic, rank = _MAGIC[kind]
    content = _content(file, skip_damaged)
    header = 4 + 4 * rank
    numbers = np.frombuffer(content[: len(content) // 4 * 4][:header], ">u4")
    if len(numbers) < 1 + rank or numbers[0] != magic:
        raise UserError(f"{file} is not an idx file of {kind}: it begins with {content[:4].hex() or 'nothing'}, not "
                        f"{magic:08x}")  # fmt: skip
    shape = tuple(int(n) for n in numbers[1:])
    size = int(np.prod(shape[1:], dtype=np.int64))
    whole = min(shape[0], (len(content) - header) // size if size else 0)
    if len(content) != header + shape[0] * size and not (skip_damaged and whole):
        raise UserError(
            f"{file} is truncated or damaged: its header promises {shape[0]:,} {kind}, but it holds "
            f"{len(content) - header:,} bytes of {shape[0] * size:,}; it ends in index {whole}, at offset "
            f"{len(content):,}"
        )
    return np.frombuffer(content, np.uint8, whole * size, header).reshape(whole, *shape[1:])


def _content(file: Path, skip_damaged: bool) -> bytes:
    try:
        if file.suffix != ".gz":
            return file.read_bytes()
        with gzip.open(file) as stream:
            found = bytearray()
            try:
                while chunk := stream.read1(1 << 16):  # Reads up to the damage.
                    found += chunk
            except (EOFError, zlib.error) as error:
                if not skip_damaged:
                    raise UserError(
                        f"{file} is truncated or damaged: unpacking ends at offset {len(found):,} of the content: "
                        f"{error}"
                    ) from error
            return bytes(found)
    except OSError as error:
        raise UserError(f"the file {file} cannot be read: {error}") from error
