"""Inspection of a data set: counts, sizes, problems, and a contact sheet."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from fdjax.data.batches import seeded_permutation
from fdjax.data.decode import read_pixels
from fdjax.data.folder import list_folder
from fdjax.data.oddities import fingerprint, near_pairs, odd_sizes, oddities
from fdjax.data.sources import check_source, load_dataset
from fdjax.data.tfds_sets import FASHION_MNIST_SUBSET, FOLDER, PreparedReader, find_prepared
from fdjax.errors import UserError

_SHEET_STREAM = 6
_CHUNK = 64
_TILE, _GAP, _NAME_WIDTH = 64, 2, 110
_SHEET_CLASSES = 40
_EXAMPLES_LISTED = 20


@dataclasses.dataclass(frozen=True)
class _Split:
    count: int
    example: Callable[[int], tuple[bytes, int]]
    name_of: Callable[[int], str]


@dataclasses.dataclass(frozen=True)
class _Look:
    """The properties of one image; `problem` is set if it could not be decoded."""

    label: int
    size: tuple[int, int] = (0, 0)
    form: str = ""
    digest: bytes = b""
    problem: str | None = None
    odd: tuple[str, ...] = ()
    fingerprint: tuple[int, np.ndarray] | None = None


def inspect_set(name: str, path: str | None = None, sheet: str | None = None, per_class: int = 8) -> dict[str, Any]:
    """Decodes every image of a set once and reports what it finds.

    Args:
      name: as in `load_dataset`.
      path: as in `load_dataset`.
      sheet: a PNG file to draw a contact sheet into, of at most 40 classes.
      per_class: number of random images per class on the sheet.

    Returns:
      JSON types: `classes`; `splits`, with `images`, `per_class`, `sizes` and `forms` (such as RGB, grey or CMYK);
      `problems`, a list with `kind` (unreadable, duplicates, duplicates with other labels, duplicates across splits,
      label out of range), `count` and `examples`; and `warnings`, a list of the same form, of what is not an error:
      transparency, bit depths, orientation, sizes, near-duplicates across splits, and files that were skipped in a
      folder.

    Raises:
      UserError: the set does not exist, or the sheet cannot be written.
    """
    check_source(name, path)
    if sheet is not None:
        _check_sheet(Path(sheet))
    classes, splits, skipped = _open(name, path)
    report: dict[str, Any] = {"name": name, "path": path, "classes": list(classes), "splits": {}}
    looks = {split: _look_at(part, split) for split, part in splits.items()}
    for split, found in looks.items():
        good = [look for look in found if look.problem is None]
        counts = collections.Counter(look.label for look in found)
        sizes = collections.Counter(look.size for look in good)
        report["splits"][split] = {
            "images": len(found),
            "per_class": {class_name: counts.get(number, 0) for number, class_name in enumerate(classes)},
            "sizes": {
                "different": len(sizes),
                "most_frequent": list(sizes.most_common(1)[0][0]) if sizes else None,
                "smallest": list(min(sizes, key=lambda size: size[0] * size[1])) if sizes else None,
                "largest": list(max(sizes, key=lambda size: size[0] * size[1])) if sizes else None,
            },
            "forms": dict(collections.Counter(look.form for look in good).most_common()),
        }
    report["problems"] = _problems(looks, splits, len(classes))
    report["warnings"] = _warnings(looks, splits, skipped)
    if sheet is not None:
        first = next(iter(splits))
        _draw_classes(Path(sheet), classes, splits[first], looks[first], per_class)
    return report


def _open(name: str, path: str | None) -> tuple[Sequence[str], dict[str, _Split], Mapping[str, int]]:
    """Returns the classes, the splits, and what was skipped."""
    if name == FASHION_MNIST_SUBSET:
        dataset = load_dataset(name)
        return (
            dataset.class_names,
            {
                split: _from_arrays(split, getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels"))
                for split in ("train", "test")
            },
            {},
        )
    if name == FOLDER:
        listing = list_folder(Path(path or ""))
        splits = {split: _from_files(listing.files(split)) for split in listing.splits}
        return listing.classes, splits, listing.skipped
    reader = PreparedReader(find_prepared(name, path))
    splits = {}
    for split in reader.splits().values():
        source = reader.open(split)
        splits[split] = _Split(
            len(source),
            lambda index, source=source, split=split: reader.example(source, split, index),
            lambda index, split=split: reader.name_of(split, index),
        )
    return reader.class_names, splits, {}


def _from_arrays(split: str, images: np.ndarray, labels: np.ndarray) -> _Split:
    def example(index: int) -> tuple[bytes, int]:
        png = io.BytesIO()
        Image.fromarray(images[index].squeeze(-1)).save(png, "PNG")
        return png.getvalue(), int(labels[index])

    return _Split(len(labels), example, lambda index: f"{split}, image {index}")


def _from_files(files: list[tuple[str, int]]) -> _Split:
    def example(index: int) -> tuple[bytes, int]:
        file, label = files[index]
        try:
            return Path(file).read_bytes(), label
        except OSError as error:
            raise UserError(f"the file {file} cannot be read: {error.strerror}") from error

    return _Split(len(files), example, lambda index: files[index][0])


def _look_at(split: _Split, name: str) -> list[_Look]:
    def look(index: int) -> _Look:
        label = -1
        try:
            encoded, label = split.example(index)
            header = Image.open(io.BytesIO(encoded))
            odd = oddities(header)
            mode = {"L": "grey", "1": "grey", "LA": "grey"}.get(header.mode, header.mode)
            pixels = read_pixels(encoded, 1 if mode == "grey" else 3, split.name_of(index))
        except UserError as error:
            return _Look(label, problem=str(error))
        except Exception as error:  # Pillow's plugins raise almost any exception on a damaged file.
            return _Look(label, problem=f"{split.name_of(index)} is not an image that Pillow can open: {error}")
        size = (pixels.shape[0], pixels.shape[1])
        digest = hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest()
        return _Look(label, size, mode, digest, odd=odd, fingerprint=fingerprint(pixels))

    chunks = [range(start, min(start + _CHUNK, split.count)) for start in range(0, split.count, _CHUNK)]
    found: list[_Look] = []
    with (
        concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool,
        tqdm(total=split.count, desc=f"looking at {name}", unit=" images", disable=None, leave=False) as bar,
    ):
        for looks in pool.map(lambda chunk: [look(index) for index in chunk], chunks):
            found += looks
            bar.update(len(looks))
    return found


def _problems(looks: dict[str, list[_Look]], splits: dict[str, _Split], classes: int) -> list[dict[str, Any]]:
    found: dict[str, list[str]] = collections.defaultdict(list)
    first: dict[bytes, tuple[str, int]] = {}
    for split, some in looks.items():
        for index, look in enumerate(some):
            name = splits[split].name_of(index)
            if look.problem is not None:
                found["unreadable"].append(look.problem)
                continue
            if not 0 <= look.label < classes:
                found["label out of range"].append(f"{name}: {look.label} of {classes} classes")
            earlier = first.setdefault(look.digest, (split, index))
            if earlier != (split, index):
                kind = "duplicates" if earlier[0] == split else "duplicates across splits"
                if looks[earlier[0]][earlier[1]].label != look.label:
                    kind = "duplicates with other labels"
                found[kind].append(f"{name} = {splits[earlier[0]].name_of(earlier[1])}")
    return [{"kind": kind, "count": len(some), "examples": some[:_EXAMPLES_LISTED]} for kind, some in found.items()]


def _warnings(
    looks: dict[str, list[_Look]], splits: dict[str, _Split], skipped: Mapping[str, int]
) -> list[dict[str, Any]]:
    found: dict[str, list[str]] = collections.defaultdict(list)
    for split, some in looks.items():
        for index, look in enumerate(some):
            for kind in look.odd:
                found[kind].append(splits[split].name_of(index))
        for index, kind in odd_sizes([look.size for look in some]):
            height, width = some[index].size
            found[kind].append(f"{splits[split].name_of(index)}: {height}x{width}")
    for one, other in itertools.combinations(looks, 2):
        pairs = near_pairs(*([look.fingerprint for look in looks[split]] for split in (one, other)))
        if pairs is None:
            found["near-duplicates across splits, not looked for: too many pairs"].append(f"{one} and {other}")
        for first, second in pairs or ():
            if looks[one][first].digest != looks[other][second].digest:
                found["near-duplicates across splits"].append(
                    f"{splits[other].name_of(second)} ~ {splits[one].name_of(first)}"
                )
    listed = [{"kind": kind, "count": len(some), "examples": some[:_EXAMPLES_LISTED]} for kind, some in found.items()]
    return listed + [
        {"kind": f"passed over: {kind}", "count": count, "examples": []} for kind, count in skipped.items()
    ]


# Contact sheets


def _check_sheet(file: Path) -> None:
    parent = file.absolute().parent
    if file.suffix.lower() != ".png" or file.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{file}: give a .png file in a directory that exists and can be written")


def _size_in_tile(image: Image.Image) -> tuple[int, int]:
    """Returns (width, height) of an image that is made to fill a tile."""
    scale = _TILE / max(image.size)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def _reduced(pixels: np.ndarray) -> np.ndarray:
    """Reduces an image, uint8 [H, W, C], to a tile of a sheet; a smaller one stays as it is."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if max(image.size) <= _TILE:
        return pixels
    reduced = np.asarray(image.resize(_size_in_tile(image), Image.Resampling.LANCZOS))
    return reduced.reshape(*reduced.shape[:2], pixels.shape[-1])


