"""Preparation of TFDS sets, in array_record and without TensorFlow, from files in their original layouts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fdjax.data.prepare.cifar import PUBLISHED as _CIFAR_PUBLISHED
from fdjax.data.prepare.cifar import open_cifar
from fdjax.data.prepare.folders import open_folder
from fdjax.data.prepare.idx import open_idx
from fdjax.data.prepare.imagenet import open_imagenet
from fdjax.data.prepare.source import Source, check_files
from fdjax.data.prepare.writer import write_set
from fdjax.data.tfds_sets import (
    FASHION_MNIST_SUBSET,
    FOLDER,
    MANIFEST_FILE,
    PREPARED,
    TFDS_NAME,
    default_data_dir,
    tfds_names,
)
from fdjax.errors import UserError, suggestion

CIFAR, IDX, IMAGENET = ("cifar10", "cifar100"), ("mnist", "fashion_mnist", "kmnist"), "imagenet2012"

__all__ = ["CIFAR", "IDX", "IMAGENET", "MANIFEST_FILE", "prepare"]


def prepare(
    name: str,
    source: str,
    out: str | None = None,
    *,
    labels: str | None = None,
    skip_damaged: bool = False,
    unpublished: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Prepares a set that TFDS and `load_dataset` then find by its name.

    Args:
      name: `cifar10`, `cifar100` (binary or python version), `mnist`, `fashion_mnist`, `kmnist` (idx files),
        `imagenet2012` (its tar files), or a new name for a folder with `train/<class>/*` and `test/<class>/*`.
      source: the archive or the folder.
      out: TFDS's data directory (default: TFDS's own).
      labels: the file of the validation labels, for `imagenet2012` (see `open_imagenet`).
      skip_damaged: whether to leave out damaged examples and count them; otherwise the first one is an error.
      unpublished: whether to accept files and counts that differ from the published set's.

    Returns:
      The set's folder, and its manifest.

    Raises:
      UserError: as in `write_set`; or the source is missing, incomplete, or not the published one.
    """
    path, data_dir = Path(source).expanduser(), Path(out or default_data_dir()).expanduser()
    if not path.exists():
        raise UserError(f"the source {path} is not there")
    if labels is not None and name != IMAGENET:
        raise UserError(f"--labels is for {IMAGENET}'s validation pictures; {name} has its labels in its files")
    _check_writable(data_dir)
    set_ = _open(name, path, Path(labels).expanduser() if labels else None, skip_damaged, unpublished)
    return write_set(set_, data_dir, skip_damaged=skip_damaged)


def _open(name: str, path: Path, labels: Path | None, skip_damaged: bool, unpublished: bool) -> Source:
    stock = name in (*CIFAR, *IDX, IMAGENET)
    if not stock:
        match = TFDS_NAME.fullmatch(name)
        if match is None or match["config"] or match["version"] or name != name.lower():
            raise UserError(f"a set cannot be named {name!r}: give lower-case letters, digits and _, a letter first")
        if name in (FASHION_MNIST_SUBSET, FOLDER, PREPARED):
            raise UserError(f"--data.name {name} means something else; give the set another name")
        if name in tfds_names():
            raise UserError(
                f"{name} is another set of TFDS, whose original layout fdjax does not know; it knows those of "
                f"{', '.join((*CIFAR, *IDX, IMAGENET))}. Give the set of a folder another name"
            )
        if path.is_file() or not (path / "train").is_dir():
            known = suggestion(name, (*CIFAR, *IDX, IMAGENET))
            raise UserError(f"{path} is not a folder with train/<class>/* and test/<class>/*, from which to prepare "
                            f"{name!r}{known}")  # fmt: skip
        return open_folder(name, path)
    import tensorflow_datasets as tfds

    # With a data directory that does not exist, the builder reads nothing and does not use the network.
    builder: Any = tfds.builder(name, data_dir=os.fspath(path / "no data directory"), try_gcs=False)
    if not unpublished:
        published = {url.filename: ("sha256", url.checksum) for url in builder.url_infos.values()}
        candidates = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.is_file())
        check_files(candidates, {**published, **_CIFAR_PUBLISHED})
    if name in CIFAR:
        source = open_cifar(name, path, builder, skip_damaged=skip_damaged)
    elif name in IDX:
        source = open_idx(name, path, builder, skip_damaged=skip_damaged)
    else:
        source = open_imagenet(path, builder, labels)
    if not unpublished and not skip_damaged:
        source.check_counts()
    return source


def _check_writable(data_dir: Path) -> None:
    existing = next(path for path in (data_dir.absolute(), *data_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--out {data_dir}: {existing} is a file; give a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out {data_dir}: {existing} is not writable; give another one")
