"""A set from a folder of class folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fdjax.data.folder import list_folder, readable
from fdjax.data.prepare.pictures import checked_picture
from fdjax.data.prepare.source import DamagedExample, Source, SourceSplit
from fdjax.errors import UserError

VERSION = "1.0.0"


def open_folder(name: str, path: Path) -> Source:
    """Lists a folder with `train/<class>/*` and `test/<class>/*` (or `validation`, `val`).

    Args:
      name: name of the new set.
      path: path of the folder.

    Returns:
      The source.

    Raises:
      UserError: the layout differs.
    """
    import tensorflow_datasets as tfds

    listing = list_folder(path)
    class_names = list(listing.classes)
    for class_name in class_names:
        if class_name != class_name.strip():
            raise UserError(f"the class folder {class_name!r} begins or ends with a space, which TFDS drops; rename it")
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=class_names),
            "file_name": tfds.features.Text(),
        }
    )
    splits = {split: _split(listing.files(split)) for split in listing.splits}
    description = f"Images of {path.name}, {len(class_names)} classes."
    return Source(name, VERSION, features, splits, [], {"description": description})


def _split(files: list[tuple[str, int]]) -> SourceSplit:
    def read(index: int) -> dict[str, Any]:
        file = files[index][0]
        try:
            encoded = Path(file).read_bytes()
        except OSError as error:
            raise DamagedExample(f"the file {file} cannot be read: {error.strerror}") from error
        return {"image": checked_picture(encoded, file), "file_name": readable("/".join(Path(file).parts[-2:]))}

    try:
        num_bytes = sum(os.path.getsize(file) for file, _ in files)
    except OSError as error:
        raise UserError(f"the file {error.filename} cannot be read: {error.strerror}") from error
    return SourceSplit(len(files), read, lambda index: files[index][1], lambda index: files[index][0], num_bytes)