def draw_sheet(file: str | Path, rows: Sequence[tuple[str, Sequence[np.ndarray]]]) -> None:
    """Draws rows of images, each after its name.

    Args:
      file: path of a .png file.
      rows: names, each with its images, uint8 [h, w, C]. Each image is shown in a tile of 64 x 64 pixels.

    Raises:
      UserError: the file cannot be written.
    """
    _check_sheet(Path(file))
    step = _TILE + _GAP
    width = max((len(images) for _, images in rows), default=0)
    canvas = Image.new("RGB", (_NAME_WIDTH + width * step, max(1, len(rows)) * step), "white")
    text = ImageDraw.Draw(canvas)
    for row, (name, images) in enumerate(rows):
        text.text((4, row * step + _TILE // 2 - 6), name[:18], fill="black")
        for column, pixels in enumerate(images):
            reduced = _reduced(pixels)
            image = Image.fromarray(reduced[..., 0] if reduced.shape[-1] == 1 else reduced).convert("RGB")
            shown = image.resize(_size_in_tile(image), Image.Resampling.NEAREST)
            canvas.paste(shown, (_NAME_WIDTH + column * step, row * step))
    canvas.save(file)


def _draw_classes(file: Path, classes: Sequence[str], split: _Split, looks: list[_Look], per_class: int) -> None:
    order = seeded_permutation(split.count, 0, _SHEET_STREAM).tolist()
    chosen: dict[int, list[int]] = collections.defaultdict(list)
    for index in order:
        look = looks[index]
        if look.problem is None and len(chosen[look.label]) < per_class:
            chosen[look.label].append(index)
    rows = []
    for label, name in list(enumerate(classes))[:_SHEET_CLASSES]:
        images = [
            _reduced(read_pixels(split.example(at)[0], 1 if looks[at].form == "grey" else 3, split.name_of(at)))
            for at in chosen[label]
        ]
        rows.append((name, images))
    draw_sheet(file, rows)
