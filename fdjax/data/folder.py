"""An image folder's layout: `train/<class>/*` and `test/<class>/*`."""

from __future__ import annotations

import os
from pathlib import Path

from fdjax.errors import UserError, suggestion

# The names that the folder of test images may have, the first that is there.
TEST_FOLDERS = ("test", "validation", "val")


def list_folder(root: Path) -> dict[str, dict[str, list[str]]]:
    """Returns {split: {class: sorted files}}, classes sorted; raises UserError when the layout is wrong."""
    layout = "an image folder holds train/<class>/* and test/<class>/*"
    if not root.is_dir():
        raise UserError(f"the data path {root} is {'no folder' if root.exists() else 'not there'}; {layout}")
    listing = {}
    test = next((name for name in TEST_FOLDERS if (root / name).is_dir()), "test")
    for split, name in (("train", "train"), ("test", test)):
        folder = root / name
        if not folder.is_dir():
            raise UserError(f"the data folder {root} has no folder {split!r}; {layout}")
        classes = {}
        for class_folder in scan(folder):
            if not class_folder.is_dir():
                continue
            entries = scan(class_folder.path)
            for entry in entries:
                if entry.is_dir():
                    raise UserError(f"{entry.path} is a folder, but {layout}")
            if not entries:
                raise UserError(f"the class folder {class_folder.path} holds no images")
            classes[class_folder.name] = [entry.path for entry in entries]
        listing[split] = classes
    known = listing["train"]
    if len(known) < 2:
        found = f"only the class {next(iter(known))!r}" if known else "no class folders"
        raise UserError(f"the folder {root / 'train'} has {found}; at least two classes are needed, and {layout}")
    for name in listing["test"]:
        if name not in known:
            raise UserError(
                f"the class folder {root / test / name} has no counterpart in {root / 'train'}{suggestion(name, known)}"
            )
    if not listing["test"]:
        raise UserError(f"the folder {root / test} has no class folders; {layout}")
    return listing


def scan(folder: str | Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, by name, without hidden files; raises UserError where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read: {error.strerror}") from error
