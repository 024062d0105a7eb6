"""`fdjax data`: prepares and inspects data sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from fdjax.commands.arguments import check_at_least_one, dispatch, parse_arguments, parse_with_config
from fdjax.commands.output_files import check_json_target, write_report
from fdjax.config import Config


@dataclasses.dataclass(kw_only=True)
class PrepareArguments:
    """Writes a TFDS data set (array_record, without TensorFlow) from files on disk; train.py --data.name NAME reads it.

    If the command is interrupted, the same command resumes it.
    """

    name: tyro.conf.Positional[str]
    """Name of the set: cifar10, cifar100, mnist, fashion_mnist, kmnist, imagenet2012, or a new name for your own."""
    source: str
    """Files to read. CIFAR: the .tar.gz or the folder it unpacks to, binary or Python version. MNIST, Fashion-MNIST,
    KMNIST: the folder of the four idx files. ImageNet: the folder of ILSVRC2012_img_train.tar and
    ILSVRC2012_img_val.tar. Any other set: a folder with train/<class>/* and test/<class>/* (or validation, or val)."""
    out: str | None = None
    """TFDS data directory to write into (None: TFDS's default)."""
    labels: str | None = None
    """ImageNet's validation labels: a text file (lines NAME SYNSET, or SYNSET in the order of names) or the devkit's
    archive (None: the devkit beside the tar files, or else the list that comes with TFDS)."""
    damaged: Literal["stop", "skip"] = "stop"
    """Treatment of examples that are truncated or unreadable or have an impossible label; skip leaves them out and
    counts them."""
    unpublished: bool = False
    """Accept files, and numbers of examples, that differ from the published set's."""
    json: str | None = None
    """File to write the manifest (counts, checksums, skipped examples) to as JSON."""


def prepare_command(arguments: Sequence[str]) -> int:
    """Runs `fdjax data prepare` and returns its exit status."""
    parsed = parse_arguments(PrepareArguments, "fdjax data prepare", arguments)
    check_json_target(parsed.json)
    from fdjax.data.folder import readable
    from fdjax.data.prepare import prepare

    folder, manifest = prepare(
        parsed.name,
        parsed.source,
        parsed.out,
        labels=parsed.labels,
        skip_damaged=parsed.damaged == "skip",
        unpublished=parsed.unpublished,
    )
    for name, split in manifest["splits"].items():
        skipped = f", {split['num_skipped']:,} damaged ones left out" if split["num_skipped"] else ""
        print(f"{name}: {split['examples']:,} images in {len(split['shards'])} shards{skipped}")
        for text in split["skipped"][:5]:
            print(f"  left out: {readable(text)}")
    print(f"{folder}: {len(manifest['class_names'])} classes; train with --data.name {manifest['name']}"
          f"{'' if parsed.out is None else f' --data.path {parsed.out}'}")  # fmt: skip
    write_report(parsed.json, manifest)
    return 0


@dataclasses.dataclass(kw_only=True)
class InspectArguments:
    """Reads every image of a data set and reports counts, sizes, pixel formats, and problems such as unreadable or
    duplicate images."""

    name: tyro.conf.Positional[str]
    """Name of the set, as in train.py --data.name: folder, prepared, fashion_mnist_subset, or a TFDS name."""
    path: str | None = None
    """Directory of the set, as in train.py --data.path."""
    sheet: str | None = None
    """PNG file to draw random images of each class into."""
    per_class: int = 8
    """Number of images of each class to draw."""
    json: str | None = None
    """File to write the findings to as JSON."""


def inspect_command(arguments: Sequence[str]) -> int:
    """Runs `fdjax data inspect` and returns its exit status."""
    parsed = parse_arguments(InspectArguments, "fdjax data inspect", arguments)
    check_json_target(parsed.json)
    check_at_least_one(per_class=parsed.per_class)
    from fdjax.data.folder import readable
    from fdjax.data.inspection import inspect_set

    report = inspect_set(parsed.name, parsed.path, parsed.sheet, parsed.per_class)
    for name, split in report["splits"].items():
        counts = sorted(split["per_class"].items(), key=lambda item: item[1])
        forms = ", ".join(f"{count:,} {form}" for form, count in split["forms"].items())
        sizes = split["sizes"]
        print(f"{name}: {split['images']:,} images of {len(counts)} classes, {counts[0][1]:,} ({counts[0][0]}) to "
              f"{counts[-1][1]:,} ({counts[-1][0]}) each; {forms}")  # fmt: skip
        if sizes["different"] == 1:
            print(f"  all {_size(sizes['largest'])}")
        elif sizes["different"]:
            ends = f"{_size(sizes['smallest'])} to {_size(sizes['largest'])}"
            often = _size(sizes["most_frequent"])
            print(f"  {sizes['different']:,} sizes, {ends}, most often {often} (height x width in pixels)")
        if len(counts) <= 20:
            print("  " + ", ".join(f"{class_name} {count:,}" for class_name, count in split["per_class"].items()))
    for problem in report["problems"]:
        print(f"{problem['kind']}: {problem['count']:,}")
        for text in problem["examples"][:5]:
            print(f"  {readable(text)}")
    for warning in report["warnings"]:
        print(f"warning: {warning['kind']}: {warning['count']:,}")
        for text in warning["examples"][:5]:
            print(f"  {readable(text)}")
    print("no problems found" if not report["problems"] else "problems found: see above")
    write_report(parsed.json, report)
    return 0


def _size(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


@dataclasses.dataclass(kw_only=True)
class SheetArguments:
    """Draws training images as a run would see them, so that you can look at the augmentation."""

    config: str
    """Config file; flags can set every field."""
    out: str
    """PNG file to draw into: a row for each image, first as it is, then augmented."""
    images: int = 10
    """Number of images."""
    times: int = 9
    """Number of augmented versions of each image."""
    settings: Annotated[Config, tyro.conf.arg(name="")]


def sheet_command(arguments: Sequence[str]) -> int:
    """Runs `fdjax data sheet` and returns its exit status."""
    parsed = parse_with_config(SheetArguments, "fdjax data sheet", arguments)
    check_at_least_one(images=parsed.images, times=parsed.times)
    from fdjax.data.inspection import draw_sheet
    from fdjax.training.augmented import augmented_rows

    draw_sheet(parsed.out, augmented_rows(parsed.settings, parsed.images, parsed.times))
    print(f"{parsed.out}: {parsed.images} images, each as it is and in {parsed.times} augmented versions")
    return 0


COMMANDS = {
    "prepare": (prepare_command, "write a TFDS data set from archives, idx files, ImageNet's tar files or a folder"),
    "inspect": (inspect_command, "count, measure and check every image of a data set; draw a contact sheet"),
    "sheet": (sheet_command, "draw training images as a config augments them"),
}


def data_command(arguments: Sequence[str]) -> int:
    """Runs `fdjax data COMMAND ...` and returns its exit status."""
    return dispatch(COMMANDS, arguments, "data")
