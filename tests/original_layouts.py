"""Small sets in the layouts in which people have them: CIFAR, idx files, ImageNet's tar files, folders."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def random_pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def cifar10_examples(per_batch: int = 10) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """File stem -> images [n, 32, 32, 3] and labels."""
    stems = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    return {
        stem: (random_pixels(seed, per_batch, 32, 32, 3), np.arange(per_batch) * 3 % 10)
        for seed, stem in enumerate(stems)
    }


def _planes(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def write_cifar10_binary(folder: Path, per_batch: int = 10) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, (images, labels) in cifar10_examples(per_batch).items():
        records = np.concatenate([labels[:, None].astype(np.uint8), _planes(images)], axis=1)
        (folder / f"{stem}.bin").write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_CLASSES) + "\n\n")
    return folder


def write_cifar10_python(archive: Path, per_batch: int = 10) -> Path:
    """The archive as it is published."""
    files: dict[str, Any] = {"batches.meta": {b"label_names": [name.encode() for name in CIFAR10_CLASSES]}}
    for stem, (images, labels) in cifar10_examples(per_batch).items():
        files[stem] = {b"data": _planes(images), b"labels": labels.tolist()}
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            add_member(tar, f"cifar-10-batches-py/{name}", pickle.dumps(content, protocol=2))
    return archive


def write_cifar100(folder: Path, *, binary: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    coarse, fine = [f"coarse{n}" for n in range(20)], [f"fine{n}" for n in range(100)]
    if binary:
        (folder / "coarse_label_names.txt").write_text("\n".join(coarse))
        (folder / "fine_label_names.txt").write_text("\n".join(fine))
    else:
        (folder / "meta").write_bytes(pickle.dumps({"coarse_label_names": coarse, "fine_label_names": fine}))
    for seed, stem in enumerate(("train", "test")):
        images, labels = random_pixels(seed, 100, 32, 32, 3), np.arange(100)
        if binary:
            columns = np.stack([labels // 5, labels], axis=1).astype(np.uint8)
            (folder / f"{stem}.bin").write_bytes(np.concatenate([columns, _planes(images)], axis=1).tobytes())
        else:
            batch = {"data": _planes(images), "fine_labels": labels.tolist(), "coarse_labels": (labels // 5).tolist()}
            (folder / stem).write_bytes(pickle.dumps(batch))
    return folder


def write_idx(file: Path, array: np.ndarray) -> None:
    content = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def write_idx_folder(folder: Path, count: int = 64, end: str = ".gz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, prefix in enumerate(("train", "t10k")):
        write_idx(folder / f"{prefix}-images-idx3-ubyte{end}", random_pixels(seed, count, 28, 28))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{end}", (np.arange(count) * 7 % 10).astype(np.uint8))
    return folder


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def jpeg(pixels: np.ndarray, mode: str = "RGB", file_format: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, file_format)
    return stream.getvalue()


SYNSETS = ("n01440764", "n01443537", "n02105855")


def write_imagenet(folder: Path) -> Path:
    """Three classes of two pictures, among them a grey one, one in CMYK and a PNG of the name .JPEG; no devkit."""
    folder.mkdir(parents=True, exist_ok=True)
    odd = {(0, 1): ("L", "JPEG"), (1, 0): ("CMYK", "JPEG"), (2, 0): ("RGB", "PNG")}
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for c, synset in enumerate(SYNSETS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i in range(2):
                    picture = jpeg(np.full((20 + i, 30, 3), 60 * c + 20, np.uint8), *odd.get((c, i), ()))
                    add_member(tar, f"{synset}_{i}.JPEG", picture)
            add_member(outer, f"{synset}.tar", inner.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in (2, 1, 3):
            add_member(tar, f"ILSVRC2012_val_{number:08}.JPEG", jpeg(np.full((24, 24, 3), 10 * number, np.uint8)))
    return folder


def write_folder(root: Path, per_class: int = 5) -> Path:
    """CIFAR-10's examples, or as many as there are, as PNG files in class folders."""
    for stem, (images, labels) in cifar10_examples().items():
        split = "test" if stem == "test_batch" else "train"
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = root / split / CIFAR10_CLASSES[label] / f"{stem}_{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    return root
