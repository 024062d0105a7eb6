"""The layout of an image folder: `train/<class>/*`, `test/<class>/*`, and optionally `validation/<class>/*`.

Folders come from many sources. Files that are not pictures (`Thumbs.db`, notes, sockets, leftovers of archivers) are
skipped and counted. Only what could have another meaning is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from fdjax.data.class_list import read_class_list
from fdjax.errors import UserError, suggestion

LAYOUT = "an image folder holds train/<class>/* and test/<class>/*"
# Accepted names of the validation folder. Without a test folder, the validation pictures are the test set.
VALIDATION_FOLDERS = ("validation", "val", "valid")
# A file of this name beside train lists the classes in order.
CLASS_LIST = "classes.txt"
# Folders that archivers, operating systems and file servers create.
_FOREIGN_FOLDERS = frozenset(("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"))
# Formats that Pillow opens with an external program, or that do not hold pictures.
_NO_PICTURES = frozenset(("EPS", "MPEG", "HDF5", "GRIB", "BUFR", "WMF", "PDF", "FITS"))


@dataclasses.dataclass(frozen=True)
class Listing:
    """The contents of an image folder.

    Attributes:
      splits: "train", "test" and, if it exists beside the test set, "validation" -> class -> sorted files.
      classes: the classes, in natural order ("class 2" before "class 10") or that of `classes.txt`.
      skipped: kind -> number of files and folders that were skipped.
    """

    splits: Mapping[str, Mapping[str, list[str]]]
    classes: tuple[str, ...]
    skipped: Mapping[str, int]

    def files(self, split: str) -> list[tuple[str, int]]:
        """Returns (file, label) of the pictures of a split, by class."""
        found = self.splits[split]
        return [(file, label) for label, name in enumerate(self.classes) for file in found.get(name, ())]

    @property
    def skipped_words(self) -> str:
        """What was skipped, in words; "" if nothing was."""
        return counted_kinds(self.skipped)


def list_folder(root: Path) -> Listing:
    """Lists an image folder.

    Raises:
      UserError: the layout differs, there are no pictures, or a split has classes that train does not have.
    """
    if not os.path.isdir(root):
        raise UserError(f"the data path {root} is {not_a_folder(root)}; {LAYOUT}")
    skipped: Counter[str] = Counter()
    folders = _split_folders(root)
    splits = {split: _list_split(folder, skipped, may_be_empty=split != "train") for split, folder in folders.items()}
    known = splits["train"]
    if len(known) < 2:
        found = f"only the class {next(iter(known))!r}" if known else "no class folders"
        raise UserError(f"the folder {folders['train']} has {found}; at least two classes are needed, and {LAYOUT}")
    for split, classes in splits.items():
        for name in classes:
            if name not in known:
                raise UserError(
                    f"the class folder {folders[split] / name} has no counterpart in {folders['train']}"
                    f"{suggestion(name, known)}"
                )
        if not classes:
            raise UserError(f"the folder {folders[split]} has no class folders; {LAYOUT}")
        if not any(classes.values()):
            raise UserError(f"the folder {folders[split]} holds no pictures{_beside(skipped)}; {LAYOUT}")
    return Listing(splits, _class_order(root, known), skipped)


def not_a_folder(path: Path) -> str:
    """Says in words why a path is no folder that can be read."""
    try:
        path.stat()
    except FileNotFoundError:
        return "not there"
    except OSError as error:
        return f"out of reach ({error.strerror})"
    return "not a folder"


def _split_folders(root: Path) -> dict[str, Path]:
    validation = [root / name for name in VALIDATION_FOLDERS if (root / name).is_dir()]
    if len(validation) > 1:
        raise UserError(f"the data folder {root} has both {validation[0].name} and {validation[1].name}; keep one")
    folders = {"train": root / "train", "test": root / "test"}
    if folders["test"].is_dir():
        if validation:
            folders["validation"] = validation[0]
    elif validation:
        folders["test"] = validation[0]
    for split in ("train", "test"):
        if not folders[split].is_dir():
            there = [entry.name for entry in scan(root) if entry.is_dir()][:5]
            beside = f" (it has {', '.join(there)})" if there else ""
            raise UserError(f"the data folder {root} has no folder {split!r}{beside}; {LAYOUT}")
    return folders


def _list_split(folder: Path, skipped: Counter[str], *, may_be_empty: bool) -> dict[str, list[str]]:
    """Returns class -> files."""
    classes = {}
    for entry in scan(folder, skipped):
        if not entry.is_dir():
            skipped["files beside class folders"] += 1
            continue
        if entry.name != readable(entry.name):
            raise UserError(f"the class folder {readable(entry.path)} has a name that is not UTF-8; rename it")
        files = []
        for inner in scan(entry.path, skipped):
            if inner.is_dir():
                raise UserError(f"{inner.path} is a folder, but {LAYOUT}")
            kind = foreign_kind(inner)
            if kind is None:
                files.append(inner.path)
            else:
                skipped[kind] += 1
        if not files and not may_be_empty:
            raise UserError(f"the class folder {entry.path} holds no images{_beside(skipped)}; remove it, or fill it")
        classes[entry.name] = files
    return classes


def _beside(skipped: Mapping[str, int]) -> str:
    return f" (passed over: {counted_kinds(skipped)})" if skipped else ""


def counted_kinds(skipped: Mapping[str, int]) -> str:
    """Returns kinds of files with their numbers, in words; "" if there are none."""
    return ", ".join(f"{count:,} {kind}" for kind, count in skipped.items())


def _class_order(root: Path, known: Mapping[str, list[str]]) -> tuple[str, ...]:
    file = root / CLASS_LIST
    if not file.is_file():
        return tuple(sorted(known, key=natural))
    listed = read_class_list(str(file), "the list of classes")
    if set(listed) != set(known):
        odd = sorted(set(known) ^ set(listed), key=natural)
        raise UserError(
            f"the list of classes {file} and the folders in {root / 'train'} differ in {', '.join(odd[:5])}"
            f"{f' and {len(odd) - 5} more' if len(odd) > 5 else ''}; correct or remove the file"
        )
    return listed


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Returns a sort key that puts "class 2" before "class 10"."""
    parts = re.split(r"([0-9]+)", name)
    return (*((0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts if part), (2, 0, name))


def foreign_kind(entry: os.DirEntry[str]) -> str | None:
    """Returns what kind of file a file is if it is not a picture, or None if it is one, sound or damaged."""
    try:
        mode = entry.stat().st_mode
    except OSError:
        return "broken links"
    if not stat.S_ISREG(mode):
        return "special files"
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix in picture_suffixes():
        return None
    if suffix:
        return f"files {suffix}"
    try:  # A picture may have lost its suffix.
        with Image.open(entry.path):
            return None
    except UnidentifiedImageError:
        return "files that are not pictures"
    except Exception:  # A damaged picture; the error when it is read says more.
        return None


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """Returns the suffixes of the files that Pillow opens, in lower case, with their dots."""
    Image.init()
    return frozenset(
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _NO_PICTURES
    )


def readable(path: str) -> str:
    """Returns a path with a replacement character for each byte that is not UTF-8, so that it can be written."""
    return os.fsencode(path).decode("utf-8", "replace")


def scan(folder: str | Path, skipped: Counter[str] | None = None) -> list[os.DirEntry[str]]:
    """Lists a folder by name, without hidden and system files; raises `UserError` if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read: {error.strerror}") from error
    kept = [e for e in found if not e.name.startswith(".") and not (e.name in _FOREIGN_FOLDERS and e.is_dir())]
    if skipped is not None and len(kept) < len(found):
        skipped["hidden or system files and folders"] += len(found) - len(kept)
    return kept
